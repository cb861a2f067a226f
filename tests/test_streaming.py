"""One answer as a stream: pieces in time, an error as the last one, and a row that is freed."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from handler.errors import RequestError
from handler.generation import GenerationResult, TokenEvent
from handler.schemas import SCHEMAS
from handler.schemas.protocol import Deployment, StreamWriter
from handler.streaming import AsyncEvents, AsyncStream, BlockingEvents, BlockingStream, Deadline
from handler.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_id
RESULT = GenerationResult("ab", (100, 101, EOS), (-0.5,) * 3, "eos_token", input_tokens=2)
EVENTS = [TokenEvent("a", 100, -0.5), TokenEvent("b", 101, -0.5), TokenEvent("", EOS, 0.0, RESULT)]
LONG = Deadline(3600)  # it begins when this file is read

Put = Callable[[Any], None]


def writer() -> StreamWriter:
    request = SCHEMAS["lmi"].parse({"inputs": "x", "stream": True}, Deployment())
    return SCHEMAS["lmi"].stream(request, TOKENIZER, "")


def read(
    is_async: bool,
    engine: Callable[[Put, Future[GenerationResult]], None],
    deadline: Deadline = LONG,
) -> tuple[list[Any], Future[GenerationResult]]:
    """The records of a stream whose events come from ``engine``, in a thread of its own."""
    future: Future[GenerationResult] = Future()
    pieces = asyncio.run(_read_async(engine, future, deadline)) if is_async else None
    if pieces is None:
        events = BlockingEvents()
        threading.Thread(target=engine, args=(events.put, future)).start()
        stream = BlockingStream(events, future, writer(), deadline)
        stream.open()
        pieces = list(stream)
    return [json.loads(piece) for piece in pieces], future


async def _read_async(
    engine: Callable[[Put, Future[GenerationResult]], None],
    future: Future[GenerationResult],
    deadline: Deadline,
) -> list[bytes]:
    events = AsyncEvents()
    threading.Thread(target=engine, args=(events.put, future)).start()
    stream = AsyncStream(events, future, writer(), deadline)
    await stream.open()
    return [piece async for piece in stream]


both = pytest.mark.parametrize("is_async", [False, True], ids=["blocking", "async"])


@both
def test_pieces_are_records_to_the_last(is_async: bool) -> None:
    def engine(put: Put, future: Future[GenerationResult]) -> None:
        for event in EVENTS:
            put(event)

    records, _ = read(is_async, engine)
    assert [record["token"]["text"] for record in records] == ["a", "b", ""]
    assert records[-1]["generated_text"] == "ab"


@both
def test_an_error_in_the_middle_is_the_last_record(is_async: bool) -> None:
    def engine(put: Put, future: Future[GenerationResult]) -> None:
        put(EVENTS[0])
        future.set_exception(RequestError("the engine broke", 424))
        put(None)

    records, _ = read(is_async, engine)
    assert [set(record) for record in records] == [{"token"}, {"code", "error"}]
    assert records[-1] == {"code": 424, "error": "the engine broke"}


@both
def test_an_error_before_the_first_token_is_raised(is_async: bool) -> None:
    def engine(put: Put, future: Future[GenerationResult]) -> None:
        future.set_exception(MemoryError("no more"))
        put(None)

    with pytest.raises(RequestError, match="out of memory") as caught:
        read(is_async, engine)
    assert caught.value.code == 507


@both
def test_the_deadline_ends_a_stream_with_an_error_and_frees_its_row(is_async: bool) -> None:
    def engine(put: Put, future: Future[GenerationResult]) -> None:
        put(EVENTS[0])

    records, future = read(is_async, engine, Deadline(1))
    assert records[-1]["code"] == 504
    assert "not done after 1 s (option.request_timeout)" in records[-1]["error"]
    assert future.cancelled()


@both
def test_the_deadline_before_the_first_token_is_raised(is_async: bool) -> None:
    with pytest.raises(RequestError) as caught:
        read(is_async, lambda put, future: None, Deadline(0.05))
    assert caught.value.code == 504


@both
def test_tokens_that_json_cannot_tell_end_a_stream(is_async: bool) -> None:
    def engine(put: Put, future: Future[GenerationResult]) -> None:
        put(EVENTS[0])
        put(TokenEvent("b", 101, float("-inf")))

    records, future = read(is_async, engine)
    assert records[-1]["code"] == 424
    assert future.cancelled()


def test_a_stream_that_nobody_holds_frees_its_row() -> None:
    future: Future[GenerationResult] = Future()
    stream = BlockingStream(BlockingEvents(), future, writer(), LONG)
    assert not future.cancelled()
    del stream
    gc.collect()
    assert future.cancelled()


def test_a_closed_stream_ends() -> None:
    future: Future[GenerationResult] = Future()
    events = BlockingEvents()
    stream = BlockingStream(events, future, writer(), LONG)
    events.put(EVENTS[0])
    stream.close()
    assert list(stream) == []
    assert future.cancelled()


def test_events_for_a_loop_that_is_closed_are_dropped() -> None:
    async def make() -> AsyncEvents:
        return AsyncEvents()

    asyncio.run(make()).put(EVENTS[0])


def test_time_left_is_never_negative() -> None:
    deadline = Deadline(0.01)
    time.sleep(0.02)
    assert deadline.left == 0.0
