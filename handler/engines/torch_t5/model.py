"""T5 in PyTorch, as the paper draws it (Raffel et al. 2020): an encoder, a decoder, a head.

In shapes: t tokens of packed prompts, s of one prompt, n rows that decode, q tokens of each, d is
d_model. What passes from layer to layer is fp32 whatever the weights are: it leaves fp16's range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.checkpoints.architecture import T5Architecture

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class DecoderMemory(Protocol):
    """What the rows of one decoding step attend to. See kv_cache.py."""

    def own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v and attend to the row's tokens: [n, q, heads, d_kv], each and the result."""

    def cross(self, layer: int, q: Tensor) -> Tensor:
        """Attend to the row's prompt: [n, q, heads, d_kv], and the result."""


class T5(nn.Module):
    """dtype: of the weights of products and of what they read; norms and biases are in fp32."""

    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embedding: nn.Module = _Embedding(a.vocab_size, a.d_model, dtype=dtype)
        self.encoder = Encoder(a, dtype)
        self.decoder = Decoder(a, dtype)
        self.lm_head = _linear(a.d_model, a.vocab_size, dtype)
        self._logit_scale = a.d_model**-0.5 if a.scale_logits else 1.0

    def encode(
        self, ids: Tensor, lengths: Sequence[int], biases: Iterable[Tensor]
    ) -> Iterator[Tensor | None]:
        """ids [t] of prompts one behind the other -> None after each layer, at the end [t, d].

        biases: of each layer the relative biases of the longest prompt, [heads, s, s].
        """
        yield from self.encoder(self.embedding(ids).float(), lengths, biases)

    def cross_keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """[t, d] -> [2, heads, t, d_kv] of each decoder layer."""
        for layer in self.decoder.layers:
            yield cast(DecoderLayer, layer).cross_attention.keys_values(encoded)

    def decode(self, tokens: Tensor, memory: DecoderMemory) -> Tensor:
        """tokens [n, q] -> logits [n, q, vocabulary] in fp32"""
        x = self.decoder(self.embedding(tokens).float(), memory)
        logits: Tensor = self.lm_head(x * self._logit_scale)
        return logits.float()


class Encoder(nn.Module):
    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(a, dtype) for _ in range(a.num_layers))
        self.norm = Norm(a, dtype)
        self.relative_bias = _relative_bias(a, a.num_layers)

    def forward(
        self, x: Tensor, lengths: Sequence[int], biases: Iterable[Tensor]
    ) -> Iterator[Tensor | None]:
        for layer, bias in zip(self.layers, biases):
            x = layer(x, lengths, bias)
            yield None
        yield self.norm(x)


class EncoderLayer(nn.Module):
    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = Norm(a, dtype)
        self.attention = EncoderAttention(a, dtype)
        self.feed_forward_norm = Norm(a, dtype)
        self.feed_forward = FeedForward(a, dtype)

    def forward(self, x: Tensor, lengths: Sequence[int], bias: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), lengths, bias)
        return x + cast(Tensor, self.feed_forward(self.feed_forward_norm(x)))


class EncoderAttention(nn.Module):
    """Every prompt attends to itself alone, over its true length."""

    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self._shape = (-1, 3, a.num_heads, a.d_kv)
        self.qkv = _linear(a.d_model, 3 * a.num_heads * a.d_kv, dtype)
        self.o = _linear(a.num_heads * a.d_kv, a.d_model, dtype)

    def forward(self, x: Tensor, lengths: Sequence[int], bias: Tensor) -> Tensor:
        attended = []
        for part in torch.split(self.qkv(x).view(self._shape), list(lengths)):
            q, k, v = part.permute(1, 2, 0, 3)[:, None]  # [1, heads, s, d_kv] each
            mask = bias[None, :, : len(part), : len(part)]
            attended.append(attention(q, k, v, mask)[0].transpose(0, 1))
        return cast(Tensor, self.o(torch.cat(attended).flatten(1)))


class Decoder(nn.Module):
    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(a, dtype, i) for i in range(a.num_decoder_layers))
        self.norm = Norm(a, dtype)
        self.relative_bias = _relative_bias(a, a.num_decoder_layers)

    def forward(self, x: Tensor, memory: DecoderMemory) -> Tensor:
        layers = [cast(DecoderLayer, layer) for layer in self.layers]
        following = [*(layer.self_attention_norm for layer in layers[1:]), self.norm]
        normed = layers[0].self_attention_norm(x)
        for layer, next_norm in zip(layers, following):
            x, normed = layer(x, normed, memory, next_norm)
        return cast(Tensor, normed)


