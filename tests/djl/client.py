"""DJL's Java engine with its Python worker on a model folder, for tests to send requests to."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from djl.jars import SHORT_LIVED, jars_of

_JAVA_CLIENT = Path(__file__).with_name("java_client.py")
_START_SECONDS = 300
_ANSWER_SECONDS = 300
# DJL 0.20 may miss that its worker has started (java_client.take_turns), and waits for its end.
_START_MISSED = "Process not started, waiting for process end"
_STARTS = {"0.20.0": 10}
# Every Java has its ranks meet at the same port: one at a time, in whatever process of pytest.
_MPI = FileLock(str(Path(tempfile.gettempdir(), "handler-tests-mpi.lock")))

# Options that lead to sync mode; old versions have no other.
SYNC: dict[str, dict[str, str]] = {"0.34.0": {"async_mode": "false"}, "0.25.0": {}, "0.20.0": {}}


@dataclass(frozen=True)
class Request:
    """What DJLServing makes of a client's: the body, or a form's fields, and the headers."""

    content: dict[str, bytes]
    properties: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    code: int
    message: str
    properties: dict[str, str]
    body: bytes
    finished: float  # seconds, by the clock that all answers of a client share
    pieces: int  # in which the body came

    def json(self) -> Any:
        return json.loads(self.body)


def post(body: bytes, **headers: str) -> Request:
    return Request({"data": body}, {"Content-Type": "application/json", **headers})


def ask(inputs: str | list[str], **parameters: Any) -> Request:
    return post(json.dumps({"inputs": inputs, "parameters": parameters}).encode())


def form(fields: dict[str, bytes], **headers: str) -> Request:
    return Request(fields, {"Content-Type": "application/x-www-form-urlencoded", **headers})


EMPTY_FORM = form({})


class DjlStartFailed(Exception):
    """The model was not loaded. Carries the log of Java and of the worker."""


class _StartMissed(DjlStartFailed):
    pass


class DjlClient:
    """Predictor of DJL's Java API. In sync mode it takes one call at a time."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout
        self._log = log

    def predict(self, request: Request) -> Answer:
        return self.predict_in_turn([request])[0]

    def predict_in_turn(self, requests: Sequence[Request]) -> list[Answer]:
        return self._call("predict", requests)

    def predict_together(self, requests: Sequence[Request]) -> list[Answer]:
        """All at the same time; async mode only."""
        return self._call("predict_together", requests)

    def batch_predict(self, requests: Sequence[Request]) -> list[Answer]:
        """As one dynamic batch of DJL's; sync mode only."""
        return self._call("batch_predict", requests)

    def abandon(self, requests: Sequence[Request]) -> None:
        """Ask, and read no answer."""
        self._call("abandon", requests)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _call(self, command: str, requests: Sequence[Request]) -> list[Answer]:
        messages = [
            {
                "content": [(k, base64.b64encode(v).decode()) for k, v in r.content.items()],
                "properties": r.properties,
            }
            for r in requests
        ]
        self._stdin.write(json.dumps([command, messages]) + "\n")
        self._stdin.flush()
        line = self._line(_ANSWER_SECONDS)
        assert line, f"no answer to {command}:\n{self.log()}"
        answers = json.loads(line)
        assert isinstance(answers, list), answers
        return [Answer(**{**a, "body": base64.b64decode(a["body"])}) for a in answers]

    def _line(self, seconds: float) -> str:
        """The next line, or nothing when the process ended or time is up."""
        readable, _, _ = select.select([self._stdout], [], [], seconds)
        return self._stdout.readline() if readable else ""

    def _wait_until_loaded(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._line(0.1):
                return
            if _START_MISSED in self.log():
                raise _StartMissed(self.log())
        raise DjlStartFailed(self.log())

    def _kill(self) -> None:
        """End Java and the worker."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


StartDjl = Callable[[str, dict[str, str]], AbstractContextManager[DjlClient]]


@contextmanager
def djl(
    version: str,
    model_folder: Path,
    options: dict[str, str],
    *,
    engine: str = "Python",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[DjlClient]:
    """DJL's engine of that version with the model loaded; ``options`` win over the folder's."""
    tries_left = _STARTS.get(version, 1)
    while tries_left:
        tries_left -= 1
        try:
            with (
                nullcontext() if engine == "Python" else _MPI,
                _started(version, engine, model_folder, options, environment) as client,
            ):
                yield client
                return
        except _StartMissed:
            if not tries_left:
                raise


@contextmanager
def _started(
    version: str,
    engine: str,
    model_folder: Path,
    options: dict[str, str],
    environment: Mapping[str, str],
) -> Iterator[DjlClient]:
    with tempfile.TemporaryDirectory(prefix="djl-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "log")
        jars = str(jars_of(version))
        arguments = [jars, engine, str(model_folder), folder, json.dumps(options), *SHORT_LIVED]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(_JAVA_CLIENT), *arguments],
                env={**_environment(folder), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        client = DjlClient(process, log)
        try:
            client._wait_until_loaded()
            yield client
        finally:
            client._kill()


def _environment(folder: str) -> dict[str, str]:
    """This process's, without what would configure the handler, and with what DJL needs.

    Nor with a path to other modules: the model folder's own are to run.
    """
    configuring = ("OPTION_", "HF_MODEL_ID", "TENSOR_PARALLEL_DEGREE", "PYTHONPATH")
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(configuring)},
        "PYTHON_EXECUTABLE": sys.executable,
        "DJL_CACHE_DIR": folder,  # where djl_python is unpacked
        "OPT_OUT_TRACKING": "true",
    }
