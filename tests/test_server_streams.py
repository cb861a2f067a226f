"""Streams over HTTP, as plain clients read them: JSON lines and server-sent events."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import lasting, serving
from random_checkpoints import write_checkpoint
from test_server import (
    ENDLESS_OPTIONS,
    ENDLESS_REQUEST,
    PROMPT,
    PROMPTS,
    WAIT,
    ask,
    metric,
    texts_of,
    until,
)

JSON_LINES, EVENT_STREAM = "application/jsonlines", "text/event-stream"
COUNT = "Count from 3 to 9."


def lines(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == JSON_LINES
    assert reply.content.endswith(b"\n")
    return [json.loads(line) for line in reply.content.splitlines()]


def events(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == EVENT_STREAM
    *found, end = reply.content.split(b"\n\n")
    assert end == b""
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in found)
    return [json.loads(event[len(b"data: ") :]) for event in found]


def joined(records: list[Any]) -> str:
    return "".join(record["token"]["text"] for record in records)


@pytest.mark.parametrize("route", ["/invocations", "/predictions/demo", "/models/demo/invoke"])
def test_json_lines(server: httpx.Client, route: str) -> None:
    records = lines(server.post(route, json={"inputs": COUNT, "stream": True}))
    (text,) = texts_of(server, COUNT)
    assert joined(records) == records[-1]["generated_text"] == text
    assert len(records) > 3
    assert all(set(record) == {"token"} for record in records[:-1])


def test_stream_among_the_parameters(server: httpx.Client) -> None:
    body = {"inputs": COUNT, "parameters": {"stream": True, "details": True}}
    records = lines(server.post("/invocations", json=body))
    (whole,) = ask(server, COUNT, details=True)["details"]
    assert [r["token"]["id"] for r in records] == [token["id"] for token in whole["tokens"]]
    details, whole = lasting(records[-1]["details"]), lasting(whole)
    assert {name: details[name] for name in whole if name in details} == {
        name: value for name, value in whole.items() if name != "tokens"
    }


def test_server_sent_events_where_the_client_accepts_them(server: httpx.Client) -> None:
    body = {"inputs": COUNT, "stream": True}
    records = events(server.post("/invocations", json=body, headers={"accept": EVENT_STREAM}))
    assert joined(records) == records[-1]["generated_text"] == texts_of(server, COUNT)[0]
    assert [record["index"] for record in records] == list(range(1, len(records) + 1))


def test_tgis_routes(server: httpx.Client) -> None:
    (text,) = texts_of(server, COUNT)
    body = {"inputs": COUNT, "parameters": {"details": True}}
    whole = server.post("/generate", json=body).json()
    streamed = events(server.post("/generate_stream", json=body))
    assert whole["generated_text"] == joined(streamed) == text
    assert [record["token"] for record in streamed] == whole["details"]["tokens"]
    assert streamed[-1]["details"]["input_length"] == whole["details"]["input_tokens"]
    assert server.get("/health").status_code == 200
    assert server.get("/info").json()["model_id"] == "demo"


@pytest.mark.parametrize(
    ("headers", "extra", "is_tgis"),
    [
        ({}, {}, False),
        ({}, {"stream": False}, True),
        ({"user-agent": "unknown/None; hf_hub/1.33.0"}, {}, True),
        ({"user-agent": "@huggingface/inference/4.0.0"}, {}, True),
    ],
    ids=str,
)
def test_the_root_answers_tgis_clients_as_tgi_does(
    server: httpx.Client, headers: dict[str, str], extra: dict[str, Any], is_tgis: bool
) -> None:
    (text,) = texts_of(server, PROMPT)
    body = server.post("/", json={"inputs": PROMPT, **extra}, headers=headers).json()
    assert body == ([{"generated_text": text}] if is_tgis else {"outputs": [text]})
    streamed = server.post("/", json={"inputs": PROMPT, "stream": True}, headers=headers)
    assert joined(events(streamed)) == text


def test_completions_at_every_route(server: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 0}
    for route in ("/v1/completions", "/invocations", "/predictions/demo", "/"):
        (choice,) = server.post(route, json=body).json()["choices"]
        assert [choice["text"]] == texts_of(server, PROMPT), route
    streamed = server.post("/invocations", json={**body, "stream": True}).text.split("\n\n")
    assert streamed[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(piece[len("data: ") :]) for piece in streamed[:-2]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == choice["text"]


@pytest.mark.parametrize("path", ["/v1/models/other", "/v1/nothing", "/v1/completions"])
def test_errors_of_the_server_have_openais_form_there(server: httpx.Client, path: str) -> None:
    reply = server.get(path)
    assert reply.status_code in (404, 405)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_template_of_the_request(server: httpx.Client) -> None:
    body = {"inputs": ["7", "48"], "template": "Write {input} in {how}."}
    reply = server.post("/invocations", json={**body, "variables": {"how": "words"}})
    expected = texts_of(server, ["Write 7 in words.", "Write 48 in words."])
    assert reply.json() == {"outputs": expected}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/invocations", {"inputs": "word " * 5000, "stream": True}),
        ("/generate_stream", {"inputs": ["a", "b"]}),
        ("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 0}}),
        ("/v1/completions", {"prompt": "word " * 5000, "stream": True}),
    ],
    ids=str,
)
def test_an_error_before_the_first_token_has_its_status(
    server: httpx.Client, route: str, body: dict[str, Any]
) -> None:
    reply = server.post(route, json=body)
    assert reply.status_code == 400
    assert reply.headers["content-type"] == "application/json"
    assert "error" in reply.json()


def test_stop_sequences_are_never_sent(server: httpx.Client) -> None:
    (whole,) = texts_of(server, COUNT)
    stop = whole[len(whole) // 2 :][:4]
    body = {"inputs": COUNT, "stream": True, "parameters": {"stop": [stop]}}
    assert joined(lines(server.post("/invocations", json=body))) == whole[: whole.index(stop)]


def test_many_streams_at_once_are_what_each_is_alone(server: httpx.Client) -> None:
    prompts = [f"Write {37 * number} in words." for number in range(32)]

    async def text(client: httpx.AsyncClient, prompt: str) -> str:
        """Read as it comes, in whatever pieces."""
        body = {"inputs": prompt, "stream": True}
        async with client.stream("POST", "/invocations", json=body) as reply:
            return joined([json.loads(line) async for line in reply.aiter_lines()])

    async def all_texts() -> list[str]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60, limits=limits) as client:
            return list(await asyncio.gather(*(text(client, prompt) for prompt in prompts)))

    assert asyncio.run(all_texts()) == texts_of(server, prompts)


def test_metrics_count_streams_when_they_end(server: httpx.Client) -> None:
    before = metric(server, 'handler_requests_total{code="200"}')
    server.post("/invocations", json={"inputs": PROMPT, "stream": True})
    until(lambda: metric(server, 'handler_requests_total{code="200"}') == before + 1)


# Bytes


@pytest.fixture(scope="module")
def bytes_server(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[httpx.Client]:
    """A ByT5 of random weights, each of whose tokens is a byte."""
    folder = write_checkpoint(tmp_path_factory.mktemp("byt5"), "byt5", demo)
    with serving(str(folder), "--option=max_output_tokens=200") as (client, _):
        yield client


@pytest.mark.parametrize("accept", [JSON_LINES, EVENT_STREAM])
def test_characters_are_never_torn(bytes_server: httpx.Client, accept: str) -> None:
    for seed in range(4):
        parameters = {"temperature": 5.0, "seed": seed, "max_new_tokens": 200}
        body = {"inputs": "x", "stream": True, "parameters": parameters}
        reply = bytes_server.post("/invocations", json=body, headers={"accept": accept})
        records = lines(reply) if accept == JSON_LINES else events(reply)
        assert [joined(records)] == texts_of(bytes_server, "x", **parameters)


# Limits


@pytest.fixture(scope="module")
def patient() -> Iterator[httpx.Client]:
    """One row, all the time in the world."""
    with serving(*ENDLESS_OPTIONS, "--option=request_timeout=600") as (client, _):
        yield client


ENDLESS_STREAM = {**ENDLESS_REQUEST, "stream": True}


def test_tokens_come_before_the_end(patient: httpx.Client) -> None:
    with patient.stream("POST", "/invocations", json=ENDLESS_STREAM) as reply:
        read = reply.iter_lines()
        assert all("token" in json.loads(next(read)) for _ in range(3))


def test_a_client_that_leaves_frees_its_row(patient: httpx.Client) -> None:
    for route, body in (
        ("/invocations", ENDLESS_STREAM),
        ("/generate_stream", ENDLESS_REQUEST),
        ("/endpoints/any/invocations-response-stream", ENDLESS_STREAM),
    ):
        with patient.stream("POST", route, json=body) as reply:
            next(reply.iter_bytes())
        # there is one row: this would wait for ever
        assert ask(patient, PROMPT, max_tokens=5)


def test_a_client_that_leaves_before_the_first_token(patient: httpx.Client) -> None:
    with patient.stream("POST", "/invocations", json=ENDLESS_STREAM) as running:
        pieces = running.iter_bytes()  # httpx leaves where nobody holds its iterator
        next(pieces)
        with pytest.raises(httpx.ReadTimeout):
            patient.post("/invocations", json=ENDLESS_STREAM, timeout=0.5)
    # the one that waited would now have the only row, for ever
    assert ask(patient, PROMPT, max_tokens=5)


def test_a_client_that_does_not_read_holds_up_nobody_and_frees_its_row() -> None:
    long = {"ignore_eos_token": True, "max_new_tokens": 5000}
    body = {"inputs": "x", "stream": True, "parameters": long}
    with serving("--option=max_output_tokens=5000", "--option=max_rows=2") as (client, _):
        with client.stream("POST", "/generate_stream", json=body):
            assert ask(client, PROMPT)
            assert ask(client, PROMPTS)
            assert metric(client, "handler_prompts_running") == 1
        until(lambda: metric(client, "handler_prompts_running") == 0)


def test_time_out_is_a_record_of_the_stream_and_frees_the_row() -> None:
    with serving(*ENDLESS_OPTIONS, "--option=request_timeout=2") as (client, _):
        start = time.monotonic()
        *tokens, last = lines(client.post("/invocations", json=ENDLESS_STREAM))
        assert time.monotonic() - start < WAIT
        assert all("token" in record for record in tokens)
        assert last["code"] == 504
        assert "not done after 2 s (option.request_timeout)" in last["error"]
        last = events(client.post("/generate_stream", json=ENDLESS_REQUEST))[-1]
        assert (last["code"], last["error_type"]) == (504, "incomplete_generation")
        body = {"prompt": "x", "stream": True, "max_tokens": 1_000_000, "ignore_eos_token": True}
        last = events(client.post("/v1/completions", json=body))[-1]
        assert last["error"]["code"] == "timeout"
        assert ask(client, PROMPT, max_tokens=5)


def test_sigterm_finishes_streams() -> None:
    request = {
        "inputs": PROMPT,
        "stream": True,
        "parameters": {"ignore_eos_token": True, "max_new_tokens": 120},
    }
    with serving(*ENDLESS_OPTIONS) as (client, process), ThreadPoolExecutor() as threads:
        asked = threads.submit(client.post, "/invocations", json=request)
        until(lambda: metric(client, "handler_prompts_running") == 1)
        process.send_signal(signal.SIGTERM)
        assert len(lines(asked.result(WAIT))) == 120
        assert process.wait(WAIT) == 0


def test_log_prompts_writes_a_streams_text(demo: Path) -> None:
    log: list[str] = []
    with serving("--option=log_prompts=true", log=log) as (client, _):
        records = lines(client.post("/invocations", json={"inputs": PROMPT, "stream": True}))
    assert any(repr([joined(records)]) in line for line in log)
