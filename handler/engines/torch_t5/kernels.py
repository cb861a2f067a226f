# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Kernels for decoding on GPUs, in Triton: attention over true lengths, and what is fused around
the matrix products. Each does what the plain code beside it in model.py and kv_cache.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor, nn

from handler.engines.torch_t5.kv_cache import RowCache
from handler.engines.torch_t5.model import T5, FeedForward, Norm
from handler.engines.torch_t5.quantize import Int8Linear

_KEYS_AT_ONCE = 64
# What one program of the int8 product computes, and how much of its inputs at a time.
_ROWS, _OUTPUTS, _INPUTS = 16, 16, 256
# Before Ampere the products are no tensor core's, and of more inputs registers would not do.
_INPUTS_BEFORE_AMPERE = 64
_WIDEST_BLOCK = 4096  # of numbers that one program of a kernel works on at a time


class KernelMemory:
    """See DecoderMemory: one token a row, every row over its own lengths, which lie on the device.

    positions [n], cross_lengths [n]; by_distance as StepMemory's. Nothing depends on numbers that
    the host knows, so that a CUDA graph may hold it.
    """

    def __init__(self, cache: RowCache, positions: Tensor, by_distance: Tensor) -> None:
        self._cache, self._positions, self._by_distance = cache, positions, by_distance

    def own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = self._by_distance[layer % len(self._by_distance)]
        return _attend(q, self._cache.own[layer], self._positions, k, v, table)

    def cross(self, layer: int, q: Tensor) -> Tensor:
        return _attend(q, self._cache.cross[layer], self._cache.cross_lengths, None, None, None)


def _attend(
    q: Tensor,
    kept: Tensor,
    lengths: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    by_distance: Tensor | None,
) -> Tensor:
    """q [n, 1, heads, d_kv] over kept [2, rows, heads, tokens, d_kv], of which each row has
    ``lengths``; k and v, where given, come behind them and are kept."""
    n, _, heads, size = q.shape
    result = torch.empty_like(q, memory_format=torch.contiguous_format)
    new = (q, q) if k is None or v is None else (k, v)
    bias = q if by_distance is None else by_distance
    _attention[(n, heads)](
        q, kept[0], kept[1], lengths, *new, bias, result,
        q.stride(0), q.stride(2), new[0].stride(0), new[0].stride(2),
        kept.stride(1), kept.stride(2), kept.stride(3), bias.stride(0), bias.shape[-1] // 2,
        HAS_NEW=k is not None, SIZE=size, PADDED=triton.next_power_of_2(size), KEYS=_KEYS_AT_ONCE,
    )  # fmt: skip
    return result


