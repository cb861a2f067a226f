"""Errors as replies: their status, their headers, one line of ASCII."""

from __future__ import annotations

import json

import pytest

from handler.errors import RequestError
from handler.responses import error_reply
from handler.schemas import SCHEMAS


@pytest.mark.parametrize("schema", SCHEMAS)
def test_an_error_has_its_status_and_its_text_in_every_schema(schema: str) -> None:
    answer = error_reply(SCHEMAS[schema], RequestError("too näh", 504))
    assert (answer.status, answer.error) == (504, "too n\\xe4h")
    assert answer.headers == {"content-type": "application/json"}
    error = json.loads(answer.body)["error"]
    assert (error["message"] if schema == "completions" else error) == answer.error


def test_a_full_queue_says_when_to_come_back() -> None:
    answer = error_reply(SCHEMAS["outputs"], RequestError("full", 503))
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("error", [KeyError("a\nb"), ValueError()])
def test_what_nobody_expected_is_a_424_of_one_line(error: Exception) -> None:
    answer = error_reply(SCHEMAS["outputs"], error)
    assert answer.status == 424
    assert answer.error
    assert answer.error.isprintable()


def test_an_error_is_told_in_the_schemas_own_names() -> None:
    answer = error_reply(SCHEMAS["completions"], RequestError("parameter 'max_new_tokens' is 0"))
    assert answer.error == "parameter 'max_tokens' is 0"
