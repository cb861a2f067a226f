"""How tensor-parallel ranks share the tensors of a T5."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.tensors import (
    EMBEDDINGS,
    HEAD,
    embedding_name,
    head_name,
    tensors_of_the_stacks,
)
from handler.errors import LoadError

# Elements of the pieces in which a tensor is converted instead of copied whole: 16 MB in fp32.
_CHUNK = 1 << 22


class Split(Enum):
    """Along which axis the ranks share a tensor.

    A product that is split by outputs (ROWS) feeds one that is split by inputs (COLUMNS), whose
    results the ranks add up (Shoeybi et al. 2019, Megatron-LM).
    """

    WHOLE = "each rank has all of it"
    ROWS = "[out / N, in]"
    COLUMNS = "[out, in / N]"
    HEADS = "[buckets, heads / N]"
    VOCABULARY = "[vocabulary / N, d_model], the last rank's part may be smaller"


@dataclass(frozen=True)
class Tensor:
    """name: transformers' name; source: the name that it has in this checkpoint."""

    name: str
    shape: tuple[int, ...]
    split: Split
    source: str

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a matrix product, what int8 quantizes."""
        return self.split in (Split.ROWS, Split.COLUMNS, Split.VOCABULARY)

    def part(self, rank: int, degree: int) -> tuple[slice, ...]:
        """The index of ``rank``'s part."""
        if self.split is Split.WHOLE:
            return (slice(None),)
        axis = 0 if self.split in (Split.ROWS, Split.VOCABULARY) else 1
        size = -(-self.shape[axis] // degree)
        return (*[slice(None)] * axis, slice(rank * size, (rank + 1) * size))

    def part_shape(self, rank: int, degree: int) -> tuple[int, ...]:
        index = self.part(rank, degree)
        split = [len(range(*i.indices(n))) for i, n in zip(index, self.shape)]
        return (*split, *self.shape[len(index) :])


_SPLITS = {
    **dict.fromkeys(("q", "k", "v", "wi", "wi_0", "wi_1"), Split.ROWS),
    **dict.fromkeys(("o", "wo"), Split.COLUMNS),
    "relative_attention_bias": Split.HEADS,
}


def t5_tensors(a: T5Architecture, weights: Container[str]) -> Iterator[Tensor]:
    """Every tensor of the model, the head too where it is the embedding.

    weights: the names of the checkpoint's tensors.
    """
    table = (a.vocab_size, a.d_model)
    yield Tensor(EMBEDDINGS[0], table, Split.WHOLE, embedding_name(weights))
    for name, shape in tensors_of_the_stacks(a):
        kind = name.split(".")[-2]
        yield Tensor(name, shape, _SPLITS.get(kind, Split.WHOLE), name)
    yield Tensor(HEAD, table, Split.VOCABULARY, head_name(weights, a))


def check_degree(a: T5Architecture, degree: int, name: str = "tensor_parallel_degree") -> None:
    """Raises LoadError, naming the degrees that are possible, where ``degree`` is not.

    name: what the error calls the degree.
    """
    if a.num_heads % degree or a.d_ff % degree:
        possible = [
            n for n in range(1, a.num_heads + 1) if a.num_heads % n == 0 and a.d_ff % n == 0
        ]
        raise LoadError(
            f"{name}={degree} does not divide num_heads={a.num_heads} and "
            f"d_ff={a.d_ff}; possible are {', '.join(map(str, possible))}"
        )


def chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis, to convert an array of this shape piece by piece."""
    rows = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def to_fp16(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.float16]:
    """Raises LoadError where a weight is beyond fp16's range."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise LoadError(
            f"tensor {name} holds {np.abs(array).max():g}, fp16 ends at 65504; set dtype to bf16 "
            "or fp32"
        )
    return half
