"""Bodies in, replies out, without a server between: nothing raises, whatever comes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import BACKEND, lasting
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from handler.answering import Wanted
from handler.config import Configuration
from handler.parameters import PARAMETERS
from handler.responses import Reply, StreamReply
from handler.schemas.records import JSON_LINES
from handler.service import Service
from handler.streaming import AsyncStream
from handler.waiting import WaitingPrompts

WAIT = 60
GOOD = json.dumps({"inputs": "Write 7 in words."}).encode()


@pytest.fixture(scope="module")
def service(demo: Path) -> Iterator[Service]:
    service = Service()
    service.load(
        Configuration(model_id=str(demo), backend=BACKEND, max_output_tokens=8, request_timeout=30)
    )
    yield service
    service.close()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 30) | st.floats(0, 2) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)
# Mostly of the right shape, so that many get as far as the engine.
_BODIES = st.fixed_dictionaries(
    {"inputs": st.text(max_size=20) | st.lists(st.text(max_size=9), max_size=3) | _VALUES},
    optional={
        "parameters": st.dictionaries(st.sampled_from(sorted(PARAMETERS)), _VALUES, max_size=3)
        | _VALUES,
        "stream": _VALUES,
        "template": st.sampled_from(["{input}", "{a} {input}", "{{{input}}}"]) | _VALUES,
        "variables": st.dictionaries(st.sampled_from("ab"), st.text(max_size=3)) | _VALUES,
    },
)
_COMPLETIONS = st.fixed_dictionaries(
    {"prompt": st.text(max_size=20) | st.lists(st.text(max_size=9), max_size=3) | _VALUES},
    optional=dict.fromkeys(
        (
            *("max_tokens", "temperature", "top_p", "n", "best_of", "stop", "logprobs", "seed"),
            *("stream", "stream_options", "echo", "logit_bias", "user", "model", "top_k"),
        ),
        _VALUES,
    ),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_BODIES | _COMPLETIONS | _VALUES)
@example({"inputs": "x", "parameters": {"bad_words_list": ["\ud83d"]}})
@example({"inputs": "\ud83d"})
def test_any_json_is_answered_or_refused(service: Service, body: Any) -> None:
    (answer, good) = service.answer_batch([json.dumps(body).encode(), GOOD])
    assert_is_a_reply(answer)
    assert good.status == 200


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=40) | st.tuples(st.binary(), st.integers(0, 40)).map(lambda t: _cut(*t)))
@example(b"{}\n\x00")
@example(b"{}\n{")
def test_any_bytes_are_answered_or_refused(service: Service, body: bytes) -> None:
    (answer,) = service.answer_batch([body])
    if answer.headers.get("content-type") == JSON_LINES:  # it was objects on lines of their own
        for line in answer.body.splitlines():
            error = "error" in json.loads(line)
            assert_is_a_reply(replace(answer, body=line, status=400 if error else 200))
    else:
        assert_is_a_reply(answer)


def _cut(inserted: bytes, at: int) -> bytes:
    return GOOD[:at] + inserted + GOOD[at:]


def assert_is_a_reply(answer: Reply) -> None:
    body = json.loads(answer.body)
    if answer.status == 200:
        texts = body["outputs"] if "outputs" in body else [c["text"] for c in body["choices"]]
        assert all(isinstance(text, str) for text in texts)
    else:
        assert answer.status == 400
        error = body["error"]["message"] if isinstance(body["error"], dict) else body["error"]
        assert error.isprintable()
        assert error.isascii()


def test_sync_and_async_answers_are_the_same(service: Service) -> None:
    bodies = [GOOD, b"{}", json.dumps({"inputs": ["x", "y"]}).encode()]

    async def ask_all() -> list[Reply | StreamReply[AsyncStream]]:
        return list(await asyncio.gather(*map(service.answer_async, bodies)))

    assert asyncio.run(ask_all()) == service.answer_batch(bodies)


def test_a_long_body_does_not_hold_up_the_event_loop(service: Service) -> None:
    """Short ones are answered while it is read."""
    long = json.dumps({"inputs": "word " * 400_000}).encode()

    async def ask_both() -> tuple[list[str], Any]:
        order: list[str] = []

        async def ask(name: str, body: bytes) -> Any:
            answer = await service.answer_async(body)
            order.append(name)
            return answer

        refused, _ = await asyncio.gather(ask("long", long), ask("short", GOOD))
        return order, refused

    order, refused = asyncio.run(ask_both())
    assert order == ["short", "long"]
    assert "allowed are 1024 (option.max_input_tokens)" in json.loads(refused.body)["error"]


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, prompts that leave the queue come no farther."""
    go_on, take = threading.Event(), WaitingPrompts.take

    def take_and_stop(*arguments: Any) -> Any:
        taken = take(*arguments)
        assert not taken or go_on.wait(WAIT)
        return taken

    monkeypatch.setattr(WaitingPrompts, "take", take_and_stop)
    yield go_on
    go_on.set()


