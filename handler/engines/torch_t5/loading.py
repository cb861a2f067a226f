"""A checkpoint, or one rank's part of it, as a model: tensor by tensor, straight to its device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol, Union

import numpy as np
import torch
from torch import Tensor, nn

from handler.checkpoints import splits
from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.native_layout import file_name
from handler.checkpoints.quantized import QuantizedWeight, quantize, row_scales
from handler.checkpoints.read import Array, Weights
from handler.checkpoints.safetensors_file import SafetensorsFile
from handler.checkpoints.splits import Split, to_fp16
from handler.checkpoints.tensors import EMBEDDINGS, HEAD, check_tensors, tensors_of_the_stacks
from handler.engines.torch_t5.model import T5
from handler.engines.torch_t5.quantize import Int8Linear, RescaledLinear
from handler.errors import LoadError

# fp32 as numpy has it, other floats as torch does, or a matrix in int8.
Part = Union[Array, Tensor, QuantizedWeight]


class Parts(Protocol):
    """What one rank has of each tensor, by transformers' names. Raises LoadError."""

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding, which is not quantized."""

    def part(self, name: str) -> Part: ...


class CheckpointParts:
    """Cut out of a checkpoint as it is read.

    int8: matrices are quantized here; of those that ranks share by inputs each has scales of its
    own, since the ranks' results are added up.
    """

    def __init__(
        self, weights: Weights, a: T5Architecture, rank: int, degree: int, *, int8: bool
    ) -> None:
        check_tensors(weights, a)
        self._weights, self._rank, self._degree, self._int8 = weights, rank, degree, int8
        self._tensors: Mapping[str, splits.Tensor] = {
            tensor.name: tensor for tensor in splits.t5_tensors(a, weights)
        }
        shared = self._tensors[HEAD].source == self._tensors[EMBEDDINGS[0]].source
        self.is_tied = shared and not int8

    def part(self, name: str) -> Part:
        tensor = self._tensors[name]
        # a rank looks up the ids of its part of the vocabulary
        cut = self._tensors[HEAD] if name in EMBEDDINGS else tensor
        index = cut.part(self._rank, self._degree)
        array = self._weights.part(tensor.source, tensor.shape, index)
        if not (self._int8 and tensor.is_matrix):
            return array
        scales = row_scales(array)
        return QuantizedWeight(quantize(array, scales), scales)


class RankFileParts:
    """A rank's file of the native layout."""

    def __init__(self, folder: Path, a: T5Architecture, rank: int, degree: int) -> None:
        self._file = SafetensorsFile(folder / file_name(rank, degree))
        self._vocabulary = splits.Tensor(HEAD, (a.vocab_size, a.d_model), Split.VOCABULARY, HEAD)
        self._rank, self._degree = rank, degree
        self.is_tied = HEAD not in self._file.names

    def part(self, name: str) -> Part:
        stored = self._file.stored(name)
        if stored is None:
            raise LoadError(f"{self._file.path}: no tensor {name}")
        array = self._file.read_as_stored(name)
        if stored[0] == "I8":
            return QuantizedWeight(array, self._file.read_as_stored(f"{name}.scale"))
        if name in EMBEDDINGS:  # whole in each file
            array = array[self._vocabulary.part(self._rank, self._degree)]
        tensor = torch.from_numpy(array.view(np.int16) if stored[0] == "BF16" else array)
        return tensor.view(torch.bfloat16) if stored[0] == "BF16" else tensor


def load_model(a: T5Architecture, parts: Parts, dtype: torch.dtype, device: torch.device) -> T5:
    """The model of architecture ``a``, a rank's own where ``parts`` are. Raises LoadError."""
    with torch.device("meta"):
        model = T5(a, dtype)
    fill = _Filler(model, parts, dtype, device)
    fill.parameter("embedding", EMBEDDINGS[:1], dtype)
    for place, names in _products(a):
        fill.product(place, names)
    if parts.is_tied:
        model.lm_head.weight = model.embedding.weight
    else:
        fill.product("lm_head", [HEAD])
    for place, name in _norms(a):
        fill.parameter(place, [name], torch.float32)
    for stack in ("encoder", "decoder"):
        fill.relative_bias(stack, [n for n in _names(a, stack) if "relative_attention_bias" in n])
    return model.requires_grad_(False).eval()


