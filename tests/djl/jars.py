"""The jars of each version of DJL's Python engine, fetched by Maven once and kept in build/."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

# DJL's Python engine -> the slf4j that its version logs through
SLF4J_OF = {"0.34.0": "2.0.17", "0.25.0": "1.7.36", "0.20.0": "1.7.36"}

_POM = Path(__file__).with_name("pom.xml")
_KEPT_IN = Path(__file__).resolve().parents[2] / "build" / "djl-jars"
_FETCH_SECONDS = 600
# For a JVM that ends soon: no second compiler, no threads that collect garbage.
SHORT_LIVED = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


def jars_of(version: str) -> Path:
    """The folder of jars; made whole or not at all, by one of the processes that run side by side.

    Maven's own repository is not made for several that write to it at once.
    """
    folder = _KEPT_IN / version
    if not folder.exists():
        _KEPT_IN.mkdir(parents=True, exist_ok=True)
        with FileLock(_KEPT_IN / "lock"), tempfile.TemporaryDirectory(dir=_KEPT_IN) as parent:
            if not folder.exists():
                fetched = Path(parent, "jars")
                _fetch(version, fetched)
                fetched.rename(folder)
    return folder


def _fetch(version: str, folder: Path) -> None:
    command = [
        "mvn",
        "--batch-mode",
        "--quiet",
        f"--file={_POM}",
        f"-Ddjl.version={version}",
        f"-Dslf4j.version={SLF4J_OF[version]}",
        f"-DoutputDirectory={folder}",
        "dependency:copy-dependencies",
    ]
    done = subprocess.run(
        command,
        env={"MAVEN_OPTS": " ".join(SHORT_LIVED), **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_FETCH_SECONDS,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
