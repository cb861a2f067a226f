"""An unpacked archive, served once here: in a process of its own, with its own handler."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from handler.packaging.check import subject_of
from handler.packaging.findings import Finding, error

# As a script its own folder would come before the model's on the path.
_SCRIPT = Path(__file__).with_name("serve_once.py").read_text(encoding="utf-8")
_PATIENCE = 3600  # seconds: SageMaker waits no longer for a container


@dataclass(frozen=True)
class Trial:
    """door: how the request went in. answer: the body. loading, answering: seconds."""

    door: str
    answer: str
    loading: float
    answering: float


def serve_once(folder: Path, prompt: str) -> tuple[list[Trial], list[Finding]]:
    """Answer ``prompt`` through our door and, where djl_python is installed, through DJL's."""
    trials: list[Trial] = []
    failures: list[Finding] = []
    doors = {"the handler": "ours"}
    if importlib.util.find_spec("djl_python"):
        doors["djl_python"] = "djl"
    for door, argument in doors.items():
        try:
            trials.append(_trial(folder, prompt, door, argument))
        except _Failed as failed:
            failures.append(error("does-not-serve", f"through {door}: {failed}"))
    return trials, failures


class _Failed(Exception):
    pass


def _trial(folder: Path, prompt: str, door: str, argument: str) -> Trial:
    """The model folder is the working directory and on the path, as DJLServing has it."""
    properties = subject_of(folder, None, None).properties or {}
    # async mode needs DJL's event loop around it
    options = {k[7:]: v for k, v in properties.items() if k.startswith("option.")}
    told = {"properties": options, "body": json.dumps({"inputs": prompt})}
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _SCRIPT, options.get("entryPoint", "model.py"), argument],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            input=json.dumps(told),
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"no answer within {_PATIENCE} s") from None
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines() or [f"ended with status {ended.returncode}"]
        raise _Failed(lines[-1])
    return Trial(door, **json.loads(ended.stdout.splitlines()[-1]))
