"""The keys and values of every row, allocated once, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handler.checkpoints.architecture import T5Architecture
from handler.engines.torch_t5.model import attention
from handler.machine import reserved_memory


@dataclass(frozen=True)
class EncodedPrompt:
    """The keys and values of one prompt in every decoder layer, [layers, 2, heads, s, d_kv].

    Not changed by decoding: several rows may use one, at the same time or later.
    """

    keys_values: Tensor

    @property
    def length(self) -> int:
        return self.keys_values.shape[3]

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes


class RowCache:
    """Of every row: its own tokens' keys and values, and its prompt's.

    ``own`` and ``cross`` are [layers, 2, rows, heads, tokens, d_kv]. A row's places beyond its
    length hold numbers (0 weighs a NaN as NaN, so what is left of others is wiped out).
    """

    def __init__(
        self,
        a: T5Architecture,
        rows: int,
        prompt: int,
        output: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (a.num_decoder_layers, 2, rows, a.num_heads)
        self.own = _zeros((*shape, output, a.d_kv), dtype, device)
        self.cross = _zeros((*shape, prompt, a.d_kv), dtype, device)
        self.cross_lengths = torch.ones(rows, dtype=torch.int64, device=device)
        # on the host: tokens that each row holds, and how many of its places are not 0
        self.own_used = [0] * rows
        self.cross_used = [0] * rows
        self.prompt_lengths = [1] * rows

    @staticmethod
    def nbytes(a: T5Architecture, rows: int, prompt: int, output: int, item: int) -> int:
        """What it takes, ``item`` bytes a number."""
        return 2 * a.num_decoder_layers * rows * a.num_heads * a.d_kv * (prompt + output) * item

    def empty_prompt(self, length: int) -> EncodedPrompt:
        """To be filled, layer by layer."""
        layers, two, _, heads, _, size = self.cross.shape
        return EncodedPrompt(self.cross.new_empty(layers, two, heads, length, size))

    def attach(self, prompt: EncodedPrompt, row: int) -> None:
        length = prompt.length
        self.cross[:, :, row, :, :length] = prompt.keys_values
        self.cross[:, :, row, :, length : self.cross_used[row]] = 0
        self.own[:, :, row, :, : self.own_used[row]] = 0
        self.cross_lengths[row] = length
        self.own_used[row], self.cross_used[row], self.prompt_lengths[row] = 0, length, length

    def move(self, src: int, dst: int) -> None:
        own = max(self.own_used[src], self.own_used[dst])
        cross = max(self.cross_used[src], self.cross_used[dst])
        self.own[:, :, dst, :, :own] = self.own[:, :, src, :, :own]
        self.cross[:, :, dst, :, :cross] = self.cross[:, :, src, :, :cross]
        self.cross_lengths[dst] = self.cross_lengths[src]
        for used in (self.own_used, self.cross_used, self.prompt_lengths):
            used[dst] = used[src]

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Each of ``rows`` takes the tokens of its parent; their prompts are the same."""
        pairs = [(row, parent) for row, parent in zip(rows, parents) if row != parent]
        if not pairs:
            return
        to, source = map(list, zip(*pairs))
        length = max(self.own_used[row] for row in (*to, *source))
        self.own[:, :, to, :, :length] = self.own[:, :, source, :, :length]
        for row, used in zip(to, [self.own_used[row] for row in source]):
            self.own_used[row] = used


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU they take memory as they are written to."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = reserved_memory(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class StepMemory:
    """See DecoderMemory: the first n rows of a cache in one step, as far as their tokens reach.

    positions [n, q]: where each token is. by_distance [tables, heads, 2 * output - 1]: the relative
    bias of a key at distance -(output - 1), ..., output - 1, which is -inf ahead of the token.
    """

    def __init__(
        self, cache: RowCache, positions: Tensor, by_distance: Tensor, own: int, cross: int
    ) -> None:
        """own, cross: the longest row's tokens, those of this step among them, and prompt."""
        n = len(positions)
        self._own = cache.own[:, :, :n, :, :own]
        self._cross = cache.cross[:, :, :n, :, :cross]
        self._rows = torch.arange(n, device=positions.device)[:, None]
        self._positions = positions
        keys = torch.arange(own, device=positions.device)
        middle = by_distance.shape[-1] // 2
        # [tables, heads, n, q, k] -> [tables, n, heads, q, k]
        bias = by_distance[:, :, keys - positions[..., None] + middle]
        self._bias = bias.transpose(1, 2)
        places = torch.arange(cross, device=positions.device)
        self._is_prompt = (places < cache.cross_lengths[:n, None])[:, None, None]

    def own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._own[layer]
        keys[self._rows, :, self._positions] = k
        values[self._rows, :, self._positions] = v
        bias = self._bias[layer % len(self._bias)]
        return attention(q.transpose(1, 2), keys, values, bias).transpose(1, 2)

    def cross(self, layer: int, q: Tensor) -> Tensor:
        keys, values = self._cross[layer]
        return attention(q.transpose(1, 2), keys, values, self._is_prompt).transpose(1, 2)
