"""What a T5 takes of a device's memory, by its shapes alone: weights, caches, workspace.

The weights and caches are what the engines allocate. The workspace is an upper estimate, with an
allowance for what is not the engine's (CUDA's context and kernels; Python, Java and the system).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.splits import Split, Tensor, t5_tensors
from handler.checkpoints.tensors import EMBEDDINGS, HEAD

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# With one fp32 scale for each 64 weights, or for each row of them, which is less.
_BYTES_OF_INT8 = 1 + 4 / 64
# backend torch encodes up to so many tokens of prompts together.
_ENCODED_TOGETHER = 4096
# The ONNX engine pads heads to a multiple of 8.
_HEAD_MULTIPLE = 8
# Allowances. CUDA's context and libraries; a process with the CPU engine was measured at 0.1 GiB
# beside its weights, the rest is for Java and the system.
_BESIDE_ON_GPU, _BESIDE_ON_CPU = 1 << 30, 3 << 29


@dataclass(frozen=True)
class Workload:
    """rows: texts at the same time; lengths in tokens, the longest of all rows at once."""

    rows: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Footprint:
    """A model on an engine, in one of ``degree`` devices. Sizes in bytes.

    backend: onnxruntime (CPU), torch (each layer is shared by the devices) or transformers (whole
    layers are, one device after the other). dtype: of the weights: fp32, bf16, fp16 or int8.
    names: the checkpoint's tensors, where they are known: a tied model may have its own head.
    """

    architecture: T5Architecture
    backend: str
    dtype: str
    degree: int = 1
    on_gpu: bool = True
    names: Container[str] = ()
    encoder_cache: int = 0

    @cached_property
    def weights(self) -> int:
        """Of one device, the fullest."""
        if self.backend == "torch" or self.degree == 1:
            return sum(map(self._bytes, self._tensors()))
        sizes = [self._bytes(tensor) for tensor in self._tensors()]
        layers = self.architecture.num_layers + self.architecture.num_decoder_layers
        return sum(sizes) // self.degree + max(*sizes, sum(sizes) // layers)

    @cached_property
    def all_weights(self) -> int:
        """Of all devices together, as one process reads them."""
        return sum(map(self._whole_bytes, self._tensors()))

    @cached_property
    def read_by_a_step(self) -> int:
        """Weights that a decoding step reads: decoder and head, without the cross-attention's k
        and v, which read prompts. Of one device where devices work at the same time, else of all.
        """
        size = self._bytes if self.backend == "torch" else self._whole_bytes
        tensors = t5_tensors(self.architecture, self.names)
        return sum(size(tensor) for tensor in tensors if _is_read(tensor))

    def caches(self, work: Workload) -> int:
        """Keys and values of all rows, in one device: of their own tokens and their prompts."""
        return -(-self.cache_of_all_devices(work) // self.degree)

    def cache_of_all_devices(self, work: Workload) -> int:
        a, size = self.architecture, self.architecture.d_kv
        if self.backend == "onnxruntime":
            size = -(-size // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
        tokens = work.rows * (work.input_tokens + work.output_tokens)
        return 2 * a.num_decoder_layers * a.num_heads * size * tokens * self._computed_in

    def workspace(self, work: Workload) -> int:
        """Activations at their most, in one device, and what is not the engine's."""
        a, item = self.architecture, self._computed_in
        together = work.rows * work.input_tokens
        if self.backend == "torch":
            together = max(_ENCODED_TOGETHER, work.input_tokens)
        elif self.backend == "onnxruntime":
            together = work.input_tokens
        # scores as numbers of the model, their softmax in fp32, its result
        square = a.num_heads * work.input_tokens**2 * (2 * item + 4)
        prompts = work.rows if self.backend == "transformers" else 1
        tables = a.num_layers if a.bias_in_every_layer and self.backend == "torch" else 1
        wide = a.d_ff * (3 if a.gated else 2) + 4 * a.num_heads * a.d_kv
        shared = self.degree if self.backend == "torch" else 1
        encoding = (square * max(prompts, tables) + together * wide * item) // shared
        logits = 3 * work.rows * a.vocab_size * 4
        beside = _BESIDE_ON_GPU if self.on_gpu else _BESIDE_ON_CPU
        residual = 3 * together * a.d_model * 4
        return beside + residual + max(encoding, logits) + self.encoder_cache // shared

    def total(self, work: Workload) -> int:
        return self.weights + self.caches(work) + self.workspace(work)

    @property
    def _computed_in(self) -> int:
        if self.dtype == "int8":
            return 2 if self.on_gpu else 4
        return _BYTES[self.dtype]

    def _tensors(self) -> Iterator[Tensor]:
        """Each as often as it is held."""
        for tensor in t5_tensors(self.architecture, self.names):
            tied = tensor.name == HEAD and tensor.source in EMBEDDINGS
            held_once = self.backend == "transformers" or (
                self.backend == "torch" and self.dtype != "int8"
            )
            if not (tied and held_once):
                yield tensor

    def _bytes(self, tensor: Tensor) -> int:
        """Of one device's part."""
        whole = self._whole_bytes(tensor)
        is_shared = tensor.split is not Split.WHOLE or tensor.name in EMBEDDINGS
        return -(-whole // self.degree) if is_shared and self.backend == "torch" else whole

    def _whole_bytes(self, tensor: Tensor) -> int:
        count = 1
        for n in tensor.shape:
            count *= n
        if self.dtype == "int8" and tensor.is_matrix:
            return int(count * _BYTES_OF_INT8)
        is_large = tensor.is_matrix or tensor.name in EMBEDDINGS
        item = self._computed_in if is_large else 4
        keeps_fp32 = self.backend == "transformers" and self.dtype == "fp16"
        if keeps_fp32 and tensor.name.endswith(".wo.weight"):
            item = 4
        return count * item


def _is_read(tensor: Tensor) -> bool:
    if tensor.name == HEAD:
        return True
    of_prompts = tensor.name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))
    return tensor.name.startswith("decoder.") and not of_prompts
