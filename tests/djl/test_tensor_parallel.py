"""Several ranks under DJL's own Java engine: those that the worker starts, and MPI's.

Java, mpirun, the processes and the signals are real; a stub reports the GPUs that DJL's MPI engine
asks for.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from mpi import MPI_ENVIRONMENT, are_gone, processes_with

from djl.client import Answer, DjlClient, StartDjl, ask, djl, post

pytestmark = pytest.mark.djl

TWO = {"backend": "torch", "tensor_parallel_degree": "2"}
START = 300


def texts(answer: Answer) -> Any:
    assert answer.code == 200, answer
    return answer.json()["outputs"]


def test_a_killed_rank_fails_its_requests_and_djl_starts_the_worker_again(
    start_djl: StartDjl,
) -> None:
    with start_djl("0.34.0", TWO) as client:
        assert texts(client.predict(ask("Write 7 in words."))) == ["seven"]
        (rank,) = processes_with("handler.engines.torch_ranks.rank")
        rank.kill()
        assert are_gone([rank.pid])
        assert texts(answer_of_the_next_worker(client)) == ["seven"]
        assert "rank 1 of 2 ended with status -9" in client.log()


def answer_of_the_next_worker(client: DjlClient) -> Answer:
    deadline = time.monotonic() + START
    while True:
        try:
            answer = client.predict(ask("Write 7 in words."))
            if answer.code == 200:
                return answer
        except AssertionError:  # Java's exception: there is no worker yet
            pass
        assert time.monotonic() < deadline, client.log()
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("version", "engine", "options"),
    [
        ("0.34.0", "MPI", {"async_mode": "true"}),
        pytest.param("0.34.0", "MPI", {"async_mode": "false"}, marks=pytest.mark.long),
        pytest.param(
            "0.34.0",
            "MPI",
            {"async_mode": "false", "use_passive_workers": "false"},
            marks=pytest.mark.long,
        ),
        pytest.param("0.25.0", "MPI", {}, marks=pytest.mark.long),
    ],
    ids=["async", "passive", "every rank", "0.25"],
)
def test_mpi_ranks(
    gpus: Path, unpacked: Path, version: str, engine: str, options: dict[str, str]
) -> None:
    environment = {**MPI_ENVIRONMENT, "LD_LIBRARY_PATH": str(gpus), "OMP_NUM_THREADS": "1"}
    with djl(
        version, unpacked, {**TWO, **options}, engine=engine, environment=environment
    ) as client:
        answers = client.predict_in_turn(
            [ask("Write 7 in words."), post(b"{"), ask(["Write 12 in words.", "Write 7 in words."])]
        )
        assert [answer.code for answer in answers] == [200, 400, 200]
        assert texts(answers[0]) == ["seven"]
        assert texts(answers[2]) == ["twelve", "seven"]
