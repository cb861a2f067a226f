"""A partitioned folder at load: made for something else, it is refused with both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from random_checkpoints import write_checkpoint

from handler.checkpoints.partition import partition
from handler.checkpoints.partitioned import as_partitioned
from handler.config import configuration_of
from handler.engines import choose_backend
from handler.errors import LoadError


@pytest.fixture
def make(tmp_path: Path, demo: Path) -> Callable[..., Path]:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_kv=32)

    def made(layout: str, **options: Any) -> Path:
        partition(configuration_of(str(source), **options), layout, tmp_path / "out")
        return tmp_path / "out"

    return made


def chosen(folder: Path, **options: Any) -> str:
    return choose_backend(configuration_of(str(folder), **options), folder)[0]


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        chosen(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "int8"}, {"tensor_parallel_degree": "max"}, {"backend": "onnxruntime"}],
    ids=str,
)
def test_what_it_was_made_for(make: Callable[..., Path], options: dict[str, Any]) -> None:
    assert chosen(make("native", dtype="int8"), **options) == "onnxruntime"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "fp32"}, "was partitioned for dtype=int8, option.dtype=fp32; set option.dtype"),
        ({"tensor_parallel_degree": 2}, "for tensor_parallel_degree=1, option.tensor_parallel_deg"),
        ({"pipeline_parallel_degree": 2}, "for pipeline_parallel_degree=1, option.pipeline_par"),
        ({"backend": "transformers"}, "for backend onnxruntime or torch, option.backend=transf"),
        ({"merge_adapter": "a"}, "option.merge_adapter=a cannot be merged into"),
    ],
)
def test_another_configuration(
    make: Callable[..., Path], options: dict[str, Any], words: str
) -> None:
    assert words in refused(make("native", dtype="int8"), **options)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("d_model", 40, "from a model with d_model=32, its config.json says 40"),
        ("model_type", "mt5", "model_type='t5', its config.json says 'mt5'"),
        ("feed_forward_proj", "gated-relu", "activation='gelu_new', its config.json says 'relu'"),
    ],
)
def test_another_model(make: Callable[..., Path], key: str, value: Any, words: str) -> None:
    folder = make("native")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    assert words in refused(folder)


@pytest.mark.parametrize(
    ("dtype", "degree", "expected"),
    [
        ("fp32", 1, ["onnxruntime", "torch"]),
        ("int8", 1, ["onnxruntime", "torch"]),
        ("bf16", 1, ["torch"]),
        ("fp16", 1, ["torch"]),
        ("fp32", 2, ["torch"]),
    ],
)
def test_which_engines_read_it(
    make: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    degree: int,
    expected: list[str],
) -> None:
    """On a GPU it is torch."""
    folder = make("native", dtype=dtype, tensor_parallel_degree=degree)
    of_degree: dict[str, Any] = {"tensor_parallel_degree": degree}
    assert chosen(folder, **of_degree) == expected[0]
    for backend in expected:
        assert chosen(folder, backend=backend, **of_degree) == backend
    if expected == ["torch"]:
        assert "for backend torch," in refused(folder, backend="onnxruntime", **of_degree)
    monkeypatch.setattr("handler.engines.gpu_is_there", lambda: True)
    assert chosen(folder, **of_degree) == "torch"
    assert chosen(folder, device_id=-1, **of_degree) == expected[0]


def test_auto_and_max_are_what_it_was_made_for(make: Callable[..., Path]) -> None:
    """Whatever an engine would take them for elsewhere."""
    folder = make("fastertransformer", dtype="bf16", tensor_parallel_degree=2)
    asked = configuration_of(str(folder), tensor_parallel_degree="max")
    told = as_partitioned(asked, folder)
    assert (told.dtype, told.tensor_parallel_degree) == ("bf16", 2)
    source = folder.parent / "c"
    assert as_partitioned(asked, source) == asked


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["config.json"]},
        {"files": None},
        {"files": {"config.json": 5}},
        {"files": {"config.json": [5]}},
        {"files": {"config.json": ["5", None]}},
        {"architecture": []},
        {"architecture": None},
        {"tensor_parallel_degree": "1"},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_partition_json_with_other_values(
    make: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = make("native")
    told = json.loads((folder / "partition.json").read_text())
    (folder / "partition.json").write_text(json.dumps({**told, **changes}))
    assert "partition.json is damaged" in refused(folder)


def test_another_place(make: Callable[..., Path]) -> None:
    """Loaded from there, the wheel would delete its files."""
    words = refused(make("fastertransformer"), backend="fastertransformer")
    assert "to be served from /opt/ml/model" in words


def test_fastertransformers_files_for_another_engine(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make("fastertransformer", model_path_on_host=str(tmp_path / "out"))
    assert "for backend fastertransformer, option.backend=onnxruntime" in refused(
        folder, backend="onnxruntime"
    )


def test_an_incomplete_copy_of_fastertransformers_files(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make("fastertransformer", model_path_on_host=str(tmp_path / "out"))
    (folder / "1-gpu" / "lm_head.weight.bin").unlink()
    words = "1-gpu/lm_head.weight.bin is missing: copy the partitioned folder again"
    assert words in refused(folder, backend="fastertransformer")


def test_incomplete_copies(make: Callable[..., Path]) -> None:
    folder = make("native")
    weights = folder / "rank-0-of-1.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes, not {len(data)}" in refused(folder)
    weights.unlink()
    assert "rank-0-of-1.safetensors is missing: copy the partitioned folder again" in refused(
        folder
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format_version": 99}', "is of format version 99, this handler (0.1.0) reads 1"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 1}', "is damaged"),
        ('{"format_version": 1, "colour": "red"}', "is damaged"),
    ],
)
def test_a_damaged_or_newer_partition_json(
    make: Callable[..., Path], text: str, words: str
) -> None:
    folder = make("native")
    (folder / "partition.json").write_text(text)
    assert words in refused(folder)
