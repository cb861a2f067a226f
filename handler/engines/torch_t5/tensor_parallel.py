"""Tensor parallelism, put onto a model that is built (Shoeybi et al. 2019, Megatron-LM).

Each rank has some of the heads, of the feed-forward's width and of the vocabulary. Its model is an
ordinary one of a smaller architecture; what is added here is where the ranks' results meet: after
``o``, ``wo`` and the embedding they are added up, after the head they are joined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from handler.checkpoints.architecture import T5Architecture
from handler.engines.torch_t5.model import T5

# Products that read what is split: each rank has a part of the sum.
_SUMMED = ("o", "wo")


def part_of(a: T5Architecture, degree: int) -> T5Architecture:
    """The architecture of one rank's model; the last rank's vocabulary is filled up with zeros."""
    return replace(
        a,
        num_heads=a.num_heads // degree,
        d_ff=a.d_ff // degree,
        vocab_size=-(-a.vocab_size // degree),
    )


def join_ranks(model: T5, vocab_size: int, group: dist.ProcessGroup) -> None:
    """Let this rank's model compute, together with the others', what the whole one does."""
    for parent in list(model.modules()):
        for name, product in list(parent.named_children()):
            if name in _SUMMED:
                setattr(parent, name, Summed(product, group))
    table = model.embedding.weight
    assert isinstance(table, Tensor)
    model.embedding = SplitEmbedding(table, group)
    model.lm_head = SplitHead(model.lm_head, vocab_size, group)


@contextmanager
def apart(model: T5) -> Iterator[None]:
    """Let this rank's model compute by itself meanwhile: all of its own work, for nothing."""
    meetings = [module for module in model.modules() if isinstance(module, _Meeting)]
    for meeting in meetings:
        meeting.is_apart = True
    try:
        yield
    finally:
        for meeting in meetings:
            meeting.is_apart = False


class _Meeting(nn.Module):
    """Where the ranks' results come together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.is_apart = False
        self._group, self._size = group, dist.get_world_size(group)

    def _sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if not self.is_apart:
            dist.all_reduce(x, group=self._group)
        return x

    def _all(self, x: Tensor) -> list[Tensor]:
        if self.is_apart:
            return [x] * self._size
        parts = [torch.empty_like(x) for _ in range(self._size)]
        dist.all_gather(parts, x, group=self._group)
        return parts


class Summed(_Meeting):
    """A product of a part of the inputs: the ranks' results are added up."""

    def __init__(self, product: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self._sum(self.product(x))


class SplitEmbedding(_Meeting):
    """Each rank looks up the ids that are in its part of the vocabulary."""

    def __init__(self, table: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.weight = table
        self._first = dist.get_rank(group) * len(table)

    def forward(self, ids: Tensor) -> Tensor:
        places = ids - self._first
        is_here = (places >= 0) & (places < len(self.weight))
        rows = F.embedding(places * is_here, self.weight) * is_here[..., None]
        return self._sum(rows)


class SplitHead(_Meeting):
    """Logits of the whole vocabulary, on every rank."""

    def __init__(self, product: nn.Module, vocab_size: int, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.product, self._vocab_size = product, vocab_size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(self.product(x)), dim=-1)[..., : self._vocab_size]
