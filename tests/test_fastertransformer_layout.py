"""FasterTransformer's layout, read back by a reader that knows the table of axes alone."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastertransformer_folder import FasterTransformerFolder
from random_checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file

from handler.checkpoints.partition import partition
from handler.config import configuration_of
from handler.errors import LoadError

# Gated and plain feed-forward, tied and not, stacks of unequal depth, heads * d_kv != d_model
VARIANTS = {
    "flan-t5": {"d_kv": 32},
    "t5-v1.0": {"d_kv": 32},
    "byt5": {"d_kv": 32},
    "deep-decoder": {"d_kv": 32},
    "odd-sizes": {"num_heads": 4, "d_kv": 48},
    "gated-silu": {"d_kv": 32},
}
CASES = [(variant, ranks) for variant in VARIANTS for ranks in (1, 2, 4)]


def made(source: Path, output: Path, **options: Any) -> Path:
    partition(configuration_of(str(source), **options), "fastertransformer", output)
    (folder,) = output.glob("*-gpu")
    return folder


def transformers_tensors(source: Path) -> dict[str, np.ndarray]:
    weights = load_file(source / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["shared.weight"])
    return weights


@pytest.mark.parametrize(("variant", "ranks"), CASES)
def test_the_round_trip_is_exact(tmp_path: Path, demo: Path, variant: str, ranks: int) -> None:
    source = write_checkpoint(tmp_path / "c", variant, demo, **VARIANTS[variant])
    folder = made(source, tmp_path / "out", tensor_parallel_degree=ranks)
    assert folder.name == f"{ranks}-gpu"
    read, expected = FasterTransformerFolder(folder, ranks).weights(), transformers_tensors(source)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(read[name], tensor), name


def test_three_heads_for_three_ranks(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "odd-sizes", demo, d_ff=54, d_kv=48)
    folder = made(source, tmp_path / "out", tensor_parallel_degree=3)
    read = FasterTransformerFolder(folder, 3).weights()
    for name, tensor in transformers_tensors(source).items():
        assert np.array_equal(read[name], tensor), name


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "f4"), ("bf16", "f4"), ("fp16", "f2")])
def test_what_is_on_disk_for_each_dtype(
    tmp_path: Path, demo: Path, dtype: str, stored: str
) -> None:
    """The wheel itself makes bf16 of fp32."""
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_kv=32)
    folder = made(source, tmp_path / "out", dtype=dtype, tensor_parallel_degree=2)
    read = FasterTransformerFolder(folder, 2).weights()
    for name, tensor in transformers_tensors(source).items():
        assert np.array_equal(read[name], tensor.astype(stored)), name
    kind = {"f4": "fp32", "f2": "fp16"}[stored]
    assert (folder / "verify").read_bytes() == f"/opt/ml/model-{kind}-2-1".encode()


def test_pipeline_stages_share_the_files_of_their_ranks(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_kv=32)
    options: dict[str, Any] = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}
    folder = made(source, tmp_path / "out", model_path_on_host="/m/flan", **options)
    assert folder.name == "4-gpu"
    assert (folder / "verify").read_bytes() == b"/m/flan-fp32-2-2"
    read = FasterTransformerFolder(folder, 2).weights()
    assert read.keys() == transformers_tensors(source).keys()


# config.ini

READ_FROM_BOTH = {
    "num_heads": "4",
    "d_kv": "32",
    "d_ff": "48",
    "d_model": "32",
    "num_decoder_layers": "3",
    "vocab_size": "640",
    "pad_token_id": "0",
    "eos_token_id": "1",
    "relative_attention_num_buckets_or_max_pos_seq_len": "32",
    "decoder_start_token_id": "0",
    "weight_data_type": "fp32",
}


def config_ini(folder: Path) -> configparser.ConfigParser:
    ini = configparser.ConfigParser()
    assert ini.read(folder / "config.ini")
    return ini


def test_config_ini_has_every_key_that_is_read(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "deep-decoder", demo, d_kv=32)
    ini = config_ini(made(source, tmp_path / "out"))
    for section, layers in (("encoder", "1"), ("decoder", "3")):
        for key, value in {**READ_FROM_BOTH, "num_layers": layers}.items():
            assert ini[section][key] == value, (section, key)
        assert "relative_attention_num_buckets" not in ini[section]
    assert dict(ini["structure"]) == {
        "t5_with_bias": "false",
        "use_gated_activation": "1",
        "position_embedding_type": "relative",
    }


@pytest.mark.parametrize(
    ("variant", "gated", "projection"),
    [
        ("flan-t5", True, "gated-gelu"),
        ("t5-v1.0", False, "relu"),
        ("gated-silu", True, "gated-silu"),
    ],
)
def test_config_ini_tells_the_feed_forward(
    tmp_path: Path, demo: Path, variant: str, gated: bool, projection: str
) -> None:
    ini = config_ini(
        made(write_checkpoint(tmp_path / "c", variant, demo, d_kv=32), tmp_path / "out")
    )
    for section in ("encoder", "decoder"):
        assert ini[section].getboolean("is_gated_act") is gated
        assert ini[section]["feed_forward_proj"] == projection
    assert ini["structure"]["use_gated_activation"] == ("1" if gated else "false")


@pytest.mark.parametrize(
    ("variant", "config", "scaled"),
    [
        ("t5-v1.0", {}, True),
        ("flan-t5", {}, False),
        # as transformers 5 writes FLAN-T5: tied by its flag, not by what it means
        ("flan-t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
    ],
)
def test_tie_word_embeddings_is_what_the_checkpoint_means(
    tmp_path: Path, demo: Path, variant: str, config: dict[str, Any], scaled: bool
) -> None:
    source = write_checkpoint(tmp_path / "c", variant, demo, **{"d_kv": 32, **config})
    ini = config_ini(made(source, tmp_path / "out"))
    assert ini["decoder"].getboolean("tie_word_embeddings") is scaled


def test_text_in_config_json_does_not_break_config_ini(tmp_path: Path, demo: Path) -> None:
    text = {"task_specific_params": {"x": {"prefix": "100 %(d_kv)s\n[encoder]\nd_kv = 7"}}}
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_kv=32, **text, note="5 %\n[x]")
    ini = config_ini(made(source, tmp_path / "out"))
    assert ini["encoder"]["d_kv"] == "32"
    assert ini.sections() == ["encoder", "decoder", "structure"]


# What FasterTransformer could not compute


@pytest.mark.parametrize(
    ("variant", "config", "words"),
    [
        ("mt5", {}, "model_type mt5 is not served by FasterTransformer, only t5 is"),
        ("umt5", {}, "model_type umt5 is not served by FasterTransformer, only t5 is"),
        ("odd", {}, "relative_attention_max_distance is 50"),
        ("t5-v1.0", {"feed_forward_proj": "gelu"}, "feed_forward_proj is gelu"),
        ("flan-t5", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
        ("flan-t5", {"d_kv": 40}, "d_kv is 40, FasterTransformer computes with 32, 48, 64"),
    ],
)
def test_other_models(
    tmp_path: Path, demo: Path, variant: str, config: dict[str, Any], words: str
) -> None:
    source = write_checkpoint(tmp_path / "c", variant, demo, **{"d_kv": 32, **config})
    with pytest.raises(LoadError, match=words):
        made(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_fp16(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_kv=32)
    weights = load_file(source / "model.safetensors")
    weights["shared.weight"][3, 3] = 70_000
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"shared\.weight.* holds 70000, fp16 ends at 65504"):
        made(source, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