def test_a_cancelled_call_frees_its_rows(service: Service, go_on: threading.Event) -> None:
    async def leave() -> None:
        call = asyncio.create_task(
            service.answer_async(json.dumps({"inputs": ["x"] * 99}).encode())
        )
        while not service.model.waiting:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        go_on.set()

    asyncio.run(leave())
    # first come, first served: after this answer nothing of the cancelled call can be left
    assert service.answer(GOOD).status == 200
    assert service.model.waiting == 0


def test_a_call_cancelled_while_its_long_body_is_read_runs_nothing(service: Service) -> None:
    inputs = ["x" * 40_000, *["x"] * 99]
    parameters = {"truncate": True, "ignore_eos_token": True}

    async def leave() -> None:
        body = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
        call = asyncio.create_task(service.answer_async(body))
        await asyncio.sleep(0)  # the thread has it
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(leave())
    assert service.answer(GOOD).status == 200
    assert service.model.waiting == 0


# Streams


def stream_of(inputs: str, **parameters: Any) -> bytes:
    return json.dumps({"inputs": inputs, "stream": True, "parameters": parameters}).encode()


def test_blocking_and_async_streams_are_the_same(service: Service) -> None:
    body = stream_of("Count from 3 to 9.", details=True)

    async def read() -> bytes:
        answer = await service.answer_async(body)
        assert isinstance(answer, StreamReply)
        return b"".join([piece async for piece in answer.stream])

    answer = service.answer(body)
    assert isinstance(answer, StreamReply)
    blocking, others = b"".join(answer.stream), asyncio.run(read())
    assert [lasting(json.loads(line)) for line in blocking.splitlines()] == [
        lasting(json.loads(line)) for line in others.splitlines()
    ]


def test_many_streams_at_once_take_no_threads(service: Service) -> None:
    prompts = [f"Write {number} in words." for number in range(16)]

    async def text(prompt: str) -> str:
        answer = await service.answer_async(stream_of(prompt))
        assert isinstance(answer, StreamReply)
        pieces = [json.loads(piece) async for piece in answer.stream]
        assert set(threading.enumerate()) <= before
        return "".join(piece["token"]["text"] for piece in pieces)

    async def all_texts() -> list[str]:
        return list(await asyncio.gather(*map(text, prompts)))

    before = set(threading.enumerate())
    assert asyncio.run(all_texts()) == service.model.pipeline_generate(prompts, max_new_tokens=8)


def test_a_stream_in_a_batch_is_refused_alone(service: Service) -> None:
    refused, good = service.answer_batch([stream_of("x"), GOOD])
    assert "'stream' must be false where DJLServing batches" in str(refused.error)
    assert good.status == 200


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_before_the_first_token_has_a_status_of_its_own(
    service: Service, is_async: bool
) -> None:
    body = stream_of("word " * 5000)
    answer = asyncio.run(service.answer_async(body)) if is_async else service.answer(body)
    assert isinstance(answer, Reply)
    assert answer.status == 400


def test_a_call_cancelled_before_the_first_token_frees_its_row(
    service: Service, go_on: threading.Event
) -> None:
    async def leave() -> None:
        calls = [
            asyncio.create_task(service.answer_async(stream_of("x", ignore_eos_token=True)))
            for _ in range(2 * service.model.limits.max_rows)
        ]
        while not service.model.waiting:
            await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        go_on.set()

    asyncio.run(leave())
    assert service.answer(GOOD).status == 200
    assert service.model.waiting == 0


def test_a_route_may_have_its_own_schema(service: Service) -> None:
    answer = service.answer(GOOD, Wanted(route="generate"))
    assert isinstance(answer, Reply)
    assert set(json.loads(answer.body)) == {"generated_text"}
