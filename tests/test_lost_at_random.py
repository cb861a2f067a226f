"""Servers of two ranks, one of which is lost at any moment, under load; several servers at once;
and one on a host without a name. All of it takes long."""

from __future__ import annotations

import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import serving
from mpi import are_gone
from test_lost_ranks import SECONDS, START, ranks_of

pytestmark = pytest.mark.long

CLIENTS = 8
WORDS = "apple pony golden key cat river 7 Write Sort in words: these".split()
TWO_RANKS = ["--option", "tensor_parallel_degree=2", "--option", "max_rows=16"]


@contextmanager
def two_ranks(
    status: int = 0, python: str = sys.executable, log: list[str] | None = None
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str], psutil.Process]]:
    """A server, its process, and its other rank."""
    with serving(*TWO_RANKS, status=status, python=python, log=log) as (client, server):
        (rank,) = ranks_of(server.pid)
        yield client, server, rank
    assert are_gone([server.pid, rank.pid])


def ask_until_it_fails(client: httpx.Client, seed: str) -> httpx.Response | None:
    """The first answer that is none, or nothing where nobody listens any more."""
    draw = random.Random(seed)
    while True:
        encodes = draw.random() < 0.5  # most of the time; else it decodes
        words = draw.choices(WORDS, k=draw.randrange(150, 300) if encodes else 5)
        tokens = draw.randrange(1, 5) if encodes else draw.randrange(20, 200)
        parameters = {"max_new_tokens": tokens, "ignore_eos_token": True}
        body = {"inputs": " ".join(words), "parameters": parameters}
        try:
            reply = client.post("/invocations", json=body)
        except httpx.TransportError:
            return None
        if reply.status_code != 200:
            return reply


@pytest.mark.parametrize("seed", range(20))
def test_every_request_is_answered_or_fails_soon(seed: int) -> None:
    draw = random.Random(seed)
    number = draw.choice([signal.SIGKILL, signal.SIGSTOP])
    with two_ranks(status=1) as (client, server, rank), ThreadPoolExecutor(CLIENTS) as threads:
        answers = [
            threads.submit(ask_until_it_fails, client, f"{seed} {i}") for i in range(CLIENTS)
        ]
        time.sleep(draw.uniform(0, 2))
        rank.send_signal(number)
        _, waiting = wait(answers, timeout=SECONDS)
        assert not waiting, f"{len(waiting)} wait"
        for answer in answers:
            reply = answer.result()
            if reply is None:  # between two requests while the server ended
                continue
            assert reply.status_code in (424, 503), reply.text
            assert "rank 1 of 2" in reply.json()["error"]
        assert any(answer.result() for answer in answers)
        assert server.wait(START) == 1


@pytest.mark.parametrize("seed", range(20, 25))
def test_no_rank_is_left_when_rank_0_is_killed(seed: int) -> None:
    draw = random.Random(seed)
    with (
        two_ranks(status=-signal.SIGKILL) as (client, server, _),
        ThreadPoolExecutor(CLIENTS) as threads,
    ):
        answers = [
            threads.submit(ask_until_it_fails, client, f"{seed} {i}") for i in range(CLIENTS)
        ]
        time.sleep(draw.uniform(0, 2))
        server.kill()
        _, waiting = wait(answers, timeout=SECONDS)
        assert not waiting
        assert {answer.result() for answer in answers} == {None}


def test_two_servers_on_a_host_know_nothing_of_each_other() -> None:
    """One that loses a rank ends alone."""
    with ExitStack() as stack:
        staying, _, _ = stack.enter_context(two_ranks())
        with two_ranks(status=1) as (leaving, ending, rank), ThreadPoolExecutor() as threads:
            for client in (staying, leaving):
                assert answer_of(client) == "seven"
            threads.submit(ask_until_it_fails, leaving, "leaving")
            rank.kill()
            assert ending.wait(START) == 1
        assert answer_of(staying) == "seven"


def answer_of(client: httpx.Client) -> str:
    reply = client.post("/invocations", json={"inputs": "Write 7 in words."})
    return str(reply.json()["outputs"][0])


def test_a_host_whose_name_is_not_known(tmp_path: Path) -> None:
    """As in containers. Nothing may be looked up by it."""
    python = tmp_path / "python"
    named = f'hostname nowhere.invalid && exec {shlex.quote(sys.executable)} "$@"'
    python.write_text(f'#!/bin/sh\nexec unshare --uts sh -c {shlex.quote(named)} - "$@"\n')
    python.chmod(0o755)
    if subprocess.run([python, "-c", ""], check=False).returncode:
        pytest.skip("unshare --uts is not allowed here")
    look_up = "import socket; socket.gethostbyname(socket.gethostname())"
    assert subprocess.run([python, "-c", look_up], check=False).returncode
    log: list[str] = []
    with two_ranks(python=str(python), log=log) as (client, _, _):
        assert answer_of(client) == "seven"
    assert "hostname" not in "".join(log), "".join(log)