class _Filler:
    """Puts tensors into a model that has none yet, reading one at a time."""

    def __init__(self, model: T5, parts: Parts, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._parts, self._dtype, self._device = model, parts, dtype, device

    def parameter(self, place: str, names: Sequence[str], dtype: torch.dtype) -> None:
        parts = (self._parts.part(name) for name in names)
        self._fill(self._model.get_submodule(place), parts, names, dtype)

    def product(self, place: str, names: Sequence[str]) -> None:
        """The product of these matrices, one below the other, in the form they are in."""
        parts = (self._parts.part(name) for name in names)
        first, scale = next(parts), 1.0
        parent, _, attribute = place.rpartition(".")
        is_rescaled = attribute == "wo" and self._dtype == torch.float16
        product = self._model.get_submodule(place)
        if isinstance(first, QuantizedWeight):
            product = self._int8(len(_weight(product)), [first, *parts])
        else:
            if is_rescaled:
                scale = _power_of_two(first)
                first = first / scale
            self._fill(product, chain([first], parts), names, self._dtype)
        if is_rescaled:
            product = RescaledLinear(product, scale)
        setattr(self._model.get_submodule(parent), attribute, product)

    def relative_bias(self, stack: str, names: Sequence[str]) -> None:
        tables = [_floats(self._parts.part(n), n, torch.float32).float() for n in names]
        module = self._model.get_submodule(stack)
        biases = torch.stack(tables).to(self._device)
        module.relative_bias = nn.Parameter(biases, requires_grad=False)

    def _fill(
        self, module: nn.Module, parts: Iterable[Part], names: Sequence[str], dtype: torch.dtype
    ) -> None:
        shape = _weight(module).shape
        floats = (_floats(part, name, dtype) for part, name in zip(parts, names))
        module.weight = nn.Parameter(
            _joined(floats, shape, dtype, self._device), requires_grad=False
        )

    def _int8(self, rows: int, parts: Sequence[Part]) -> Int8Linear:
        quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
        values = [torch.from_numpy(part.values) for part in quantized]
        scales = [torch.from_numpy(part.scales) for part in quantized]
        return Int8Linear(
            _joined(values, (rows, values[0].shape[1]), torch.int8, self._device),
            _joined(scales, (rows,), torch.float32, self._device),
        )


def _joined(
    parts: Iterable[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One below the other; then rows of 0, as the last rank's vocabulary may be smaller."""
    whole = torch.empty(*shape, dtype=dtype, device=device)
    row = 0
    for part in parts:
        whole[row : row + len(part)] = part
        row += len(part)
    whole[row:] = 0
    return whole


def _floats(part: Part, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor that can be turned into ``dtype``. Raises LoadError where it is beyond fp16."""
    assert not isinstance(part, QuantizedWeight), name
    if isinstance(part, np.ndarray):
        return torch.from_numpy(to_fp16(part, name) if dtype == torch.float16 else part)
    return part


def _power_of_two(weight: Array | Tensor) -> float:
    """Divided by it, exactly, the largest number is near 1."""
    largest = max(float(weight.max()), -float(weight.min()))
    return math.ldexp(1.0, math.frexp(largest)[1])


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _products(a: T5Architecture) -> Iterator[tuple[str, list[str]]]:
    """Place in the model, and the matrices that its weight is made of."""
    wi = ["wi_0", "wi_1"] if a.gated else ["wi"]
    for stack, i, last in _layers(a):
        place, layer = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
        own = "attention" if stack == "encoder" else "self_attention"
        yield f"{place}.{own}.qkv", _weights(f"{layer}.0.SelfAttention", "q", "k", "v")
        yield f"{place}.{own}.o", _weights(f"{layer}.0.SelfAttention", "o")
        if stack == "decoder":
            cross = f"{layer}.1.EncDecAttention"
            yield f"{place}.cross_attention.q", _weights(cross, "q")
            yield f"{place}.cross_attention.kv", _weights(cross, "k", "v")
            yield f"{place}.cross_attention.o", _weights(cross, "o")
        yield f"{place}.feed_forward.wi", _weights(f"{layer}.{last}.DenseReluDense", *wi)
        yield f"{place}.feed_forward.wo", _weights(f"{layer}.{last}.DenseReluDense", "wo")


def _norms(a: T5Architecture) -> Iterator[tuple[str, str]]:
    for stack, i, last in _layers(a):
        place, layer = f"{stack}.layers.{i}", f"{stack}.block.{i}.layer"
        own = "attention" if stack == "encoder" else "self_attention"
        yield f"{place}.{own}_norm", f"{layer}.0.layer_norm.weight"
        if stack == "decoder":
            yield f"{place}.cross_attention_norm", f"{layer}.1.layer_norm.weight"
        yield f"{place}.feed_forward_norm", f"{layer}.{last}.layer_norm.weight"
    for stack in ("encoder", "decoder"):
        yield f"{stack}.norm", f"{stack}.final_layer_norm.weight"


def _layers(a: T5Architecture) -> Iterator[tuple[str, int, int]]:
    """Stack, layer, and where in a layer the feed-forward is."""
    yield from (("encoder", i, 1) for i in range(a.num_layers))
    yield from (("decoder", i, 2) for i in range(a.num_decoder_layers))


def _weights(place: str, *names: str) -> list[str]:
    return [f"{place}.{name}.weight" for name in names]


def _names(a: T5Architecture, stack: str) -> Iterator[str]:
    return (name for name, _ in tensors_of_the_stacks(a) if name.startswith(stack))
