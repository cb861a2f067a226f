"""How many rows fit into a GPU's memory beside what encoding takes. Its figures are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoints import write_checkpoint

from handler.config import configuration_of
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.kv_cache import RowCache
from handler.engines.torch_t5.part import LoadedPart, load_part
from handler.errors import LoadError

MIB = 1 << 20
plain_engine = LoadedPart.plain_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "flan-t5", demo)


def rows_on_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, **options: Any
) -> tuple[int, LoadedPart]:
    part = load_part(folder, configuration_of(str(folder), **options))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    # it computes where there is a device
    monkeypatch.setattr(LoadedPart, "plain_engine", lambda _, rows: plain_engine(part, rows))
    return replace(part, device=torch.device("cuda")).with_rows().rows, part


def test_as_many_as_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the encoder cache."""
    rows, part = rows_on_gpu(folder, monkeypatch, 40 * MIB, encoder_cache=10)
    taken = RowCache.nbytes(part.architecture, rows, 1024, 512, 4)
    assert 10 < rows < 64
    assert 10 * MIB < taken < 30 * MIB


def test_no_more_than_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_on_gpu(folder, monkeypatch, 1 << 40)[0] == 64
    assert rows_on_gpu(folder, monkeypatch, 1 << 40, max_rows=100)[0] == 100


@pytest.mark.parametrize("options", [{"max_rows": 1000}, {"encoder_cache": 10_000}])
def test_what_does_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    with pytest.raises(LoadError, match=r"are free on cuda; lower option\.max_rows"):
        rows_on_gpu(folder, monkeypatch, 40 * MIB, **options)


def test_the_most_prompts_that_come_together_are_encoded_at_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[int]] = []

    def encode(engine: TorchT5StepEngine, prompts: list[list[int]]) -> Any:
        tried.append([len(prompt) for prompt in prompts])
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(TorchT5StepEngine, "encode", encode)
    with pytest.raises(LoadError, match="too little memory to encode 256 tokens"):
        rows_on_gpu(folder, monkeypatch, 1 << 40, max_input_tokens=100)
    assert tried == [[100, 100]]
