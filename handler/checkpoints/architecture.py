"""What a T5 checkpoint's config.json says of the network, and the family's relative positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.errors import LoadError

T5_FAMILY = ("t5", "mt5", "umt5")

# transformers' names of activations
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")

# What transformers takes for keys that config.json does not have.
_T5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "decoder_start_token_id": 0,
}
_MT5_DEFAULTS: dict[str, Any] = {
    **_T5_DEFAULTS,
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
# With fewer, attention that looks both ways has no bucket for a distance of its own.
_FEWEST_BUCKETS = 4


@dataclass(frozen=True)
class T5Architecture:
    """The shape of one network of the T5 family.

    The width inside attention is num_heads * d_kv, which need not be d_model. bias_in_every_layer:
    umT5 has a table of relative positions in each layer, the others one a stack, in its first
    layer. scale_logits: original T5 multiplies the last hidden state by d_model**-0.5. tied: the
    head may be the embedding; a checkpoint that says otherwise must have lm_head.weight.
    """

    model_type: str
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    gated: bool
    activation: str
    num_buckets: int
    max_distance: int
    epsilon: float
    scale_logits: bool
    tied: bool
    bias_in_every_layer: bool
    decoder_start_token_id: int

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> T5Architecture:
        """Read config.json's own keys, with transformers' defaults where they are absent.

        Raises LoadError naming the key.
        """
        if config["model_type"] not in T5_FAMILY:
            raise LoadError(
                f"config.json: model_type {config['model_type']!r} is not of the T5 family "
                f"({', '.join(T5_FAMILY)}); set option.backend=transformers"
            )
        defaults = _T5_DEFAULTS if config["model_type"] == "t5" else _MT5_DEFAULTS
        told = {**defaults, **{k: v for k, v in config.items() if v is not None}}
        told.setdefault("num_decoder_layers", told["num_layers"])
        gated, activation = _feed_forward(str(told["feed_forward_proj"]))
        vocabulary = _integer(told, "vocab_size")
        buckets = _integer(told, "relative_attention_num_buckets", _FEWEST_BUCKETS)
        return T5Architecture(
            model_type=told["model_type"],
            vocab_size=vocabulary,
            d_model=_integer(told, "d_model"),
            d_kv=_integer(told, "d_kv"),
            d_ff=_integer(told, "d_ff"),
            num_layers=_integer(told, "num_layers"),
            num_decoder_layers=_integer(told, "num_decoder_layers"),
            num_heads=_integer(told, "num_heads"),
            gated=gated,
            activation=activation,
            num_buckets=buckets,
            # distances beyond half of the buckets are on a logarithmic scale up to it
            max_distance=_integer(told, "relative_attention_max_distance", buckets // 2 + 1),
            epsilon=_epsilon(told["layer_norm_epsilon"]),
            scale_logits=_scales_logits(told),
            tied=told.get("tie_word_embeddings") is not False,
            bias_in_every_layer=told["model_type"] == "umt5",
            decoder_start_token_id=_integer(told, "decoder_start_token_id", 0, vocabulary - 1),
        )


def _integer(config: Mapping[str, Any], key: str, lowest: int = 1, highest: int = 2**31 - 1) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise LoadError(
            f"config.json: {key} must be an integer from {lowest} to {highest}, got {value!r}"
        )
    return value


def _epsilon(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise LoadError(
            f"config.json: layer_norm_epsilon must be a number from 0 to 1, got {value!r}"
        )
    return float(value)


def _feed_forward(name: str) -> tuple[bool, str]:
    gated, activation = name.startswith("gated-"), name.removeprefix("gated-")
    if name == "gated-gelu":  # T5 means the tanh one
        activation = "gelu_new"
    if activation not in ACTIVATIONS:
        raise LoadError(
            f"config.json: feed_forward_proj {name!r} is not known, allowed are "
            f"{', '.join(ACTIVATIONS)}, each also as gated-..."
        )
    return gated, activation


def _scales_logits(config: Mapping[str, Any]) -> bool:
    if config["model_type"] == "mt5":  # each one is T5 1.1, whatever transformers 5 wrote
        return False
    # transformers 5 writes tie_word_embeddings=true for every T5 and keeps what it meant here
    scale = config.get("scale_decoder_outputs")
    return bool(config.get("tie_word_embeddings", True) if scale is None else scale)


def relative_position_bucket(
    distance: npt.NDArray[np.int64], *, bidirectional: bool, num_buckets: int, max_distance: int
) -> npt.NDArray[np.int64]:
    """The bucket of each distance (key position minus query position).

    Source: T5's relative attention (Raffel et al. 2020) as mesh-tensorflow and transformers write
    it: half of the buckets hold one distance each, the others grow logarithmically up to
    max_distance; where attention looks both ways, keys to the right have buckets of their own.
    """
    first = np.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = num_buckets // 2
    # float32 in this order: the last bit decides which bucket a border distance is in
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + steps.astype(np.int64), num_buckets - 1)
    buckets: npt.NDArray[np.int64] = first + np.where(distance < exact, distance, far)
    return buckets
