"""What holds for every engine's thread: it ends cleanly, and outlives what fails in it."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from handler.engines import init_inference
from handler.errors import RequestError
from handler.generation import GenerationRequest
from handler.parameters import GenerationParameters
from handler.waiting import WaitingPrompts

ENDLESS = GenerationParameters(max_new_tokens=500, ignore_eos_token=True)
BACKENDS = pytest.mark.parametrize("backend", ["onnxruntime", "transformers"])


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("transformers", marks=pytest.mark.long)]
)
def test_python_ends_while_texts_run(demo: Path, backend: str) -> None:
    script = """
import sys, time
from handler.engines import init_inference
from handler.generation import GenerationRequest
from handler.parameters import GenerationParameters
model = init_inference(sys.argv[1], backend=sys.argv[2])
endless = GenerationParameters(max_new_tokens=500, ignore_eos_token=True)
model.submit([GenerationRequest("x", endless)] * 30)
while not model.running:
    time.sleep(0.01)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(demo), backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr.count("terminate")) == (0, 0), ended.stderr


@BACKENDS
def test_a_model_that_nobody_holds_answers_what_it_took_and_is_freed(
    demo: Path, backend: str
) -> None:
    before = set(threading.enumerate())
    model = init_inference(str(demo), backend=backend)
    (thread,) = set(threading.enumerate()) - before
    futures = model.submit([GenerationRequest("Write 7 in words.")] * 40)
    del model
    gc.collect()
    assert {future.result(60).text for future in futures} == {"seven"}
    thread.join(30)
    assert not thread.is_alive()


@BACKENDS
@pytest.mark.parametrize("method", ["take", "wait"])
def test_the_thread_outlives_whatever_fails(
    demo: Path, backend: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody is told, also who waits, and the next ones are served."""
    model = init_inference(str(demo), backend=backend, max_rows=2)
    original = getattr(WaitingPrompts, method)
    calls = itertools.count()
    went_on = threading.Event()

    def fail_once(self: WaitingPrompts, *arguments: object) -> object:
        if next(calls) == 0:
            raise MemoryError("no room")
        went_on.set()
        return original(self, *arguments)

    monkeypatch.setattr(WaitingPrompts, method, fail_once)
    futures = model.submit([GenerationRequest("x", ENDLESS)] * 5)
    if method == "take":
        errors = [future.exception(60) for future in futures]
        assert all(isinstance(error, RequestError) and error.code == 507 for error in errors)
    else:  # a thread that waits already does not call wait again until these are done
        for future in futures:
            future.cancel()
        assert went_on.wait(60), "a prompt that comes before it would fail, too"
    assert model.pipeline_generate(["Write 7 in words."]) == ["seven"]
    assert model.healthy
    model.close()
    assert not model.healthy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_is_told_to_load_its_own(demo: Path) -> None:
    script = """
import os, sys
from handler.engines import init_inference
from handler.errors import RequestError
model = init_inference(sys.argv[1], backend="onnxruntime")
assert model.pipeline_generate(["Write 7 in words."]) == ["seven"]
child = os.fork()
if child == 0:
    try:
        model.pipeline_generate(["x"])
    except RequestError as error:
        assert "load it after the fork" in str(error), error
        model.close()
        os._exit(3)
    os._exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert model.pipeline_generate(["Write 8 in words."]) == ["eight"]
model.close()
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(demo)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr


def test_closing_while_many_wait(demo: Path) -> None:
    model = init_inference(str(demo), max_rows=2)
    futures = model.submit([GenerationRequest("x", ENDLESS)] * 20)
    while not model.running:
        time.sleep(0.01)
    model.close()
    errors = [future.exception(60) for future in futures]
    assert any(error is None for error in errors)
    assert any(isinstance(error, RequestError) and error.code == 503 for error in errors)
