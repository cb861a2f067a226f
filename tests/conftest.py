"""Fixtures: the demo model, loaded once, and the same behind a real server process."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The models of the tests are tiny: a second thread would wait longer than it computes. Set before
# torch is imported; the servers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels are interpreted; it looks once, when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What runs in the background ignores Ctrl-C, and so would every process that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import httpx
import hypothesis
import pytest
from random_checkpoints import VARIANTS, write_checkpoint

from handler.engines import Model, init_inference

if TYPE_CHECKING:
    from oracle import Oracle

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo" / "model"
_START_SECONDS = 120
# 2023's images have Python 3.9 and the wheel; test_python39.py puts its double there.
BACKEND = "auto" if sys.version_info >= (3, 10) else "fastertransformer"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On Python 3.9 as 2023's transformers can read it: without tokenizer.json."""
    if sys.version_info >= (3, 10):
        return DEMO
    folder = tmp_path_factory.mktemp("demo")
    for file in DEMO.iterdir():
        if file.is_file() and file.name != "tokenizer.json":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def model() -> Iterator[Model]:
    loaded = init_inference(str(DEMO))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def oracle_of(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Of a variant, or of ``demo``: plain transformers, and its ``folder``, the checkpoint."""
    from oracle import Oracle

    @cache
    def oracle(variant: str) -> Oracle:
        if variant == "demo":
            return Oracle(demo)
        return Oracle(write_checkpoint(tmp_path_factory.mktemp(variant), variant, demo))

    return oracle


_PAIRS = [*(("onnxruntime", v) for v in ("demo", *VARIANTS)), ("torch", "flan-t5")]
# Those in which the family's members differ most; the others take as long again.
_USUAL_PAIRS = [("onnxruntime", "demo"), ("onnxruntime", "odd"), ("torch", "flan-t5")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, marks=[] if pair in _USUAL_PAIRS else pytest.mark.long)
        for pair in _PAIRS
    ],
    ids=map("-".join, _PAIRS),
)
def pair(
    request: pytest.FixtureRequest, oracle_of: Callable[[str], Oracle]
) -> Iterator[tuple[Model, Oracle]]:
    """A model of 11 rows, and its oracle."""
    backend, variant = request.param
    oracle = oracle_of(variant)
    model = init_inference(str(oracle.folder), backend=backend, max_rows=11, threads=1)
    yield model, oracle
    model.close()


@pytest.fixture(scope="session")
def server() -> Iterator[httpx.Client]:
    """A client of ``python -m handler serve`` on the demo."""
    with serving() as (client, _):
        yield client


def lasting(answer: Any) -> Any:
    """An answer's JSON without what equal requests need not be answered equally."""
    if isinstance(answer, dict):
        of_the_moment = ("timing", "input_cached")
        return {k: lasting(v) for k, v in answer.items() if k not in of_the_moment}
    return [lasting(item) for item in answer] if isinstance(answer, list) else answer


@contextmanager
def serving(
    *arguments: str,
    environment: dict[str, str] | None = None,
    python: str = sys.executable,
    log: list[str] | None = None,
    status: int = 0,
    cwd: Path = ROOT,
) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """A server process and a client of it; SIGTERM at the end. ``log`` takes its lines.

    status: what the process is to end with.
    """
    log = [] if log is None else log
    process = subprocess.Popen(
        [python, "-m", "handler", "serve", "--port", "0", *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    address: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_log, args=(process, log, address), daemon=True)
    reader.start()
    try:
        url = address.get(timeout=_START_SECONDS)
        assert url is not None, "the server did not start:\n" + "".join(log)
        with httpx.Client(base_url=url, timeout=120) as client:
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        finally:
            process.kill()
        reader.join(timeout=10)
    assert process.returncode == status, "".join(log)
    assert "Traceback" not in "".join(log), "".join(log)


def _read_log(
    process: subprocess.Popen[str], log: list[str], address: queue.SimpleQueue[str | None]
) -> None:
    """To its end, so that the pipe never fills; ``address`` gets the URL, None if there is none."""
    for line in process.stderr or ():
        log.append(line)
        match = re.search(r"serving \S+ on (http://\S+)", line)
        if match:
            address.put(match.group(1))
    address.put(None)
