"""What tests of deploy and delete start from: an account, the command line in it, a quick clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sagemaker_double import REGION, ROLE, Aws, FakeClock, archive_file, aws

from handler.deployment import aws as deployment_aws
from handler.deployment import removal, runner


@pytest.fixture(scope="module")
def account() -> Iterator[Aws]:
    with aws() as found:
        yield found


@pytest.fixture
def cloud(account: Aws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Aws:
    """An empty account, in which the command line works."""
    account.reset()
    monkeypatch.setattr(deployment_aws, "new_session", lambda region: account.session)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("SAGEMAKER_ROLE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    return account


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(runner, "Clock", fake.clock)
    monkeypatch.setattr(removal, "Clock", fake.clock)
    return fake


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    told = ["--name", "t5", "--instance-type", "ml.c5.2xlarge", "--role", ROLE, "--region", REGION]
    return ["deploy", str(archive_file(tmp_path)), *told, "--yes"]
