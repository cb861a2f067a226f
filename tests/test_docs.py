"""The documents say what is so: tables from the code, links that lead somewhere, real answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from handler.checkpoints.read import CheckpointWeights

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), ROOT / "examples" / "demo" / "model" / "README.md"]
)


def test_tables_are_those_of_the_code() -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("http"):
            assert (document.parent / link).exists(), link


def test_files_named_as_proof_are_there() -> None:
    text = (ROOT / "docs" / "proven.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|examples|docs|benchmarks|handler)/[\w./-]+)", text):
        assert (ROOT / name).exists(), name


def test_the_readme_leads_to_every_document() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for document in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{document.name})" in text, document


def test_the_tree_in_contributing_names_every_module() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for module in (ROOT / "handler").rglob("*.py"):
        if module.name not in ("__init__.py", "__main__.py") and module.parent.name != "cli":
            assert f"  {module.name} " in tree, module


def test_the_readmes_curl_answers_what_the_readme_prints(server: httpx.Client) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"-d '(\{.*?\})'\n```\n```json\n(.*?)\n```", text, re.DOTALL)
    assert found
    reply = server.post(
        "/invocations", content=found.group(1), headers={"content-type": "application/json"}
    )
    assert reply.text == found.group(2)
    assert reply.json() == json.loads(found.group(2))


@pytest.mark.long
def test_the_conversion_in_the_docs_converts(demo: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(demo, old, ignore=shutil.ignore_patterns(".*"))
    weights = CheckpointWeights(old)
    torch.save(
        {n: torch.from_numpy(weights.get(n, weights.shape(n))) for n in weights},
        old / "pytorch_model.bin",
    )
    (old / "model.safetensors").unlink()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert CheckpointWeights(new).paths == [new / "model.safetensors"]


EXAMPLE = re.compile(r"```\nPOST (\S+)\n(?:Accept: (\S+)\n)?(\{.*\})\n\n((?s:.*?))\n```")
EXAMPLES = EXAMPLE.findall((ROOT / "docs" / "requests.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "accept", "body", "answer"), EXAMPLES, ids=[body for _, _, body, _ in EXAMPLES]
)
def test_examples_of_requests_are_answered_so(
    server: httpx.Client, path: str, accept: str, body: str, answer: str
) -> None:
    headers = {"accept": accept or "*/*", "content-type": "application/json"}
    reply = server.post(path, content=body, headers=headers)
    found, told = reply.text.strip().splitlines(), answer.splitlines()
    assert len(found) == len(told)
    for line, expected in zip(found, told):
        assert (line[:6] == "data: ") == (expected[:6] == "data: ")
        assert_alike(_value(line), _value(expected))


def test_there_are_examples_of_every_schema() -> None:
    assert len(EXAMPLES) >= 10
    assert {path for path, *_ in EXAMPLES} == {"/invocations", "/generate", "/v1/completions"}


def _value(line: str) -> object:
    line = line.removeprefix("data: ")
    return json.loads(line) if line.startswith("{") else line


def assert_alike(found: object, told: object) -> None:
    """But for rounding, and what differs from one answer to the next."""
    if isinstance(told, dict):
        assert isinstance(found, dict)
        assert list(found) == list(told)
        for name in told:
            if name in ("input_cached", "timing"):  # of the moment
                continue
            if not ("object" in told and name in ("id", "created")):
                assert_alike(found[name], told[name])
    elif isinstance(told, list):
        assert isinstance(found, list)
        assert len(found) == len(told)
        for each, expected in zip(found, told):
            assert_alike(each, expected)
    else:
        assert found == (pytest.approx(told, abs=2e-3) if isinstance(told, float) else told)


def test_serving_properties_explains_every_line() -> None:
    lines = (ROOT / "serving.properties").read_text(encoding="utf-8").splitlines()
    for above, line in zip(lines, lines[1:]):
        if re.match(r"#?[\w.]+=", line):
            assert above.startswith("# ") or re.match(r"#?[\w.]+=", above), line
