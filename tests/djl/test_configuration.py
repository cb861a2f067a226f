"""Configuration comes with DJL's first call and is frozen; what clients send is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from djl.client import SYNC, DjlClient, DjlStartFailed, StartDjl, ask, form, post
from handler.engines import Model

pytestmark = pytest.mark.djl

HEADERS = [
    {"model_id": "/nowhere"},
    {"batch_size": "3"},
    {"batch_size": "many"},
    {"trust_remote_code": "true"},
    {"dtype": "int4"},
    {"response_schema": "tgi"},
    {"max_output_tokens": "1", "max_input_tokens": "1", "request_timeout": "0.001"},
    {"OPTION_DTYPE": "int4", "option.dtype": "int4"},
]
BODY = b'{"inputs": "Write 7 in words."}'


def test_headers_change_nothing(sync: DjlClient, model: Model) -> None:
    expected = {"outputs": model.pipeline_generate(["Write 7 in words."])}
    requests = [post(BODY, **headers) for headers in HEADERS]
    for answers in (
        sync.predict_in_turn(requests),
        sync.batch_predict(requests),
        sync.predict_in_turn([post(BODY)]),
    ):
        assert [(a.code, a.json()) for a in answers] == [(200, expected)] * len(answers)


def test_headers_change_nothing_in_async_mode(asynchronous: DjlClient, model: Model) -> None:
    expected = {"outputs": model.pipeline_generate(["Write 7 in words."])}
    answers = asynchronous.predict_together([post(BODY, **headers) for headers in HEADERS])
    answers.append(asynchronous.predict(post(BODY)))
    assert [(a.code, a.json()) for a in answers] == [(200, expected)] * len(answers)


def test_options_hold_for_good(start_djl: StartDjl, model: Model) -> None:
    with start_djl("0.34.0", {"response_schema": "lmi", "max_output_tokens": "9"}) as client:
        request = ask("Write 7 in words.", max_new_tokens=9)
        expected = model.pipeline_generate(["Write 7 in words."], max_new_tokens=9)
        assert client.predict(request).json() == {"generated_text": expected[0]}

        headers = {"response_schema": "outputs", "max_output_tokens": "100"}
        client.predict(form({}, **headers))
        refused = client.predict(post(b'{"inputs": "x", "parameters": {"max_tokens": 10}}'))
        assert "at most 9 (option.max_output_tokens)" in refused.message
        assert client.predict(request).json() == {"generated_text": expected[0]}


def test_a_load_failure_ends_the_worker_with_its_reason(
    start_djl: StartDjl, unpacked: Path
) -> None:
    with (
        pytest.raises(DjlStartFailed) as failed,
        start_djl("0.34.0", {"dtype": "fp99", **SYNC["0.34.0"]}),
    ):
        pass
    log = str(failed.value)
    assert "LoadError: option.dtype must be one of auto, fp32" in log
    # it was the folder's package that ran, not the one that is installed for the tests
    assert str(unpacked / "handler" / "service.py") in log


def test_a_client_cannot_load_what_djl_could_not(start_djl: StartDjl, demo: Path) -> None:
    """DJL 0.20 sends requests to a worker that failed to load, empty forms among them."""
    with start_djl("0.20.0", {"dtype": "fp99"}) as client:
        client.predict(form({}, model_id=str(demo)))
        answer = client.predict(ask("Write 7 in words."))
    assert answer.code == 424
    assert "option.dtype must be one of auto, fp32" in answer.json()["error"]
