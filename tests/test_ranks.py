"""MPI: several real processes that make the same calls, and end together."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mpi import are_gone, free_port, job_of

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.config import configuration_of
from handler.engines.fastertransformer_loading import degrees
from handler.errors import LoadError
from handler.ranks import World, agreed_seed, world_of

PROMPTS = [f"Write {number} in words." for number in (7, 48, 1999)]


def body(inputs: Any, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": parameters}


def test_alone_without_mpirun() -> None:
    assert world_of({}) == World(0, 1)
    assert agreed_seed(World()) != agreed_seed(World())


def test_what_mpirun_says() -> None:
    told = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
    assert world_of(told) == World(2, 4, by_mpirun=True)


def test_as_many_ranks_as_the_degrees_ask_for(demo: Path) -> None:
    configuration = configuration_of(str(demo), tensor_parallel_degree=3)
    architecture = T5Architecture.from_config(model_config(demo))
    with pytest.raises(LoadError, match=r"=3 x .*=1 needs 3 MPI ranks, mpirun started 2"):
        degrees(configuration, architecture, World(0, 2), uses_triton=False, ready_made=False)


# Everything whose order, timing or chance could make ranks differ.
CALLS = [
    [body(PROMPTS, temperature=2.0, max_tokens=9)],
    [body("x", max_new_tokens=5), body(PROMPTS * 3, max_tokens=9), body(5), body("x", nonsense=1)],
    [
        body(PROMPTS, temperature=2.0),
        body(PROMPTS[0], num_beams=2),
        body([PROMPTS[0]] * 3, top_k=9),
        body(PROMPTS[:2], top_k=9, n=3),
    ],
    [body("y", bad_words=[[[99999], [1]]]), body(["z"] * 60)],
]


def test_ranks_make_the_same_calls_and_answer_the_same(tmp_path: Path, demo: Path) -> None:
    """A timeout that passes in each of them, here or there, does not part them."""
    options = {
        "OPTION_MAX_ROWS": "4",
        "OPTION_REQUEST_TIMEOUT": "0.001",
        "OPTION_MAX_QUEUE": "50",
    }
    with job_of(2, tmp_path, CALLS, OPTION_MODEL_ID=str(demo), **options) as job:
        assert job.wait() == 0, job.log
        first, second = job.answers()
        assert first == second
        assert job.calls(0) == job.calls(1)
    codes = [[answer.get("code", 200) for answer in answers] for answers in first]
    assert codes == [[200], [200, 200, 400, 400], [200, 200, 200, 200], [400, 400]]


def test_ranks_agree_on_a_seed_that_is_another_one_each_time() -> None:
    found = []
    for _ in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with ThreadPoolExecutor(3) as ranks:
            seeds = list(ranks.map(lambda rank: agreed_seed(World(rank, 3), place), range(3)))  # noqa: B023
        assert len(set(seeds)) == 1
        found += seeds
    assert len(set(found)) == 2


@pytest.mark.long
def test_two_jobs_draw_different_seeds(tmp_path: Path, demo: Path) -> None:
    seeds = []
    for run in ("first", "second"):
        folder = tmp_path / run
        folder.mkdir()
        with job_of(2, folder, CALLS[:1], OPTION_MODEL_ID=str(demo)) as job:
            assert job.wait() == 0, job.log
        seeds.append(job.calls(0)[1][-1]["random_seed"])
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        pytest.param(
            {"OPTION_TENSOR_PARALLEL_DEGREE": "3"},
            "option.pipeline_parallel_degree=1 needs 3 MPI ranks, mpirun started 2",
            marks=pytest.mark.long,
        ),
        pytest.param(
            *({"OPTION_BACKEND": "onnxruntime"}, "runs in one process, mpirun started 2"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *({"MASTER_PORT": ""}, "did not meet the others at MASTER_ADDR:MASTER_PORT"),
            marks=pytest.mark.long,
        ),
        ({"MASTER_PORT": "99999999"}, "MASTER_ADDR:MASTER_PORT 127.0.0.1:99999999 (no port)"),
        pytest.param(
            *({"FT_DOUBLE_FAIL": "1:load"}, "an illegal memory access in load"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["world size", "backend", "no port", "a wrong port", "one rank"],
)
def test_a_load_that_fails_ends_the_job(
    tmp_path: Path, demo: Path, environment: dict[str, str], words: str
) -> None:
    with job_of(2, tmp_path, CALLS, OPTION_MODEL_ID=str(demo), **environment) as job:
        assert job.wait() != 0
        assert words in job.log


def test_a_call_that_fails_on_one_rank_ends_the_job(tmp_path: Path, demo: Path) -> None:
    failing = {"FT_DOUBLE_FAIL": "1:call"}
    with job_of(2, tmp_path, CALLS, OPTION_MODEL_ID=str(demo), **failing) as job:
        assert job.wait() != 0
        assert "rank 1 of 2 failed and ends the job: CUDA error" in job.log


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_killed_rank_ends_the_job(tmp_path: Path, demo: Path, size: int) -> None:
    with job_of(size, tmp_path, CALLS, gated=True, OPTION_MODEL_ID=str(demo)) as job:
        pids = job.pids_in_a_call()
        os.kill(pids[-1], signal.SIGKILL)
        assert job.wait() != 0
        assert are_gone(pids)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ranks_do_not_outlive_mpirun(tmp_path: Path, demo: Path, size: int) -> None:
    """DJLServing kills mpirun alone."""
    with job_of(size, tmp_path, CALLS, gated=True, OPTION_MODEL_ID=str(demo)) as job:
        pids = job.pids_in_a_call()
        job.mpirun.kill()
        assert are_gone(pids)
