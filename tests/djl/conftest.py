"""Fixtures: the demo as an unpacked model.tar.gz, and DJL's engine on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from djl.client import SYNC, DjlClient, StartDjl, djl

ROOT = Path(__file__).resolve().parents[2]
# cc: for the CUDA runtime that reports GPUs to DJL's MPI engines
MISSING = [tool for tool in ("java", "mvn", "cc") if shutil.which(tool) is None]


@pytest.fixture(scope="session", autouse=True)
def tools() -> None:
    if MISSING:
        outcome = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        outcome(f"not installed: {', '.join(MISSING)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "djl" in r.keywords]
    if MISSING and skipped:
        terminalreporter.write_line(
            f"{len(skipped)} DJL tests skipped: not installed: {', '.join(MISSING)}", yellow=True
        )


@pytest.fixture(scope="session")
def unpacked(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DJLServing makes of model.tar.gz. Without requirements.txt, which DJL would install."""
    folder = tmp_path_factory.mktemp("unpacked") / "model"
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(
        ROOT / "handler", folder / "handler", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("model.py", "serving.properties"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CUDA runtime that reports four GPUs."""
    folder = tmp_path_factory.mktemp("cuda")
    source, library = Path(__file__).with_name("gpus.c"), folder / "libcudart.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return folder


@pytest.fixture(scope="session")
def start_djl(unpacked: Path) -> StartDjl:
    return lambda version, options: djl(version, unpacked, options)


@pytest.fixture(scope="session", params=SYNC)
def sync(request: pytest.FixtureRequest, start_djl: StartDjl) -> Iterator[DjlClient]:
    """Sync mode; versions that know no other run on serving.properties as it is shipped."""
    with start_djl(request.param, SYNC[request.param]) as client:
        yield client


@pytest.fixture(scope="session")
def asynchronous(start_djl: StartDjl) -> Iterator[DjlClient]:
    """Async mode, as serving.properties has it."""
    with start_djl("0.34.0", {}) as client:
        yield client
