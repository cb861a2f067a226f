"""``check --serve`` through djl_python of each version, as it lies in DJL's jar."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from djl.jars import SLF4J_OF, jars_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("version", SLF4J_OF)
def test_the_prompt_goes_through_djls_worker_code(
    unpacked: Path, tmp_path: Path, version: str
) -> None:
    with zipfile.ZipFile(jars_of(version) / f"python-{version}.jar") as jar:
        jar.extractall(tmp_path, [n for n in jar.namelist() if n.startswith("djl_python/")])
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "handler", "check", str(unpacked)),
            *("--serve", "--prompt", "Write 7 in words.", "--json"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    told = json.loads(ended.stdout)
    assert (ended.returncode, told["findings"]) == (0, [])
    assert [answer["door"] for answer in told["answers"]] == ["the handler", "djl_python"]
    for answer in told["answers"]:
        assert json.loads(answer["answer"]) == {"outputs": ["seven"]}