class DecoderLayer(nn.Module):
    def __init__(self, a: T5Architecture, dtype: torch.dtype, index: int) -> None:
        super().__init__()
        self.self_attention_norm = Norm(a, dtype)
        self.self_attention = SelfAttention(a, dtype, index)
        self.cross_attention_norm = Norm(a, dtype)
        self.cross_attention = CrossAttention(a, dtype, index)
        self.feed_forward_norm = Norm(a, dtype)
        self.feed_forward = FeedForward(a, dtype)

    def forward(
        self, x: Tensor, normed: Tensor, memory: DecoderMemory, next_norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """x [n, q, d] and what this layer's first norm makes of it -> the same for the next layer:
        every norm follows an addition, and a kernel may do both at once."""
        x, normed = self.cross_attention_norm.add(x, self.self_attention(normed, memory))
        x, normed = self.feed_forward_norm.add(x, self.cross_attention(normed, memory))
        return next_norm.add(x, self.feed_forward(normed))


class SelfAttention(nn.Module):
    def __init__(self, a: T5Architecture, dtype: torch.dtype, layer: int) -> None:
        super().__init__()
        self._layer, self._shape = layer, (3, a.num_heads, a.d_kv)
        self.qkv = _linear(a.d_model, 3 * a.num_heads * a.d_kv, dtype)
        self.o = _linear(a.num_heads * a.d_kv, a.d_model, dtype)

    def forward(self, x: Tensor, memory: DecoderMemory) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self._shape).unbind(2)
        return cast(Tensor, self.o(memory.own(self._layer, q, k, v).flatten(2)))


class CrossAttention(nn.Module):
    """The keys and values of a prompt are made once, when it was encoded."""

    def __init__(self, a: T5Architecture, dtype: torch.dtype, layer: int) -> None:
        super().__init__()
        self._layer, self._shape = layer, (a.num_heads, a.d_kv)
        self.q = _linear(a.d_model, a.num_heads * a.d_kv, dtype)
        self.kv = _linear(a.d_model, 2 * a.num_heads * a.d_kv, dtype)
        self.o = _linear(a.num_heads * a.d_kv, a.d_model, dtype)

    def keys_values(self, encoded: Tensor) -> Tensor:
        """[t, d] -> [2, heads, t, d_kv]"""
        keys_values: Tensor = self.kv(encoded).unflatten(-1, (2, *self._shape))
        return keys_values.permute(1, 2, 0, 3)

    def forward(self, x: Tensor, memory: DecoderMemory) -> Tensor:
        q = self.q(x).unflatten(-1, self._shape)
        return cast(Tensor, self.o(memory.cross(self._layer, q).flatten(2)))


class FeedForward(nn.Module):
    """wo(act(wi_0 x) * wi_1 x), or wo(act(wi x)); wi_0 and wi_1 are one product.

    In fp16 what wo reads leaves its range on large models: it is made in fp32 there, and wo is
    what quantize.py puts in its place.
    """

    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_dtype = torch.float32 if dtype == torch.float16 else dtype
        self.is_gated_gelu = a.gated and a.activation == "gelu_new"
        self.wi = _linear(a.d_model, (2 if a.gated else 1) * a.d_ff, dtype)
        self.activation: nn.Module = Activation(a, self.hidden_dtype)
        self.wo = _linear(a.d_ff, a.d_model, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.wo(self.activation(self.wi(x))))


class Activation(nn.Module):
    """[..., 2 * d_ff] -> act(first half) * second half in ``dtype``; not gated: act([..., d_ff])"""

    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self._gated, self._function, self._dtype = a.gated, _ACTIVATIONS[a.activation], dtype

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self._dtype)
        if not self._gated:
            return self._function(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self._function(gate) * up


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) in fp32: no mean, no bias. [..., d] -> the same in dtype"""

    def __init__(self, a: T5Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(a.d_model))
        self.epsilon, self.dtype = a.epsilon, dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.epsilon).to(self.dtype)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x + y, its norm)"""
        x = x + y
        return x, self(x)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[n, heads, q, d_kv] over [n, heads, k, d_kv]; T5 does not divide by the root of d_kv."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
    """A product without bias. A Module, since other forms of weights take its place."""
    return _Linear(inputs, outputs, bias=False, dtype=dtype)


class _Unset:
    """Weights that a checkpoint fills. To initialize them where there is no memory yet (device
    meta), torch would import its compiler: seconds of a start, and 170 MB in each process."""

    def reset_parameters(self) -> None:
        pass


class _Linear(_Unset, nn.Linear):
    pass


class _Embedding(_Unset, nn.Embedding):
    pass


def _relative_bias(a: T5Architecture, layers: int) -> nn.Parameter:
    """[tables, buckets, heads]: umT5 has a table in each layer, the others share one."""
    tables = layers if a.bias_in_every_layer else 1
    return nn.Parameter(torch.empty(tables, a.num_buckets, a.num_heads))
