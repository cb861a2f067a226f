"""Every bad request is a 400 of its own, says why in one line, and leaves its neighbours alone."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from bad_requests import BAD_COMPLETIONS, BAD_REQUESTS

GOOD = {"inputs": "Write 7 in words."}


@pytest.mark.parametrize(
    ("body", "words"), [pytest.param(b, w, id=name) for name, b, w in BAD_REQUESTS]
)
def test_is_refused_with_its_reason(server: httpx.Client, body: bytes, words: str) -> None:
    reply = server.post("/invocations", content=body)
    assert reply.status_code == 400
    error = reply.json()
    assert error["code"] == 400
    assert words in error["error"]
    assert error["error"].isprintable()
    assert error["error"].isascii()
    assert len(error["error"]) < 1000


@pytest.mark.parametrize("route", ["/v1/completions", "/invocations"])
@pytest.mark.parametrize(
    ("body", "words", "param"),
    [pytest.param(b, w, p, id=name) for name, b, w, p in BAD_COMPLETIONS],
)
def test_is_refused_in_openais_form(
    server: httpx.Client, route: str, body: bytes, words: str, param: str | None
) -> None:
    reply = server.post(route, content=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert words in error["message"]
    assert error["message"].isprintable()
    assert error["message"].isascii()
    assert error == {
        "message": error["message"],
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }


@pytest.mark.parametrize("body", [b"", b"[]", b'{"inputs": "x"}', b'{"prompt": NaN}'])
def test_what_is_no_completions_request_is_refused_in_openais_form_too(
    server: httpx.Client, body: bytes
) -> None:
    reply = server.post("/v1/completions", content=body)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_there_are_many() -> None:
    bodies = [body for _, body, *_ in [*BAD_REQUESTS, *BAD_COMPLETIONS]]
    assert len(set(bodies)) == len(bodies) >= 150


def test_neighbours_of_bad_requests_are_answered(server: httpx.Client) -> None:
    expected = server.post("/invocations", json=GOOD).json()

    async def send_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as client:
            calls = []
            for _, body, _ in BAD_REQUESTS:
                calls.append(client.post("/invocations", content=body))
                calls.append(client.post("/invocations", json=GOOD))
            return list(await asyncio.gather(*calls))

    replies = asyncio.run(send_all())
    assert {reply.status_code for reply in replies[::2]} == {400}
    assert [reply.json() for reply in replies[1::2]] == [expected] * len(BAD_REQUESTS)
