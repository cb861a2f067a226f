"""The record of buckets: there when it is needed, never in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler.deployment.state import UploadRecord


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def record(account: str = "1", region: str = "r", name: str = "t5") -> UploadRecord:
    return UploadRecord(account, region, name)


def test_is_of_one_endpoint() -> None:
    record().add("a")
    record().add("b")
    record().add("a")
    assert record().buckets() == ["a", "b"]
    for other in (record(account="2"), record(region="s"), record(name="t5-large")):
        assert other.buckets() == []
    record().forget()
    record().forget()
    assert record().buckets() == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"buckets": 1}'])
def test_a_damaged_one_is_told(home: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    record().add("a")
    (file,) = home.rglob("t5.json")
    file.write_text(content)
    assert record().buckets() == []
    assert "name the bucket by --bucket" in caplog.text
    record().add("b")
    assert json.loads(file.read_text()) == {"buckets": ["b"]}


def test_where_nothing_can_be_written(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "djl-t5-handler").write_text("a file")
    record().add("a")
    assert "should this be cut off, delete with --bucket a" in caplog.text


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    record().add("a")
    record().forget()
    assert record().buckets() == []
