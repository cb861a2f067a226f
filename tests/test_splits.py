"""How tensor-parallel ranks share the tensors of a T5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import VARIANTS, write_checkpoint
from safetensors.numpy import load_file

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.read import CheckpointWeights
from handler.checkpoints.splits import Split, Tensor, chunks, t5_tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_is_the_checkpoint(tmp_path: Path, demo: Path, variant: str) -> None:
    folder = write_checkpoint(tmp_path, variant, demo)
    weights = load_file(folder / "model.safetensors")
    table = {
        tensor.source: tensor.shape
        for tensor in t5_tensors(
            T5Architecture.from_config(model_config(folder)), CheckpointWeights(folder)
        )
    }
    assert table == {name: tensor.shape for name, tensor in weights.items()}


@given(st.sampled_from(Split), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.data())
def test_parts_are_the_whole(
    split: Split, degree: int, rows: int, columns: int, data: st.DataObject
) -> None:
    axis = 0 if split in (Split.ROWS, Split.VOCABULARY) else 1
    shape = [rows, columns]
    shape[axis] *= degree
    if split is Split.VOCABULARY:  # alone need not divide
        shape[0] += data.draw(st.integers(0, degree - 1))
    tensor = Tensor("x", (shape[0], shape[1]), split, "x")
    array = np.arange(shape[0] * shape[1]).reshape(shape)
    parts = [array[tensor.part(rank, degree)] for rank in range(degree)]
    assert [part.shape for part in parts] == [tensor.part_shape(r, degree) for r in range(degree)]
    if split is Split.WHOLE:
        assert all(np.array_equal(part, array) for part in parts)
    else:
        assert np.array_equal(np.concatenate(parts, axis), array)


@given(st.integers(1, 50), st.sampled_from([1, 3, 1 << 20, 1 << 21, 1 << 22, 1 << 23]))
def test_chunks_cover_every_row_once(rows: int, columns: int) -> None:
    slices = list(chunks((rows, columns)))
    assert [row for piece in slices for row in range(rows)[piece]] == list(range(rows))
    assert all(
        len(range(rows)[piece]) in range(1, max(1, (1 << 22) // columns) + 1) for piece in slices
    )
