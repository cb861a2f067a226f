"""The commands of docs/sagemaker.md, run in its order: moto's AWS, our server; else they parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from sagemaker_double import Aws, archive_file

from handler.cli import main

pytest_plugins = ["sagemaker_fixtures"]

TEXT = (ROOT / "docs" / "sagemaker.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m handler (.*)$", TEXT, re.MULTILINE)
NEEDS_AWS = "# needs AWS"


@pytest.mark.usefixtures("clock")
def test_the_commands_do_what_is_said(
    cloud: Aws,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in re.findall(r"^export (\w+)=(.*)$", TEXT, re.MULTILINE):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    archive_file(tmp_path).rename("model.tar.gz")
    (tmp_path / "better.tar.gz").write_bytes(b"\x1f\x8bbetter")
    cloud.client("logs").create_log_group(logGroupName="/aws/sagemaker/Endpoints/t5")
    run = [c for c in COMMANDS if not c.startswith("invoke") and NEEDS_AWS not in c]
    assert [command.split()[0] for command in run] == [*["deploy"] * 5, "logs", "delete"]
    for command in run:
        main(shlex.split(command))
        if "deploy" in command and "--dry-run" not in command:
            assert cloud.endpoint("t5") is not None
    assert cloud.everything() == set()


def test_a_local_server_is_asked_so(
    server: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [c for c in COMMANDS if c.startswith("invoke") and NEEDS_AWS not in c]
    assert len(run) == 3
    for command in run:
        main(shlex.split(command.replace("http://127.0.0.1:8080", str(server.base_url))))
        assert "seven" in capsys.readouterr().out


def test_the_others_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [c.partition(NEEDS_AWS)[0] for c in COMMANDS if NEEDS_AWS in c]
    assert len(left) == 4
    ran: list[str] = []
    for module in ("invoke", "logs"):
        monkeypatch.setattr(
            f"handler.cli.{module}.run", lambda arguments: ran.append(arguments.name)
        )
    for command in left:
        main(shlex.split(command))
    assert ran == ["t5"] * 4
