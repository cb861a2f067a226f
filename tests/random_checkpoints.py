"""Checkpoints with random weights in the forms of the T5 family, with the demo's tokenizer.

Wide weights: with the library's own initialization every prompt gives the same token for ever.
``</s>`` is likelier than the rest, so that texts of different lengths meet in a batch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

VOCAB_SIZE = 640
BYTES_VOCAB_SIZE = 384

_COMMON: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "t5-v1.0": {
        "model_type": "t5",
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
    "flan-t5": {"model_type": "t5"},
    "mt5": {"model_type": "mt5"},
    "umt5": {"model_type": "umt5"},
    "byt5": {
        "model_type": "t5",
        "num_layers": 4,
        "num_decoder_layers": 2,
        "vocab_size": BYTES_VOCAB_SIZE,
    },
    "deep-decoder": {"model_type": "t5", "num_layers": 1, "num_decoder_layers": 3},
    "odd": {
        "model_type": "t5",
        "num_heads": 3,
        "relative_attention_num_buckets": 20,
        "relative_attention_max_distance": 50,
    },
}


# What an engine that builds its own graphs could get wrong besides.
EDGE_VARIANTS: dict[str, dict[str, Any]] = {
    "odd-sizes": {"model_type": "t5", "d_model": 40, "d_kv": 12, "d_ff": 52, "num_heads": 3},
    "gated-silu": {"model_type": "t5", "feed_forward_proj": "gated-silu"},
}


def write_checkpoint(
    folder: Path, variant: str, tokenizer_from: Path, seed: int = 0, **changes: Any
) -> Path:
    """Write the variant's config.json, model.safetensors and tokenizer into ``folder``.

    ``changes`` are keys of config.json that differ from the variant's.
    """
    config = {**_COMMON, **{**VARIANTS, **EDGE_VARIANTS}[variant], **changes}
    config.setdefault("num_decoder_layers", config["num_layers"])
    architecture = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[config["model_type"]]
    config["architectures"] = [f"{architecture}ForConditionalGeneration"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    if variant == "byt5":
        settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json"):
            if (tokenizer_from / name).exists():
                shutil.copy(tokenizer_from / name, folder)
    return folder


def in_shards(folder: Path) -> None:
    """Put the checkpoint's weights into two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for number in (0, 1):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        part = {name: weights[name] for name in names[number::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def wide(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (random.standard_normal(shape) * scale * shape[-1] ** -0.5).astype(np.float32)

    d, ff, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]
    gated = config["feed_forward_proj"].startswith("gated")

    def norm() -> np.ndarray:
        return (1 + 0.1 * random.standard_normal(d)).astype(np.float32)

    def attention(place: str) -> dict[str, np.ndarray]:
        shapes = {"q": (inner, d), "k": (inner, d), "v": (inner, d), "o": (d, inner)}
        return {f"{place}.{name}.weight": wide(*shape) for name, shape in shapes.items()}

    tied = config["tie_word_embeddings"]
    # tied and of full size, a token's own embedding would outweigh the layers: it repeats itself
    weights = {"shared.weight": wide(config["vocab_size"], d, scale=(0.1 if tied else 1) * d**0.5)}
    if not tied:
        weights["lm_head.weight"] = wide(config["vocab_size"], d, scale=4.0)
    weights["shared.weight" if tied else "lm_head.weight"][config["eos_token_id"]] *= 2
    for stack, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        for i in range(config[layers]):
            place = f"{stack}.block.{i}.layer"
            weights |= attention(f"{place}.0.SelfAttention")
            weights[f"{place}.0.layer_norm.weight"] = norm()
            if i == 0 or config["model_type"] == "umt5":
                name = f"{place}.0.SelfAttention.relative_attention_bias.weight"
                buckets = config["relative_attention_num_buckets"]
                weights[name] = wide(buckets, heads, scale=2.0)
            last = 1
            if stack == "decoder":
                weights |= attention(f"{place}.1.EncDecAttention")
                weights[f"{place}.1.layer_norm.weight"] = norm()
                last = 2
            for name in ("wi_0", "wi_1") if gated else ("wi",):
                weights[f"{place}.{last}.DenseReluDense.{name}.weight"] = wide(ff, d)
            weights[f"{place}.{last}.DenseReluDense.wo.weight"] = wide(d, ff)
            weights[f"{place}.{last}.layer_norm.weight"] = norm()
        weights[f"{stack}.final_layer_norm.weight"] = norm()
    return weights
