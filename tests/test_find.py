"""Where a checkpoint is found: in a folder, beside the model folder, by s3url."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from handler.checkpoints.find import find_adapter, find_checkpoint, model_config
from handler.config import read_configuration
from handler.errors import LoadError


def find(**properties: str) -> Path:
    return find_checkpoint(read_configuration(properties=properties))


def write_files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text('{"model_type": "t5"}')
    return folder


# Folders


def test_the_model_folder_itself(tmp_path: Path) -> None:
    write_files(tmp_path, "config.json")
    assert find(model_dir=str(tmp_path)) == tmp_path


def test_a_folder_by_its_path(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "weights", "config.json")
    assert find(model_id=str(folder)) == folder
    assert find(model_id=str(folder), model_dir="/elsewhere") == folder


def test_a_folder_relative_to_the_model_folder(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "weights", "config.json")
    assert find(model_id="weights", model_dir=str(tmp_path)) == folder


def test_a_folder_of_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "weights", "config.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(model_id="~/weights") == folder


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({}, "no model given: set option.model_id"),
        ({"model_dir": "."}, "holds no weights: set option.model_id"),
        ({"model_id": "empty"}, "has no config.json; change option.model_id"),
        ({"model_id": "/no/such/folder"}, "option.model_id=/no/such/folder: no such folder"),
        ({"model_id": "./missing"}, "no such folder, and not a hub model id"),
        ({"model_id": "a/b/c"}, "no such folder, and not a hub model id"),
        ({"model_id": "a b"}, "no such folder, and not a hub model id"),
        ({"model_id": "s3:/bucket/model"}, "no such folder, and not a hub model id"),
        ({"model_id": "s3://b"}, "option.model_id=s3://b: it must be s3://bucket/prefix"),
        ({"model_id": "s3://bucket/a*b"}, "its prefix must not have wildcards"),
        ({"model_id": "a/b", "s3url": "s3://b/c"}, "option.model_id=a/b are both set; unset one"),
    ],
    ids=str,
)
def test_what_is_no_checkpoint(
    properties: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError) as caught:
        find(**properties)
    assert words in str(caught.value)
    assert "option.model_id" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "names no model_type"),
        (b'{"model_type": 5}', "names no model_type"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_config(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LoadError, match=words) as caught:
        model_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_the_config_is_the_checkpoints_own(tmp_path: Path) -> None:
    config = {"model_type": "t5", "tie_word_embeddings": False, "unknown": [1, None]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_config(tmp_path) == config


def test_a_folder_that_djl_downloaded_for_s3url(tmp_path: Path) -> None:
    """DJLServing up to 0.25 puts it into model_id and leaves s3url as it was."""
    folder = write_files(tmp_path / "download" / "3f5a", "config.json")
    assert find(model_id=str(folder), s3url="s3://bucket/flan/", model_dir=str(tmp_path)) == folder


def adapter(**properties: str) -> Path | None:
    return find_adapter(read_configuration(properties=properties))


def test_an_adapter_by_its_path_or_beside_the_model(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "adapter", "adapter_config.json")
    assert adapter(merge_adapter=str(folder)) == folder
    assert adapter(merge_adapter="adapter/", model_dir=str(tmp_path)) == folder
    assert adapter(model_dir=str(tmp_path)) is None


def test_what_is_no_adapter(tmp_path: Path) -> None:
    write_files(tmp_path / "model", "config.json")
    with pytest.raises(LoadError, match=r"has no adapter_config.json; change option.merge_adapter"):
        adapter(merge_adapter="model", model_dir=str(tmp_path))
    with pytest.raises(LoadError, match=r"option.merge_adapter=./missing: no such folder"):
        adapter(merge_adapter="./missing", model_dir=str(tmp_path))


def test_nothing_is_asked_of_the_hub_for_a_folder(tmp_path: Path) -> None:
    """Also without huggingface_hub in the image."""
    folder = write_files(tmp_path, "config.json")
    code = (
        "import sys; sys.modules['huggingface_hub'] = sys.modules['filelock'] = None\n"
        "from handler.checkpoints.find import find_checkpoint\n"
        "from handler.config import Configuration\n"
        "print(find_checkpoint(Configuration(model_id=sys.argv[1])))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip() == str(folder), found.stderr
