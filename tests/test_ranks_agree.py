"""Kernels and graphs on several ranks, real processes: all have them or none, and a rank on which
they fail keeps nobody waiting. See faulty_rank.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from mpi import free_port
from random_checkpoints import write_checkpoint

from handler.engines import init_inference

pytest.importorskip("triton")

SECONDS = 120


def two_ranks(folder: Path, *faults: str) -> list[tuple[dict[str, Any], str]]:
    """What each rank told, and its log."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "faulty_rank.py", folder, str(rank), fault],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, fault in enumerate(faults)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(json.loads(told or "{}"), log) for told, log in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "flan-t5", demo)


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[str]:
    model = init_inference(str(folder), backend="torch")
    try:
        return model.pipeline_generate(["Write 7 in words."], max_new_tokens=3)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("faults", "missing"),
    [
        pytest.param(["nothing", "nothing"], None, marks=pytest.mark.long),
        (["nothing", "kernels"], "kernels: rank 1 of 2: KeyError"),
        pytest.param(["kernels", "nothing"], "kernels: rank 0 of 2", marks=pytest.mark.long),
        pytest.param(
            ["nothing", "graphs"], "graphs: rank 1 of 2: MemoryError", marks=pytest.mark.long
        ),
        pytest.param(["graphs", "nothing"], "graphs: rank 0 of 2", marks=pytest.mark.long),
        pytest.param(
            ["meeting", "meeting"],
            "graphs together: rank 0 of 2: MemoryError",
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_fails_on_one_rank_all_go_without(
    folder: Path, texts: list[str], faults: list[str], missing: str | None
) -> None:
    uses = {"kernels": "kernels" not in faults, "graphs": {*faults} == {"nothing"}}
    (first, log), (second, other_log) = two_ranks(folder, *faults)
    assert first == {"texts": texts, **uses}, log
    assert second == uses, other_log
    for one in (log, other_log):
        assert ("slower than it could be" in one) == (missing is not None)
        assert missing is None or f"without {missing}" in one


@pytest.mark.long
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_where_others_wait_for_it_is_told_soon(
    folder: Path, failing: int
) -> None:
    """Each could capture graphs alone, one cannot together: nobody can go on."""
    start = time.monotonic()
    faults = ["meeting" if rank == failing else "nothing" for rank in (0, 1)]
    (first, log), (second, other_log) = two_ranks(folder, *faults)
    assert f"rank {failing} of 2: MemoryError('no memory for graphs')" in first["error"], log
    assert "graphs" not in second or second["error"], other_log  # or it ended with rank 0
    assert time.monotonic() - start < SECONDS / 2


@pytest.mark.long
def test_rank_0_that_waits_in_vain_ends(folder: Path) -> None:
    """In NCCL it would for minutes, whatever is known of the other rank meanwhile."""
    (told, log), _ = two_ranks(folder, "stuck", "meeting")
    assert not told
    assert "MemoryError('no memory for graphs'); rank 0 waits for it in vain" in log
