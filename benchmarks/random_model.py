"""Write checkpoints in FLAN-T5's shapes with random weights: speed does not depend on the values.

The layout is the published one: T5 1.1 with gated-gelu and its own lm_head, 32128 rows of
vocabulary for 32100 tokens. A token is a word, w3 to w32099, so a prompt of N words has N tokens
and a closing </s>. Needs numpy, safetensors and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[np.float32]

SHAPES = {
    "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
CACHE = Path(__file__).resolve().parents[1] / "build" / "bench"
FIRST_WORD, TOKENS, VOCABULARY = 3, 32100, 32128
_BUCKETS = 32


def checkpoint(shape: str, cache: Path = CACHE) -> Path:
    """The folder of this shape's checkpoint; written when it is not there yet."""
    folder = cache / f"flan-t5-{shape}-random"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
    try:
        write(aside, shape)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def write(folder: Path, shape: str, seed: int = 0) -> None:
    """config.json, model.safetensors and tokenizer.json."""
    config = config_of(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})


def config_of(shape: str) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **SHAPES[shape],
        "num_decoder_layers": SHAPES[shape]["num_layers"],
        "vocab_size": VOCABULARY,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": True,
        "relative_attention_num_buckets": _BUCKETS,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "n_positions": 512,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.30.0",
    }


def _tokenizer() -> dict[str, Any]:
    """tokenizer.json: one token a word, </s> at the end of a text."""
    special = ["<pad>", "</s>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(FIRST_WORD, TOKENS))]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    closing = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, token in enumerate(special)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, closing],
            "pair": [text, closing],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }


def _weights(config: dict[str, Any], seed: int) -> dict[str, Array]:
    """Normal numbers of a size at which the values keep theirs from layer to layer."""
    random = np.random.default_rng(seed)
    d, ff = config["d_model"], config["d_ff"]
    inner = config["num_heads"] * config["d_kv"]

    def normal(rows: int, columns: int, scale: float = 1.0) -> Array:
        values: Array = random.standard_normal((rows, columns), np.float32) * np.float32(scale)
        return values

    def attention(place: str) -> dict[str, Array]:
        qkv = {f"{place}.{name}.weight": normal(inner, d, d**-0.5) for name in "qkv"}
        return {**qkv, f"{place}.o.weight": normal(d, inner, inner**-0.5)}

    def feed_forward(place: str) -> dict[str, Array]:
        wi = {f"{place}.wi_{i}.weight": normal(ff, d, d**-0.5) for i in (0, 1)}
        return {**wi, f"{place}.wo.weight": normal(d, ff, ff**-0.5)}

    weights = {
        "shared.weight": normal(VOCABULARY, d),
        "lm_head.weight": normal(VOCABULARY, d, d**-0.5),
    }
    for stack, kinds in (
        ("encoder", ("SelfAttention", "DenseReluDense")),
        ("decoder", ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    ):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[bias] = normal(_BUCKETS, config["num_heads"])
        for i in range(config["num_layers"]):
            for k, kind in enumerate(kinds):
                place = f"{stack}.block.{i}.layer.{k}"
                make = feed_forward if kind == "DenseReluDense" else attention
                weights |= make(f"{place}.{kind}")
                weights[f"{place}.layer_norm.weight"] = np.ones(d, np.float32)
        weights[f"{stack}.final_layer_norm.weight"] = np.ones(d, np.float32)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES)
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder (default: build/bench)")
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        folder = checkpoint(shape, arguments.cache)
        size = (folder / "model.safetensors").stat().st_size
        print(f"{folder}: {size / 4e6:.0f} M weights, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
