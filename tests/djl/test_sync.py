"""Sync mode: one request a call, each with an HTTP status of its own."""

from __future__ import annotations

import json

import pytest
from bad_requests import BAD_COMPLETIONS, BAD_REQUESTS

from djl.client import EMPTY_FORM, DjlClient, ask, form, post
from handler.engines import Model

pytestmark = pytest.mark.djl


def test_a_text_is_answered(sync: DjlClient, model: Model) -> None:
    answer = sync.predict(ask("Write 7 in words."))
    assert answer.code == 200
    assert answer.properties["content-type"] == "application/json"
    assert answer.json() == {"outputs": model.pipeline_generate(["Write 7 in words."])}


def test_a_list_is_answered_in_its_order(sync: DjlClient, model: Model) -> None:
    texts = [f"Write {number} in words." for number in (7, 48, 1999)]
    answer = sync.predict(ask(texts, max_new_tokens=4))
    assert answer.json() == {"outputs": model.pipeline_generate(texts, max_new_tokens=4)}


def test_lines_are_answered_line_for_line(sync: DjlClient, model: Model) -> None:
    texts = ["Write 7 in words.", "", "Write 48 in words."]
    answer = sync.predict(post("\n".join(texts).encode(), **{"Content-Type": "text/plain"}))
    assert answer.properties["content-type"] == "application/jsonlines"
    first, bad, last = map(json.loads, answer.body.splitlines())
    assert [first, last] == [{"outputs": [t]} for t in model.pipeline_generate(texts[::2])]
    assert bad == {"code": 400, "error": "the line is empty"}


def test_bad_requests_are_refused_with_their_reason(sync: DjlClient) -> None:
    answers = sync.predict_in_turn([post(body) for _, body, _ in BAD_REQUESTS])
    for (name, _, words), answer in zip(BAD_REQUESTS, answers):
        assert words in answer.message, name
        assert answer.code == 400, name
        assert answer.json() == {"code": 400, "error": answer.message}, name


def test_bad_completions_are_refused_in_openais_form(sync: DjlClient) -> None:
    answers = sync.predict_in_turn([post(body) for _, body, *_ in BAD_COMPLETIONS])
    for (name, _, words, param), answer in zip(BAD_COMPLETIONS, answers):
        assert answer.code == 400, name
        error = answer.json()["error"]
        assert (error["param"], words in error["message"]) == (param, True), name


def test_an_empty_form_is_refused(sync: DjlClient) -> None:
    """DJL makes it look like the first call, the one that loads and configures."""
    answer = sync.predict(EMPTY_FORM)
    assert answer.code == 400
    assert "the body is empty" in answer.json()["error"]


def test_a_form_is_no_dynamic_batch(sync: DjlClient) -> None:
    """Nor are billions of requests made of one."""
    answer = sync.predict(form({"batch_9999999999.data": b"{}"}))
    assert answer.code == 400
    assert "'inputs' is missing" in answer.json()["error"]
