"""The documents' commands: those of the quick start are run, all others are at least understood."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, serving

from handler.cli import command_parser, main

NEEDS = re.compile(r"\s+# needs .*$")
COMMAND = re.compile(r"^(?:\.venv/bin/)?python -m handler (.*)$", re.MULTILINE)
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md")])


def commands_of(document: Path) -> list[str]:
    """With lines that go on joined; those in text between backticks are no commands."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    return COMMAND.findall(text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_command_is_one(document: Path) -> None:
    for command in commands_of(document):
        command_parser().parse_args(shlex.split(NEEDS.sub("", command)))


def test_every_command_of_the_notebook_is_one() -> None:
    notebook = json.loads((ROOT / "examples" / "flan-t5-xxl.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    text = "\n".join(cells).replace("\\\n", " ")
    commands = re.findall(r"^!python -m handler ([^|\n]*)", text, re.MULTILINE)
    assert [c.split()[0] for c in commands] == [
        *("plan", "package", "check", "deploy", "deploy", "invoke", "logs"),
        *("package", "check", "deploy", "invoke", "delete"),
    ]
    for command in commands:
        command_parser().parse_args(shlex.split(command))


QUICK_START = commands_of(ROOT / "docs" / "quick-start.md")


def test_the_commands_of_the_quick_start_work(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All but servers, which do not end, and those that say what they need."""
    shutil.copytree(demo, tmp_path / "my-model", ignore=shutil.ignore_patterns(".*"))
    monkeypatch.chdir(tmp_path)
    run = [c for c in QUICK_START if not NEEDS.search(c) and not c.startswith("serve")]
    assert [c.split()[0] for c in run] == [
        "generate",
        "package",
        "check",
        "plan",
        "package",
        "check",
        "package",
    ]
    for command in run:
        (tmp_path / "model.tar.gz").unlink(missing_ok=True) if "package" in command else None
        main(shlex.split(command))
        written = capfd.readouterr()
        assert "Traceback" not in written.err
    assert "seven" in written.out or run


def test_the_server_of_the_quick_start_answers(demo: Path) -> None:
    text = (ROOT / "docs" / "quick-start.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"^curl .* -d '(.*)'$", text, re.MULTILINE)
    (command,) = [c for c in QUICK_START if c.startswith("serve") and not NEEDS.search(c)]
    arguments = [str(demo) if a == "my-model" else a for a in shlex.split(command)[1:]]
    with serving(*arguments) as (client, _):
        reply = client.post("/invocations", content=body)
    assert isinstance(reply, httpx.Response)
    assert reply.json() == {"outputs": ["seven"]}
