"""Async mode: many requests at a time in one worker, each answered by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bad_requests import BAD_COMPLETIONS, BAD_REQUESTS

from djl.client import EMPTY_FORM, Answer, DjlClient, ask, post
from handler.engines import Model

pytestmark = pytest.mark.djl

VARIED_PARAMETERS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 3},
    {"max_new_tokens": 40},
    {"min_new_tokens": 12},
    {"min_new_tokens": 20, "max_new_tokens": 20},
    {"ignore_eos_token": True, "max_new_tokens": 25},
    {"stop_sequences": ["hundred"]},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {"temperature": 0.7, "seed": 3, "top_k": 5},
    {"temperature": 2.0, "seed": 4, "max_new_tokens": 10},
    {"top_p": 0.9, "seed": 5},
    {"top_k": 3, "seed": 6, "min_new_tokens": 5},
    {"temperature": 0},
    {"do_sample": True, "seed": 7},
]


def test_lines_are_answered_line_for_line(asynchronous: DjlClient, model: Model) -> None:
    texts = ["Write 7 in words.", "Write 48 in words."]
    body = "\n".join(json.dumps({"inputs": text}) for text in texts).encode()
    answer = asynchronous.predict(post(body))
    assert answer.properties["content-type"] == "application/jsonlines"
    expected = [{"outputs": [text]} for text in model.pipeline_generate(texts)]
    assert [json.loads(line) for line in answer.body.splitlines()] == expected


def test_sixteen_at_once_get_what_they_get_alone(asynchronous: DjlClient, model: Model) -> None:
    asked = [
        (f"Write {number} in words.", parameters)
        for number, parameters in enumerate(VARIED_PARAMETERS, 101)
    ]
    # With its own text in it, nobody's answer can pass for another's.
    requests = [ask(text, return_full_text=True, **parameters) for text, parameters in asked]
    alone = asynchronous.predict_in_turn(requests)
    for _ in range(3):
        together = asynchronous.predict_together(requests)
        assert [a.json() for a in together] == [a.json() for a in alone]
    assert [a.json() for a in alone] == [
        {"outputs": [text + model.pipeline_generate([text], **parameters)[0]]}
        for text, parameters in asked
    ]
    assert {a.code for a in alone} == {200}
    assert {a.properties["content-type"] for a in alone} == {"application/json"}


def test_a_short_request_returns_before_a_long_one(asynchronous: DjlClient) -> None:
    long = ask("Write 7 in words.", ignore_eos_token=True, max_new_tokens=500)
    short = ask("Write 8 in words.", max_new_tokens=2)
    answers = asynchronous.predict_together([long, long, long, short])
    assert {a.code for a in answers} == {200}
    assert min(a.finished for a in answers[:3]) > answers[3].finished


def test_bad_requests_are_refused_with_their_reason(asynchronous: DjlClient) -> None:
    """All at once, too. Java gives a client the text of ``error`` only, and a code that is there
    with it."""
    answers = asynchronous.predict_together([post(body) for _, body, _ in BAD_REQUESTS])
    for (name, _, words), answer in zip(BAD_REQUESTS, answers):
        assert_refused(answer, words, name)


def test_bad_completions_are_refused_with_their_reason(asynchronous: DjlClient) -> None:
    answers = asynchronous.predict_together([post(body) for _, body, *_ in BAD_COMPLETIONS])
    for (name, _, words, _), answer in zip(BAD_COMPLETIONS, answers):
        assert (answer.code, words in answer.json()["error"]) == (400, True), name


def test_neighbours_of_bad_requests_are_answered(asynchronous: DjlClient, model: Model) -> None:
    bad, good = post(b'{"inputs": 5}'), ask("Write 7 in words.")
    answers = asynchronous.predict_together([bad, good] * 8)
    expected = {"outputs": model.pipeline_generate(["Write 7 in words."])}
    for refused, answered in zip(answers[::2], answers[1::2]):
        assert_refused(refused, "must be a string or a list of strings, got 5")
        assert (answered.code, answered.json()) == (200, expected)


def test_an_empty_form_is_refused(asynchronous: DjlClient) -> None:
    """DJL makes it look like the first call, the one that loads and configures."""
    assert_refused(asynchronous.predict(EMPTY_FORM), "the body is empty")


def assert_refused(answer: Answer, words: str, name: str = "") -> None:
    assert answer.code == 400, name
    assert words in answer.message, name
    assert answer.json() == {"code": 400, "error": answer.message}, name
