"""Fixtures: the demo model, loaded once, and the same behind a real server process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from handler.engines import Model, init_inference

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo" / "model"
_START_SECONDS = 120


@pytest.fixture(scope="session")
def demo() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    loaded = init_inference(str(DEMO))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def server() -> Iterator[httpx.Client]:
    """A client of ``python -m handler serve`` on the demo."""
    with serving() as (client, _):
        yield client


@contextmanager
def serving(
    *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """A server process and a client of it; SIGTERM at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "handler", "serve", "--port", "0", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url, log = _wait_for_url(process)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=90)
    assert "Traceback" not in "".join(log), "".join(log)


def _wait_for_url(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Read the log until it tells the address; a thread reads on, so that the pipe never fills."""
    assert process.stderr is not None
    found: list[str] = []
    log: list[str] = []
    told = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            log.append(line)
            match = re.search(r"serving \S+ on (http://\S+)", line)
            if match:
                found.append(match.group(1))
                told.set()
        told.set()

    threading.Thread(target=read, daemon=True).start()
    told.wait(_START_SECONDS)
    assert found, "the server did not start:\n" + "".join(log)
    return found[0], log
