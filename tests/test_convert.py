"""pytorch_model.bin as safetensors: every number as it was, in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from handler.errors import LoadError
from handler.packaging.archive import BLOCK
from handler.packaging.convert import as_safetensors

TENSORS = {
    "shared.weight": torch.randn(300, 2000),
    "a.bf16": torch.randn(3, 5).bfloat16(),
    "a.fp16": torch.randn(7).half(),
    "a.scalar": torch.tensor(3.5, dtype=torch.float64),
    "a.flags": torch.tensor([True, False, True]),
    "a.ids": torch.arange(5),
    "a.transposed": torch.randn(4, 6).t(),
    "a.empty": torch.empty(0, 3),
}


def written(files: list[Path], folder: Path) -> list[str]:
    for member in as_safetensors(files):
        pieces = list(member.pieces())
        assert max(map(len, pieces)) <= BLOCK
        assert sum(map(len, pieces)) == member.size
        (folder / member.name).write_bytes(b"".join(pieces))
    return sorted(file.name for file in folder.glob("model*"))


def test_one_file(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert written([tmp_path / "pytorch_model.bin"], tmp_path) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers refuses it


def test_a_table_under_several_names_is_stored_once(tmp_path: Path) -> None:
    """As transformers saves T5. A tied head stays: only config.json says whether it is needed."""
    table = torch.randn(9, 4)
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    torch.save(dict.fromkeys([*names, "lm_head.weight"], table), tmp_path / "pytorch_model.bin")
    written([tmp_path / "pytorch_model.bin"], tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"shared.weight", "lm_head.weight"}


def test_tables_that_only_look_alike_are_kept(tmp_path: Path) -> None:
    names = ("shared.weight", "encoder.embed_tokens.weight")
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "pytorch_model.bin")
    written([tmp_path / "pytorch_model.bin"], tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == set(names)


def test_shards(tmp_path: Path) -> None:
    names, files = list(TENSORS), []
    for number in (0, 1):
        files.append(tmp_path / f"pytorch_model-0000{number + 1}-of-00002.bin")
        torch.save({name: TENSORS[name] for name in names[number::2]}, files[-1])
    assert written(files, tmp_path) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_type_that_safetensors_has_not(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadError, match="tensor x is of type torch"):
        as_safetensors([tmp_path / "pytorch_model.bin"])
