"""Our own layout: one safetensors file a rank, split and quantized once.

Of rank r of N, in ``rank-<r>-of-<N>.safetensors``, under transformers' names:

    q, k, v, wi, wi_0, wi_1         [out / N, in]
    o, wo                           [out, in / N]: the ranks' results are to be added up
    lm_head                         [vocabulary / N, d_model]; absent where it is the embedding and
                                    not quantized: the rank's rows of shared.weight then
    relative_attention_bias         [buckets, heads / N]
    shared, layer norms             whole

int8: matrices in I8 with ``<name>.scale`` [out] in F32, symmetric, the same on every rank; all else
in F32. fp16: ``wo`` in F32, since what it computes with leaves fp16's range.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.quantized import QuantizedWeight, Weight, quantize, row_scales
from handler.checkpoints.read import Array, Index, Weights
from handler.checkpoints.safetensors_file import SafetensorsFile
from handler.checkpoints.splits import Split, Tensor, chunks, t5_tensors, to_fp16
from handler.errors import LoadError

DTYPES = ("fp32", "fp16", "bf16", "int8")

# safetensors' names of types -> bytes of an element, numpy's type
_TYPES = {"F32": (4, "<f4"), "F16": (2, "<f2"), "BF16": (2, "<u2"), "I8": (1, "<i1")}
_STORED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "F32"}
_ALIGNMENT = 64
_BF16_INFINITY = 0x7F80  # its bits without the sign


def check(dtype: str, pipeline_parallel: int) -> None:
    """Raises LoadError where this layout cannot be as asked for."""
    if dtype not in DTYPES:
        raise LoadError(f"dtype={dtype} cannot be partitioned, allowed: {', '.join(DTYPES)}")
    if pipeline_parallel != 1:
        raise LoadError(
            f"pipeline_parallel_degree={pipeline_parallel} is not in the native layout; raise "
            "tensor_parallel_degree instead, or partition with --format fastertransformer"
        )


def file_name(rank: int, degree: int) -> str:
    return f"rank-{rank}-of-{degree}.safetensors"


def tensors_of(a: T5Architecture, weights: Weights, dtype: str) -> list[Tensor]:
    """What the layout has of this checkpoint."""
    return [
        tensor
        for tensor in t5_tensors(a, weights)
        if dtype == "int8" or tensor.split is not Split.VOCABULARY or tensor.source == tensor.name
    ]


def write(
    folder: Path, tensors: Sequence[Tensor], weights: Weights, degree: int, dtype: str
) -> Iterator[str]:
    """Write every rank's file, yielding each tensor's name when it is done.

    Each tensor is read once and its parts go to all files: memory is that of one tensor.
    """
    with ExitStack() as files:
        ranks = [
            files.enter_context(
                _RankFile(folder / file_name(rank, degree), _entries(tensors, rank, degree, dtype))
            )
            for rank in range(degree)
        ]
        for tensor in tensors:
            _write_tensor(tensor, weights.get(tensor.source, tensor.shape), ranks, dtype)
            yield tensor.name


class _Entry(NamedTuple):
    name: str
    kind: str  # safetensors' name of the type
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * _TYPES[self.kind][0]


def _entries(tensors: Sequence[Tensor], rank: int, degree: int, dtype: str) -> list[_Entry]:
    entries = []
    for tensor in tensors:
        shape = tensor.part_shape(rank, degree)
        entries.append(_Entry(tensor.name, _kind(tensor, dtype), shape))
        if _is_quantized(tensor, dtype):
            entries.append(_Entry(f"{tensor.name}.scale", "F32", shape[:1]))
    return entries


def _kind(tensor: Tensor, dtype: str) -> str:
    if _is_quantized(tensor, dtype):
        return "I8"
    if dtype == "fp16" and tensor.name.endswith(".wo.weight"):
        return "F32"
    return _STORED_AS[dtype]


def _is_quantized(tensor: Tensor, dtype: str) -> bool:
    return dtype == "int8" and tensor.is_matrix


def _write_tensor(tensor: Tensor, array: Array, ranks: list[_RankFile], dtype: str) -> None:
    scales = None
    if _is_quantized(tensor, dtype):
        # of whole rows, before inputs are split, so that all ranks have the same
        scales = np.concatenate([row_scales(array[rows]) for rows in chunks(array.shape)])
    kind = _kind(tensor, dtype)
    for rank, file in enumerate(ranks):
        index = tensor.part(rank, len(ranks))
        part = array[index]
        scale = None if scales is None else scales[index[0]]
        if scale is not None:
            file.append(f"{tensor.name}.scale", scale)
        for rows in chunks(part.shape):
            if scale is not None:
                file.append(tensor.name, quantize(part[rows], scale[rows]))
            else:
                file.append(tensor.name, _converted(part[rows], kind, tensor.name))


def _converted(array: Array, kind: str, name: str) -> npt.NDArray[Any]:
    if kind == "F16":
        return to_fp16(array, name)
    if kind == "BF16":  # the upper half of an fp32, rounded to nearest, to even between two
        bits = np.ascontiguousarray(array).view("<u4")
        rounded: npt.NDArray[np.uint32] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        if ((rounded & _BF16_INFINITY) == _BF16_INFINITY).any():
            raise LoadError(
                f"tensor {name} holds {np.abs(array).max():g}, bf16 ends at 3.38953e+38; set dtype "
                "to fp32"
            )
        return rounded.astype("<u2")
    return array


class _RankFile:
    """A safetensors file in the making: eight bytes of header length, the header, the data.

    The safetensors library writes from memory only, and knows no bfloat16 of numpy's.
    """

    def __init__(self, path: Path, entries: list[_Entry]) -> None:
        self._path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._next: dict[str, int] = {}  # where the tensor's next byte goes
        offset = 0
        for entry in sorted(entries, key=lambda e: -_TYPES[e.kind][0]):  # none is misaligned so
            header[entry.name] = {
                "dtype": entry.kind,
                "shape": entry.shape,
                "data_offsets": [offset, offset + entry.size],
            }
            self._next[entry.name] = offset
            offset += entry.size
        text = json.dumps(header).encode()
        self._header = text + b" " * (-(8 + len(text)) % _ALIGNMENT)

    def __enter__(self) -> _RankFile:
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, name: str, array: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(array)
        self._file.seek(8 + len(self._header) + self._next[name])
        self._file.write(data.data)
        self._next[name] += data.nbytes


class NativeWeights:
    """See Weights: the tensors of a folder made for one rank. Scales have no names of their own."""

    def __init__(self, folder: Path) -> None:
        self._file = SafetensorsFile(folder / file_name(0, 1))
        self.paths = [self._file.path]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._file.names if not name.endswith(".scale"))

    def __contains__(self, name: object) -> bool:
        return name in self._file.names

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._file.stored(name)
        if stored is None:
            raise LoadError(f"{self.paths[0]}: no tensor {name}")
        return stored[1]

    def file(self, name: str) -> Path:
        return self.paths[0]

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        """A tensor that is not quantized. Raises LoadError where it is missing or misshapen."""
        array: Array = self._read(name, "F32", shape)
        return array

    def part(self, name: str, shape: tuple[int, ...], index: Index) -> Array:
        return self.get(name, shape)[index]

    def linear(self, name: str, shape: tuple[int, int]) -> Weight:
        """A matrix [out, in], as it is stored. Raises LoadError as ``get`` does."""
        if f"{name}.scale" not in self:
            return self.get(name, shape)
        scales = self.get(f"{name}.scale", shape[:1])
        return QuantizedWeight(self._read(name, "I8", shape), scales)

    def _read(self, name: str, kind: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if self._file.stored(name) != (kind, shape):
            raise LoadError(f"{self.paths[0]}: no tensor {name} of type {kind} and {list(shape)}")
        return self._file.read_as_stored(name)