@triton.jit
def _attention(
    q_of, keys, values, lengths, new_k, new_v, bias, result,
    q_row, q_head, new_row, new_head, kept_row, kept_head, kept_token, bias_head, middle,
    HAS_NEW: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One row, one head: softmax as it goes along the keys (Milakov and Gimelshein 2018)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, PADDED)
    in_head = d < SIZE
    q = tl.load(q_of + row * q_row + head * q_head + d, mask=in_head, other=0.0).to(tl.float32)
    length = tl.load(lengths + row)
    kept = row * kept_row + head * kept_head
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((PADDED,), tl.float32)
    if HAS_NEW:
        new = row * new_row + head * new_head + d
        k = tl.load(new_k + new, mask=in_head, other=0.0)
        v = tl.load(new_v + new, mask=in_head, other=0.0)
        place = kept + length * kept_token + d
        tl.store(keys + place, k, mask=in_head)
        tl.store(values + place, v, mask=in_head)
        at_no_distance = tl.load(bias + head * bias_head + middle).to(tl.float32)
        most = tl.sum(q * k.to(tl.float32)) + at_no_distance
        total = tl.full((), 1.0, tl.float32)
        mixed = v.to(tl.float32)
    for first in range(0, length, KEYS):
        token = first + tl.arange(0, KEYS)
        is_kept = token < length
        places = kept + token[:, None] * kept_token + d[None, :]
        mask = is_kept[:, None] & in_head[None, :]
        k_block = tl.load(keys + places, mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(k_block * q[None, :], axis=1)
        if HAS_NEW:
            distance = middle + token - length
            scores += tl.load(bias + head * bias_head + distance, mask=is_kept, other=0.0).to(
                tl.float32
            )
        scores = tl.where(is_kept, scores, float("-inf"))
        now_most = tl.maximum(most, tl.max(scores))
        weights = tl.exp(scores - now_most)
        shrunk = tl.exp(most - now_most)
        v_block = tl.load(values + places, mask=mask, other=0.0).to(tl.float32)
        total = total * shrunk + tl.sum(weights)
        mixed = mixed * shrunk + tl.sum(v_block * weights[:, None], axis=0)
        most = now_most
    heads = tl.num_programs(1)
    out = result + (row * heads + head) * SIZE + d
    tl.store(out, (mixed / total).to(result.dtype.element_ty), mask=in_head)


class FusedNorm(nn.Module):
    """As Norm, with the addition before it in the same pass."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.weight, self._epsilon, self._dtype = norm.weight, norm.epsilon, norm.dtype
        self._norm = norm

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self._norm(x)
        return normed

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x + y, normed)"""
        x, y = x.contiguous(), y.contiguous()
        size = x.shape[-1]
        total, normed = torch.empty_like(x), torch.empty_like(x, dtype=self._dtype)
        _add_norm[(x.numel() // size,)](
            x, y, self.weight, total, normed, size, self._epsilon,
            BLOCK=triton.next_power_of_2(size),
        )  # fmt: skip
        return total, normed


@triton.jit
def _add_norm(x_of, y_of, weight, total, normed, size, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    d = tl.arange(0, BLOCK)
    inside = d < size
    x = tl.load(x_of + row + d, mask=inside, other=0.0)
    x += tl.load(y_of + row + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + row + d, x, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / size + epsilon)
    w = tl.load(weight + d, mask=inside, other=0.0)
    tl.store(normed + row + d, (x * scale * w).to(normed.dtype.element_ty), mask=inside)


class FusedGate(nn.Module):
    """gelu_new(gate) * up of [..., 2 * d_ff] in one pass, the result in ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, hidden: Tensor) -> Tensor:
        width = hidden.shape[-1] // 2
        shape = (*hidden.shape[:-1], width)
        result = torch.empty(shape, dtype=self._dtype, device=hidden.device)
        block = min(triton.next_power_of_2(width), _WIDEST_BLOCK)
        grid = (hidden.numel() // (2 * width), triton.cdiv(width, block))
        _gate[grid](hidden.contiguous(), result, width, BLOCK=block)
        return result


@triton.jit
def _gate(hidden, result, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    gate = tl.load(hidden + row * 2 * width + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * width + width + d, mask=inside, other=0.0).to(tl.float32)
    # tanh(x) = 1 - 2 / (exp(2x) + 1), whose exp may overflow to the right limit
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
    value = 0.5 * gate * (1.0 + tanh) * up
    tl.store(result + row * width + d, value.to(result.dtype.element_ty), mask=inside)


def int8_product(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """As Int8Linear: x [..., in] -> [..., out], the weights read in 8 bits."""
    outputs, inputs = values.shape
    flat = x.contiguous().view(-1, inputs)
    result = torch.empty(len(flat), outputs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(len(flat), _ROWS))
    _int8_product[grid](
        flat, values, scales, result, len(flat), inputs, outputs,
        ROWS=_ROWS, OUTPUTS=_OUTPUTS, INPUTS=_inputs_at_once(x.device),
    )  # fmt: skip
    return result.view(*x.shape[:-1], outputs)


def _inputs_at_once(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return _INPUTS_BEFORE_AMPERE
    return _INPUTS


@triton.jit(do_not_specialize=["rows"])  # a prompt's tokens, too, which are of any number
def _int8_product(
    x_of, values, scales, result, rows, inputs, outputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row, is_output = row < rows, output < outputs
    # a vocabulary by a model's width may be beyond 32 bits
    x_rows = x_of + row.to(tl.int64)[:, None] * inputs
    w_rows = values + output.to(tl.int64)[:, None] * inputs
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        k = first + tl.arange(0, INPUTS)
        is_input = (k < inputs)[None, :]
        x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & is_input, other=0.0)
        w = tl.load(w_rows + k[None, :], mask=is_output[:, None] & is_input, other=0)
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
    total *= tl.load(scales + output, mask=is_output, other=0.0)[None, :]
    places = result + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(places, total.to(result.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


def fuse(model: T5) -> Callable[[], None]:
    """Put the kernels into the decoder and the head of a model that is built. What is returned
    takes them out again."""
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(module: nn.Module, name: str, new: Any) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    for module in list(model.decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Norm):
                replace(module, name, FusedNorm(child))
        if isinstance(module, FeedForward) and module.is_gated_gelu:
            replace(module, "activation", FusedGate(module.hidden_dtype))
    for module in (*model.decoder.modules(), *model.lm_head.modules()):
        if isinstance(module, Int8Linear):
            replace(module, "few_rows", int8_product)

    def take_out() -> None:
        for place in replaced:
            setattr(*place)

    return take_out
