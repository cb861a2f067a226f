"""A rank that is killed, or stands still, or fails: nobody waits for ever, and the process ends so
that it is started again. All on real processes, with real signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import ROOT, serving
from mpi import are_gone, processes_with

from handler.checkpoints.partition import partition
from handler.config import configuration_of
from handler.engines import Model, init_inference
from handler.errors import LoadError, RequestError
from handler.generation import GenerationRequest
from handler.parameters import GenerationParameters

ENDLESS = GenerationParameters(max_new_tokens=500, ignore_eos_token=True)
REQUESTS = 16
# The machine may be busy; what counts is that 8 seconds of silence are enough.
SECONDS = 10
START = 180


def ranks_of(pid: int | None = None) -> list[psutil.Process]:
    return processes_with("handler.engines.torch_ranks.rank", pid)


def wait_until(condition: Callable[[], object], seconds: float = START) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


@contextmanager
def two_ranks(folder: Path, **options: Any) -> Iterator[Model]:
    model = init_inference(str(folder), 2, backend="torch", **options)
    yield model
    model.close()
    assert not ranks_of()


# In the middle of 16 requests


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "rank 1 of 2 ended with status -9"),
        (signal.SIGSTOP, "rank 1 of 2 stands still: not heard for"),
    ],
    ids=["killed", "stopped"],
)
def test_every_request_fails_and_says_why(demo: Path, number: int, words: str) -> None:
    with two_ranks(demo) as model:
        ended: list[str] = []
        model.when_ended(ended.append)
        futures = model.submit([GenerationRequest("x", ENDLESS)] * REQUESTS)
        wait_until(lambda: model.running == REQUESTS)
        (rank,) = ranks_of()
        rank.send_signal(number)
        done, _ = wait(futures, timeout=SECONDS)
        assert len(done) == REQUESTS
        assert {code_and_text(future)[0] for future in futures} == {424}
        assert all(words in code_and_text(future)[1] for future in futures)
        wait_until(lambda: ended)  # what fails in the engine's thread may be told before
        assert not model.healthy
        assert len(ended) == 1
        with pytest.raises(RequestError, match="it must be started again") as later:
            model.pipeline_generate(["x"])
        assert later.value.code == 503
        assert are_gone([rank.pid])


def code_and_text(future: Future[Any]) -> tuple[int, str]:
    error = future.exception()
    assert isinstance(error, RequestError)
    return error.code, str(error)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)]
)
def test_a_server_answers_and_ends_with_status_1(number: int) -> None:
    options = ["--option", "tensor_parallel_degree=2", "--option", "max_rows=16"]
    body = {"inputs": "x", "parameters": {"max_new_tokens": 500, "ignore_eos_token": True}}
    with (
        serving(*options, status=1) as (client, server),
        ThreadPoolExecutor(REQUESTS) as threads,
    ):
        answers = [threads.submit(client.post, "/invocations", json=body) for _ in range(REQUESTS)]
        wait_until(lambda: running(client) == REQUESTS)
        (rank,) = ranks_of(server.pid)
        rank.send_signal(number)
        start = time.monotonic()
        for answer in answers:
            assert answer.result(START).status_code == 424
            assert "rank 1 of 2" in answer.result().json()["error"]
        assert time.monotonic() - start < SECONDS + 1
        assert server.wait(START) == 1
    assert are_gone([rank.pid])


def running(client: httpx.Client) -> float:
    figures = client.get("/metrics").text
    (value,) = re.findall(r"^handler_prompts_running (\S+)", figures, re.MULTILINE)
    return float(value)


# Rank 0

ALONE = """
import sys, time
from handler.engines import init_inference
from handler.generation import GenerationRequest
from handler.parameters import GenerationParameters
model = init_inference(sys.argv[1], 2, backend="torch")
endless = GenerationParameters(max_new_tokens=500, ignore_eos_token=True)
if sys.argv[2] == "running":
    model.submit([GenerationRequest("x", endless)] * 200)
    while not model.running:
        time.sleep(0.01)
print("ready", flush=True)
sys.stdin.readline()
print(model.pipeline_generate(["Write 7 in words."]), flush=True)
"""


@contextmanager
def another_process(demo: Path, state: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE, str(demo), state],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("state", ["running", pytest.param("idle", marks=pytest.mark.long)])
def test_no_rank_outlives_rank_0(demo: Path, state: str) -> None:
    with another_process(demo, state) as process:
        assert line_of(process) == "ready"
        pids = [rank.pid for rank in ranks_of(process.pid)]
        process.kill()
        assert len(pids) == 1
        assert are_gone(pids)


@pytest.mark.long
def test_rank_0_that_was_stopped_goes_on(demo: Path) -> None:
    """Ctrl-Z and fg. Stopped for longer than a rank may be silent."""
    with another_process(demo, "idle") as process:
        assert line_of(process) == "ready"
        process.send_signal(signal.SIGSTOP)
        time.sleep(12)
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert line_of(process) == "['seven']"


@pytest.mark.long
def test_ctrl_c_ends_all() -> None:
    """A terminal sends it to its whole group, of which the ranks are not."""
    server = subprocess.Popen(
        [sys.executable, "-m", "handler", "serve", "--port=0", "--option=tensor_parallel_degree=2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stderr is not None
    log = []
    for line in server.stderr:
        log.append(line)
        if "serving" in line:
            break
    pids = [rank.pid for rank in ranks_of(server.pid)]
    os.killpg(server.pid, signal.SIGINT)
    log += server.stderr.readlines()
    assert server.wait(START) in (0, 130, -signal.SIGINT), "".join(log)
    assert "Traceback" not in "".join(log)
    assert len(pids) == 1
    assert are_gone(pids)


# While loading


def test_a_rank_that_is_killed_while_it_loads(demo: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(init_inference, str(demo), 2, backend="torch")
        wait_until(lambda: ranks_of() or loading.done())
        (rank,) = ranks_of()
        rank.kill()
        with pytest.raises(LoadError, match="rank 1 of 2 ended with status -9"):
            loading.result(START)
    assert are_gone([rank.pid])


def test_a_rank_that_cannot_load_says_why(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "partitioned"
    partition(configuration_of(str(demo), tensor_parallel_degree=2), "native", folder)
    file = folder / "rank-1-of-2.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(LoadError, match=r"rank 1 of 2: .*rank-1-of-2.safetensors"):
        init_inference(str(folder), 2)
    assert not ranks_of()
