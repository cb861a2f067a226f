"""Ours as entry point in every way that DJL has, and one's own that wraps it, in all its modes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from djl.client import SYNC, DjlClient, StartDjl, ask, djl, post
from djl.conftest import ROOT
from handler.engines import Model

pytestmark = pytest.mark.djl

IN_FULL = [pytest.param(version, marks=pytest.mark.long) for version in SYNC]


def assert_answers(client: DjlClient, model: Model, *, batches: bool) -> None:
    """One request, and several at once as the mode has it."""
    texts = [f"Write {number} in words." for number in (7, 48)]
    expected = [{"outputs": [output]} for output in model.pipeline_generate(texts)]
    requests = [ask(text) for text in texts]
    assert client.predict(requests[0]).json() == expected[0]
    several = client.batch_predict if batches else client.predict_together
    assert [answer.json() for answer in several(requests)] == expected


@pytest.fixture(scope="module")
def bare(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without model.py, and without a word of entry points in its properties."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(unpacked, folder)
    (folder / "model.py").unlink()
    lines = (folder / "serving.properties").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "entryPoint" not in line]
    (folder / "serving.properties").write_text("".join(kept))
    return folder


@pytest.mark.parametrize("version", SYNC)
def test_the_module_of_the_package(start_djl: StartDjl, model: Model, version: str) -> None:
    with start_djl(version, {"entryPoint": "handler.model", **SYNC[version]}) as client:
        assert_answers(client, model, batches=True)


def test_the_module_in_async_mode(start_djl: StartDjl, model: Model) -> None:
    with start_djl("0.34.0", {"entryPoint": "handler.model"}) as client:
        assert_answers(client, model, batches=False)


@pytest.mark.parametrize("version", IN_FULL)
def test_the_environment(bare: Path, model: Model, version: str) -> None:
    named = {"DJL_ENTRY_POINT": "handler.model"}
    with djl(version, bare, SYNC[version], environment=named) as client:
        assert_answers(client, model, batches=True)


def test_the_environment_in_async_mode(bare: Path, model: Model) -> None:
    named = {"DJL_ENTRY_POINT": "handler.model"}
    with djl("0.34.0", bare, {}, environment=named) as client:
        assert_answers(client, model, batches=False)


@pytest.mark.parametrize("version", IN_FULL[:2])
def test_an_absolute_path(bare: Path, model: Model, version: str) -> None:
    """Not in 0.20, which imports such a path as a module's name."""
    options = {"entryPoint": str(ROOT / "model.py"), **SYNC[version]}
    with djl(version, bare, options) as client:
        assert_answers(client, model, batches=True)


def test_an_absolute_path_in_async_mode(bare: Path, model: Model) -> None:
    with djl("0.34.0", bare, {"entryPoint": str(ROOT / "model.py")}) as client:
        assert_answers(client, model, batches=False)


@pytest.fixture(scope="module")
def example(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with examples/entry_point/model.py in the place of ours."""
    folder = tmp_path_factory.mktemp("example") / "model"
    shutil.copytree(unpacked, folder)
    shutil.copy(ROOT / "examples" / "entry_point" / "model.py", folder)
    return folder


GOOD, BAD, NO_JSON = post(b'{"number": 48}'), post(b'{"number": "x"}'), post(b"{")


@pytest.mark.parametrize("version", ["0.25.0", IN_FULL[0], IN_FULL[2]])
def test_the_example_of_ones_own(example: Path, model: Model, version: str) -> None:
    with djl(version, example, SYNC[version]) as client:
        alone = client.predict_in_turn([GOOD, BAD, NO_JSON])
        batch = client.batch_predict([NO_JSON, GOOD, BAD, GOOD])
    words = {"words": model.pipeline_generate(["Write 48 in words."])[0].split()}
    assert [answer.code for answer in alone] == [200, 400, 400], alone
    assert alone[0].json() == batch[1].json() == batch[3].json() == words
    assert alone[1].json() == batch[2].json()
    assert alone[1].json()["error"] == "the field 'number' must be an integer"
    assert "not JSON" in batch[0].json()["error"]


def test_the_example_in_async_mode(example: Path, model: Model) -> None:
    with djl("0.34.0", example, {}) as client:
        answers = client.predict_together([BAD, GOOD] * 4)
    words = {"words": model.pipeline_generate(["Write 48 in words."])[0].split()}
    assert [answer.code for answer in answers] == [400, 200] * 4
    assert all(answer.json() == words for answer in answers[1::2])
