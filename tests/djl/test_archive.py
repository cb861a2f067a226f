"""A model.tar.gz as ``package`` writes it, which DJL itself unpacks, installs and serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from djl.client import SYNC, ask, djl
from handler.engines import Model
from handler.packaging.images import find_image
from handler.packaging.package import Order, package

pytestmark = pytest.mark.djl

# What the archive asks for is installed here; nothing is to be changed.
WITHOUT_INDEX = {"PIP_NO_INDEX": "1"}


@pytest.fixture(scope="module")
def archive(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packaged") / "model.tar.gz"
    package(Order(find_image("djl-cpu"), str(demo)), output)
    return output


@pytest.mark.parametrize(
    "version",
    [pytest.param(v, marks=[] if v == "0.34.0" else pytest.mark.long) for v in SYNC],
    ids=SYNC,
)
def test_djl_unpacks_and_serves_it(archive: Path, model: Model, version: str) -> None:
    """0.34 in async mode, as serving.properties has it; older ones have none."""
    texts = [f"Write {number} in words." for number in (7, 48)]
    expected = [{"outputs": [output]} for output in model.pipeline_generate(texts)]
    with djl(version, archive, {}, environment=WITHOUT_INDEX) as client:
        answers = client.predict_in_turn([ask(text) for text in texts])
        log = client.log()
    assert [answer.json() for answer in answers] == expected
    assert "pip install requirements succeed" in log, log
