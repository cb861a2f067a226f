"""MPI ranks that compute one model together: real mpirun, with passive workers and without."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mpi import are_gone, job_of

from handler.engines import Model

PROMPTS = [f"Write {number} in words." for number in (7, 48, 1999)]
CALLS: list[list[Any]] = [
    [{"inputs": PROMPTS}],
    [
        {"inputs": PROMPTS[0], "parameters": {"temperature": 2.0}},
        {"inputs": 5},
        {"inputs": "x", "stream": True},
    ],
]
TORCH = {"OPTION_BACKEND": "torch"}


def test_every_rank_gives_rank_0s_answers(tmp_path: Path, demo: Path, model: Model) -> None:
    """Chance included. A stream, which one process alone has, is refused."""
    every = {**TORCH, "OPTION_MODEL_ID": str(demo), "OPTION_USE_PASSIVE_WORKERS": "false"}
    with job_of(2, tmp_path, CALLS, **every) as job:
        assert job.wait() == 0, job.log
        assert "Traceback" not in job.log, job.log
        first, second = job.answers()
    assert first == second
    assert first[0] == [{"outputs": model.pipeline_generate(PROMPTS)}]
    assert "outputs" in first[1][0]
    assert [answer["code"] for answer in first[1][1:]] == [400, 400]
    assert "option.use_passive_workers=true or engine=Python" in first[1][2]["error"]


@pytest.mark.long
def test_passive_ranks_follow(tmp_path: Path, demo: Path, model: Model) -> None:
    passive = {**TORCH, "OPTION_MODEL_ID": str(demo), "OPTION_USE_PASSIVE_WORKERS": "true"}
    with job_of(4, tmp_path, CALLS, **passive) as job:
        assert job.wait() == 0, job.log
        assert not (tmp_path / "answers.1").exists()
        first = (tmp_path / "answers.0").read_text()
    assert "one thousand nine hundred ninety nine" in first


@pytest.mark.long
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OPTION_TENSOR_PARALLEL_DEGREE": "4"}, "=4 needs as many MPI ranks, mpirun started 2"),
        ({"OPTION_PIPELINE_PARALLEL_DEGREE": "2"}, "set option.tensor_parallel_degree"),
        (
            {"OPTION_BACKEND": "fastertransformer", "OPTION_USE_PASSIVE_WORKERS": "true"},
            "option.use_passive_workers=true",
        ),
    ],
    ids=["degree", "pipeline", "the wheel"],
)
def test_ranks_that_cannot_be(
    tmp_path: Path, demo: Path, environment: dict[str, str], words: str
) -> None:
    options = {**TORCH, "OPTION_MODEL_ID": str(demo), **environment}
    with job_of(2, tmp_path, CALLS, **options) as job:
        assert job.wait() != 0
        assert words in job.log


@pytest.mark.long
@pytest.mark.parametrize(
    ("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_lost_rank_ends_the_job(tmp_path: Path, demo: Path, rank: int, number: int) -> None:
    many = [[{"inputs": ["x"] * 16, "parameters": {"ignore_eos_token": True}}]] * 2000
    options = {**TORCH, "OPTION_MODEL_ID": str(demo), "OPTION_USE_PASSIVE_WORKERS": "false"}
    with job_of(2, tmp_path, many, **options) as job:
        pids = job.pids_after_an_answer()
        os.kill(pids[rank], number)
        assert job.wait() != 0
        assert are_gone(pids)
