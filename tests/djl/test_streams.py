"""Streams through DJL's own engine: many at once in async mode, one at a time in sync mode."""

from __future__ import annotations

import json
from typing import Any

import pytest

from djl.client import Answer, DjlClient, Request, StartDjl, ask, post
from handler.engines import Model

pytestmark = pytest.mark.djl

PROMPT = "Count from 3 to 9."
EVENT_STREAM = "text/event-stream"
ENDLESS = {"ignore_eos_token": True, "max_new_tokens": 500}


def stream(prompt: str, accept: str = "*/*", **parameters: Any) -> Request:
    body = {"inputs": prompt, "stream": True, "parameters": parameters}
    return post(json.dumps(body).encode(), Accept=accept)


def records(answer: Answer) -> list[Any]:
    assert answer.code == 200, answer
    if answer.properties["content-type"] == EVENT_STREAM:
        *events, end = answer.body.decode().split("\n\n")
        assert end == ""
        return [json.loads(event.removeprefix("data: ")) for event in events]
    assert answer.properties["content-type"] == "application/jsonlines"
    return [json.loads(line) for line in answer.body.splitlines()]


def text_of(answer: Answer) -> str:
    found = records(answer)
    text = "".join(record["token"]["text"] for record in found)
    assert text == found[-1]["generated_text"]
    return text


# Async mode


def test_sixteen_streams_at_once_are_what_whole_answers_are(
    asynchronous: DjlClient, model: Model
) -> None:
    prompts = [f"Write {number} in words." for number in range(101, 117)]
    expected = model.pipeline_generate(prompts)
    for accept in ("*/*", EVENT_STREAM):
        answers = asynchronous.predict_together([stream(prompt, accept) for prompt in prompts])
        assert list(map(text_of, answers)) == expected
    mixed = asynchronous.predict_together([stream(prompts[0]), ask(prompts[0])] * 8)
    assert {text_of(answer) for answer in mixed[::2]} == {expected[0]}
    assert all(answer.json() == {"outputs": expected[:1]} for answer in mixed[1::2])


def test_the_pieces_come_one_by_one(asynchronous: DjlClient) -> None:
    answer = asynchronous.predict(stream(PROMPT))
    assert answer.pieces == len(records(answer)) > 3


def test_completions(asynchronous: DjlClient, model: Model) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 100}
    whole = asynchronous.predict(post(json.dumps(body).encode())).json()
    expected = model.pipeline_generate([PROMPT])
    assert [choice["text"] for choice in whole["choices"]] == expected
    assert whole["model"] == "model"
    answer = asynchronous.predict(post(json.dumps({**body, "stream": True}).encode()))
    assert answer.properties["content-type"] == EVENT_STREAM
    *events, done, _ = answer.body.decode().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert ["".join(chunk["choices"][0]["text"] for chunk in chunks)] == expected


def test_an_error_before_the_first_token_has_its_status(asynchronous: DjlClient) -> None:
    requests = [stream("word " * 5000), post(b'{"inputs": ["a", "b"], "stream": true}')]
    requests += [post(b'{"prompt": "x", "n": 0}')]
    for answer in asynchronous.predict_together(requests):
        assert answer.code == 400
        assert answer.json() == {"code": 400, "error": answer.message}


def test_an_error_in_the_middle_is_the_last_record(start_djl: StartDjl) -> None:
    late = {"ignore_eos_token": True, "max_new_tokens": 5000}
    with start_djl("0.34.0", {"request_timeout": "1", "max_output_tokens": "5000"}) as client:
        for accept, fields in (
            ("*/*", {"code", "error"}),
            (EVENT_STREAM, {"code", "error", "error_type"}),
        ):
            for answer in client.predict_together([stream("x", accept, **late)] * 4):
                *tokens, last = records(answer)
                assert tokens
                assert all("token" in record for record in tokens)
                assert set(last) == fields
                assert (last["code"], "option.request_timeout" in last["error"]) == (504, True)


def test_a_stream_that_nobody_reads_holds_up_nobody(asynchronous: DjlClient, model: Model) -> None:
    """DJL tells no handler that a client left."""
    asynchronous.abandon([stream("x", **ENDLESS)] * 4)
    expected = {"outputs": model.pipeline_generate([PROMPT])}
    assert [a.json() for a in asynchronous.predict_together([ask(PROMPT)] * 4)] == [expected] * 4
    assert text_of(asynchronous.predict(stream(PROMPT))) == expected["outputs"][0]


# Sync mode


@pytest.mark.parametrize("accept", ["*/*", EVENT_STREAM])
def test_one_stream_after_another(
    sync: DjlClient, model: Model, accept: str, request: pytest.FixtureRequest
) -> None:
    prompts = [PROMPT, "Write 48 in words."]
    answers = sync.predict_in_turn([stream(prompt, accept) for prompt in prompts])
    assert list(map(text_of, answers)) == model.pipeline_generate(prompts)
    # 0.20 has no streams: the same records come all at the end
    at_once = request.node.callspec.params["sync"] == "0.20.0"
    assert [a.pieces for a in answers] == [1 if at_once else len(records(a)) for a in answers]
    assert sync.predict(ask(PROMPT)).json() == {"outputs": model.pipeline_generate([PROMPT])}


def test_an_error_before_the_first_token_in_sync_mode(sync: DjlClient) -> None:
    answer = sync.predict(stream("word " * 5000))
    assert answer.code == 400
    assert "allowed are 1024" in answer.json()["error"]


def test_a_stream_that_nobody_reads_in_sync_mode(sync: DjlClient, model: Model) -> None:
    sync.abandon([stream("x", **ENDLESS)])
    assert sync.predict(ask(PROMPT)).json() == {"outputs": model.pipeline_generate([PROMPT])}


def test_a_stream_in_a_dynamic_batch_is_refused_alone(sync: DjlClient, model: Model) -> None:
    good, refused = sync.batch_predict([ask(PROMPT), stream(PROMPT)])
    assert good.json() == {"outputs": model.pipeline_generate([PROMPT])}
    assert "'stream' must be false where DJLServing batches requests" in refused.json()["error"]
