"""config.json as the network's shape, and relative positions as transformers counts them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import MT5Config, T5Config, UMT5Config
from transformers.models.t5.modeling_t5 import T5Attention

from handler.checkpoints.architecture import T5Architecture, relative_position_bucket
from handler.errors import LoadError

CONFIGS = {"t5": T5Config, "mt5": MT5Config, "umt5": UMT5Config}
NAMES_THAT_DIFFER = {
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "epsilon": "layer_norm_epsilon",
    "gated": "is_gated_act",
    "activation": "dense_act_fn",
}
SHAPE = (
    "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads num_buckets max_distance "
    "epsilon gated activation"
).split()


def architecture(**config: Any) -> T5Architecture:
    return T5Architecture.from_config({"model_type": "t5", **config})


# Buckets


@given(
    num_buckets=st.integers(4, 130),
    beyond=st.integers(1, 1000),
    bidirectional=st.booleans(),
    first=st.integers(-3000, 2500),
)
# where the order of the float32 operations decides
@example(num_buckets=9, beyond=124, bidirectional=False, first=-200)
@example(num_buckets=18, beyond=119, bidirectional=True, first=-200)
def test_buckets_are_those_of_transformers(
    num_buckets: int, beyond: int, bidirectional: bool, first: int
) -> None:
    max_distance = num_buckets // 2 + beyond
    distance = np.arange(first, first + 500)
    ours = relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    theirs = T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional, num_buckets, max_distance
    )
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_bucket_is_used_and_no_other(bidirectional: bool) -> None:
    buckets = relative_position_bucket(
        np.arange(-200, 201), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    # no key is at distance 0 and to the right at the same time
    unused = {16} if bidirectional else set()
    assert set(buckets.tolist()) == set(range(32)) - unused


# config.json


@pytest.mark.parametrize("model_type", CONFIGS)
def test_absent_keys_have_transformers_defaults(model_type: str) -> None:
    ours, theirs = T5Architecture.from_config({"model_type": model_type}), CONFIGS[model_type]()
    for name in SHAPE:
        assert getattr(ours, name) == getattr(theirs, NAMES_THAT_DIFFER.get(name, name)), name


def test_null_is_absent() -> None:
    keys = ("num_decoder_layers", "layer_norm_epsilon", "decoder_start_token_id", "num_heads")
    nulls = {**dict.fromkeys(keys), "feed_forward_proj": None, "tie_word_embeddings": None}
    assert architecture(**nulls) == architecture()


def test_the_decoder_is_as_deep_as_the_encoder_unless_told() -> None:
    assert architecture(num_layers=4).num_decoder_layers == 4
    assert architecture(num_layers=4, num_decoder_layers=2).num_decoder_layers == 2


@pytest.mark.parametrize(
    ("name", "gated", "activation"),
    [
        ("relu", False, "relu"),
        ("gated-gelu", True, "gelu_new"),
        ("gated-silu", True, "silu"),
        ("gelu", False, "gelu"),
        ("gated-relu", True, "relu"),
    ],
)
def test_feed_forward(name: str, gated: bool, activation: str) -> None:
    read, theirs = architecture(feed_forward_proj=name), T5Config(feed_forward_proj=name)
    assert (read.gated, read.activation) == (gated, activation)
    assert (theirs.is_gated_act, theirs.dense_act_fn) == (gated, activation)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": True}, True),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": None}, False),
        ({"model_type": "umt5", "tie_word_embeddings": False}, False),
        ({"model_type": "mt5", "tie_word_embeddings": False}, False),
        # as transformers 5 saves every mT5, whose logits it never scales
        ({"model_type": "mt5", "tie_word_embeddings": True}, False),
    ],
)
def test_only_original_t5_scales_its_logits(config: dict[str, Any], scales: bool) -> None:
    assert architecture(**config).scale_logits is scales


def test_only_umt5_has_a_bias_table_in_every_layer() -> None:
    every = {kind: architecture(model_type=kind).bias_in_every_layer for kind in CONFIGS}
    assert every == {"t5": False, "mt5": False, "umt5": True}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bart"}, "'bart' is not of the T5 family .*backend=transformers"),
        ({"d_model": 0}, "d_model must be an integer from 1 to .*, got 0"),
        ({"num_heads": 6.5}, "num_heads must be an integer from 1 to .*, got 6.5"),
        ({"num_layers": True}, "num_layers must be .* got True"),
        ({"vocab_size": "640"}, "vocab_size must be .* got '640'"),
        ({"feed_forward_proj": "gated-swoosh"}, "feed_forward_proj 'gated-swoosh' .* relu, gelu"),
        ({"feed_forward_proj": "gelu-gated"}, "feed_forward_proj 'gelu-gated' is not known"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be .* got 'small'"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon must be .* got -1e-06"),
        ({"decoder_start_token_id": "<pad>"}, "decoder_start_token_id must be .* got '<pad>'"),
        ({"decoder_start_token_id": 32128}, "decoder_start_token_id must be .* 32127, got 32128"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id must be .* got -1"),
        (
            {"relative_attention_num_buckets": 3},
            "relative_attention_num_buckets must be .* from 4 .* got 3",
        ),
        (
            {"relative_attention_max_distance": 16},
            "relative_attention_max_distance must be an integer from 17 .* got 16",
        ),
    ],
    ids=str,
)
def test_what_no_network_has(config: dict[str, Any], words: str) -> None:
    with pytest.raises(LoadError, match=f"^config.json: .*{words}"):
        architecture(**config)
