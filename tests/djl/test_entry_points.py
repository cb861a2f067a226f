"""The package's own module as entry point; everywhere else it is the folder's model.py."""

from __future__ import annotations

import pytest

from djl.client import SYNC, StartDjl, ask
from handler.engines import Model

pytestmark = pytest.mark.djl


@pytest.mark.parametrize("version", SYNC)
def test_the_module_of_the_package(start_djl: StartDjl, model: Model, version: str) -> None:
    with start_djl(version, {"entryPoint": "handler.model"}) as client:
        answer = client.predict(ask("Write 7 in words."))
    assert answer.json() == {"outputs": model.pipeline_generate(["Write 7 in words."])}
