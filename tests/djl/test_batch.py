"""DJL's own dynamic batch: one status for all, so a bad request is told so in its body."""

from __future__ import annotations

import pytest

from djl.client import EMPTY_FORM, DjlClient, ask, post
from handler.engines import Model

pytestmark = pytest.mark.djl


def test_neighbours_of_a_bad_request_are_answered(sync: DjlClient, model: Model) -> None:
    texts = [f"Write {number} in words." for number in (7, 48, 1999)]
    first, bad, second, third = sync.batch_predict(
        [ask(texts[0]), post(b'{"inputs": 5}'), ask(texts[1]), ask(texts[2])]
    )
    assert [first.code, bad.code, second.code, third.code] == [200] * 4
    assert bad.json() == {
        "code": 400,
        "error": "the field 'inputs' must be a string or a list of strings, got 5",
    }
    expected = [{"outputs": [output]} for output in model.pipeline_generate(texts)]
    assert [first.json(), second.json(), third.json()] == expected


def test_each_has_its_own_parameters(sync: DjlClient, model: Model) -> None:
    lengths = range(1, 13)
    answers = sync.batch_predict([ask("Write 1999 in words.", max_new_tokens=n) for n in lengths])
    assert [answer.json() for answer in answers] == [
        {"outputs": model.pipeline_generate(["Write 1999 in words."], max_new_tokens=n)}
        for n in lengths
    ]


@pytest.mark.parametrize("place", range(4))
def test_an_empty_form_spoils_no_batch(sync: DjlClient, model: Model, place: int) -> None:
    """DJL puts nothing at all at its place."""
    requests = [ask("Write 7 in words.")] * 3
    answers = sync.batch_predict([*requests[:place], EMPTY_FORM, *requests[place:]])
    assert "the body is empty" in answers.pop(place).json()["error"]
    expected = {"outputs": model.pipeline_generate(["Write 7 in words."])}
    assert [answer.json() for answer in answers] == [expected] * 3


def test_a_batch_of_empty_forms_is_refused(sync: DjlClient) -> None:
    for answer in sync.batch_predict([EMPTY_FORM] * 3):
        assert "the body is empty" in answer.json()["error"]
