"""Bodies in, replies out, without a server between: nothing raises, whatever comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import BACKEND
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from handler.config import Configuration
from handler.errors import RequestError
from handler.generation import GenerationResult
from handler.parameters import PARAMETERS, GenerationParameters
from handler.request_parsing import ParsedRequest
from handler.responses import Reply, reply
from handler.service import Service
from handler.tokenizer import ByteTokenizer

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
    },
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_BODIES | _VALUES)
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
def test_any_bytes_are_answered_or_refused(service: Service, body: bytes) -> None:
    assert_is_a_reply(service.answer(body))


def _cut(inserted: bytes, at: int) -> bytes:
    return GOOD[:at] + inserted + GOOD[at:]


def assert_is_a_reply(answer: Reply) -> None:
    body = json.loads(answer.body)
    if answer.status == 200:
        assert all(isinstance(text, str) for text in body["outputs"])
    else:
        assert answer.status == body["code"] == 400
        assert body["error"].isprintable()
        assert body["error"].isascii()


def test_sync_and_async_answers_are_the_same(service: Service) -> None:
    bodies = [GOOD, b"{}", json.dumps({"inputs": ["x", "y"]}).encode()]

    async def ask_all() -> list[Reply]:
        return list(await asyncio.gather(*map(service.answer_async, bodies)))

    assert asyncio.run(ask_all()) == service.answer_batch(bodies)


def test_a_long_body_does_not_hold_up_the_event_loop(service: Service) -> None:
    """Short ones are answered while it is read."""
    long = json.dumps({"inputs": "word " * 400_000}).encode()

    async def ask_both() -> tuple[list[str], Reply]:
        order: list[str] = []

        async def ask(name: str, body: bytes) -> Reply:
            answer = await service.answer_async(body)
            order.append(name)
            return answer

        refused, _ = await asyncio.gather(ask("long", long), ask("short", GOOD))
        return order, refused

    order, refused = asyncio.run(ask_both())
    assert order == ["short", "long"]
    assert "allowed are 1024 (option.max_input_tokens)" in json.loads(refused.body)["error"]


def test_a_cancelled_call_frees_its_rows(service: Service) -> None:
    async def leave() -> None:
        call = asyncio.create_task(
            service.answer_async(json.dumps({"inputs": ["x"] * 99}).encode())
        )
        while not service.model.waiting:
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])

    asyncio.run(leave())
    # first come, first served: after this answer nothing of the cancelled call can be left
    assert service.answer(GOOD).status == 200
    assert service.model.waiting == 0


# Schemas


RESULT = GenerationResult(
    text="seven",
    token_ids=(10, 1),
    log_probs=(-0.25, -0.5),
    finish_reason="eos_token",
    input_tokens=4,
)
DETAILS = {
    "finish_reason": "eos_token",
    "generated_tokens": 2,
    "input_tokens": 4,
    "truncated": False,
    "cumulative_log_prob": -0.75,
    "tokens": [
        {"id": 10, "text": "\x07", "log_prob": -0.25},
        {"id": 1, "text": "</s>", "log_prob": -0.5},
    ],
}


@pytest.mark.parametrize(
    ("schema", "inputs", "details", "body"),
    [
        ("outputs", "a", False, {"outputs": ["seven"]}),
        ("outputs", ["a", "b"], False, {"outputs": ["seven", "seven"]}),
        ("outputs", "a", True, {"outputs": ["seven"], "details": [DETAILS]}),
        ("lmi", "a", False, {"generated_text": "seven"}),
        ("lmi", "a", True, {"generated_text": "seven", "details": DETAILS}),
        ("lmi", ["a"], False, [{"generated_text": "seven"}]),
        ("lmi", ["a", "b"], False, [{"generated_text": "seven"}] * 2),
        ("tgi", "a", False, [{"generated_text": "seven"}]),
        ("tgi", "a", True, [{"generated_text": "seven", "details": DETAILS}]),
        ("tgi", ["a", "b"], False, [{"generated_text": "seven"}] * 2),
    ],
)
def test_schemas(schema: str, inputs: Any, details: bool, body: Any) -> None:
    assert json.loads(_reply(schema, inputs, details, RESULT).body) == body


def test_log_probs_that_the_engine_does_not_tell_are_null() -> None:
    body = json.loads(_reply("lmi", "a", True, replace(RESULT, log_probs=())).body)
    assert body["details"]["cumulative_log_prob"] is None
    assert [token["log_prob"] for token in body["details"]["tokens"]] == [None, None]


def test_log_probs_that_json_cannot_tell_are_an_error() -> None:
    for log_prob in (float("nan"), float("-inf")):
        result = replace(RESULT, log_probs=(-0.5, log_prob))
        with pytest.raises(RequestError, match=r"option\.dtype") as caught:
            _reply("outputs", "a", True, result)
        assert caught.value.code == 424


def _reply(schema: str, inputs: Any, details: bool, result: GenerationResult) -> Reply:
    is_list = isinstance(inputs, list)
    request = ParsedRequest(
        tuple(inputs) if is_list else (inputs,), is_list, GenerationParameters(details=details)
    )
    return reply(request, [result] * len(request.inputs), schema, ByteTokenizer())
