"""What a user gets: the base install, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, serving


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment with the package and its base needs."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    interpreter = folder / "bin" / "python"
    subprocess.run([*pip(interpreter), "install", "-q", "--no-compile", "-e", ROOT], check=True)
    return interpreter


def pip(interpreter: Path) -> list[str | Path]:
    """This environment's, on that one."""
    of_ours = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    return [*of_ours, "--python", interpreter]


def test_has_no_torch_and_serves(python: Path) -> None:
    listed = subprocess.run(
        [*pip(python), "list", "--format", "json"], check=True, capture_output=True
    ).stdout
    names = {package["name"].lower() for package in json.loads(listed)}
    assert not names & {"torch", "transformers", "accelerate"}
    with serving(python=str(python)) as (client, _):
        reply = client.post("/invocations", json={"inputs": "Write 7 in words."})
        assert reply.status_code == 200
        assert len(reply.json()["outputs"]) == 1


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("backend=transformers", "option.backend=transformers needs the packages torch"),
        ("tensor_parallel_degree=2", "backend torch needs the package torch"),
    ],
)
def test_what_needs_torch_says_so(python: Path, option: str, told: str) -> None:
    ended = subprocess.run(
        [python, "-m", "handler", "generate", "x", "--option", option],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {told}")
    assert ended.stderr.count("\n") == 1
