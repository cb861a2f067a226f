"""Bodies of several lines, as SageMaker's batch transform sends them: as many lines come back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import BACKEND
from hypothesis import given
from hypothesis import strategies as st

from handler.answering import Wanted
from handler.config import Configuration
from handler.request_lines import JSON_LINES_TYPES, split_lines
from handler.responses import Reply
from handler.service import Service

PROMPTS = ["Write 7 in words.", "Count from 3 to 9.", "Write 48 in words."]
TEXTS = ["seven", "3, 4, 5, 6, 7, 8, 9", "forty eight"]
ANSWERS = [{"outputs": [text]} for text in TEXTS]
OBJECTS = "\n".join(json.dumps({"inputs": prompt}) for prompt in PROMPTS).encode()


@pytest.fixture(scope="module")
def service(demo: Path) -> Iterator[Service]:
    service = Service()
    service.load(Configuration(model_id=str(demo), backend=BACKEND, max_queue=8))
    yield service
    service.close()


def answered(service: Service, body: bytes, content_type: str = "application/jsonlines") -> Any:
    """The lines of the answer; the sync and the async door give the same."""
    wanted = Wanted(content_type=content_type)
    reply = service.answer(body, wanted)
    assert isinstance(reply, Reply)
    assert asyncio.run(service.answer_async(body, wanted)) == reply
    if reply.status != 200:
        return reply
    assert reply.headers["content-type"] == "application/jsonlines"
    assert reply.body.endswith(b"\n")
    return [json.loads(line) for line in reply.body.splitlines()]


@pytest.mark.parametrize("content_type", JSON_LINES_TYPES)
def test_json_lines(service: Service, content_type: str) -> None:
    assert answered(service, OBJECTS, content_type + "; charset=utf-8") == ANSWERS
    strings = "\r\n".join(map(json.dumps, PROMPTS)).encode()
    assert answered(service, strings + b"\r\n\n", content_type) == ANSWERS
    assert answered(service, OBJECTS.split(b"\n")[0], content_type) == ANSWERS[:1]


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
def test_objects_on_lines_of_their_own_need_no_content_type(
    service: Service, content_type: str
) -> None:
    assert answered(service, OBJECTS, content_type) == ANSWERS


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_request(service: Service, content_type: str, indent: int | None) -> None:
    body = json.dumps({"inputs": PROMPTS[0]}, indent=indent).encode()
    reply = service.answer(body, Wanted(content_type=content_type))
    assert isinstance(reply, Reply)
    assert reply.headers["content-type"] == "application/json"
    assert json.loads(reply.body) == ANSWERS[0]


def test_lines_of_text(service: Service) -> None:
    assert answered(service, "\n".join(PROMPTS).encode(), "text/plain") == ANSWERS


def test_rows_of_csv(service: Service) -> None:
    rows = b'"Write 7 in words."\r\nCount from 3 to 9.\r\n"Write ""48"" in words."\r\n'
    texts = [request.fields()["inputs"] for request in split_lines(rows, "text/csv") or ()]
    assert texts == [*PROMPTS[:2], 'Write "48" in words.']
    assert answered(service, rows, "text/csv")[:2] == ANSWERS[:2]


@pytest.mark.parametrize(
    ("content_type", "line", "words"),
    [
        ("application/jsonlines", b"{", "not JSON"),
        ("application/jsonlines", b"[1]", "must be a JSON object or a string, got [1]"),
        ("application/jsonlines", b'{"inputs": 5}', "must be a string or a list of strings, got 5"),
        ("application/jsonlines", b'{"inputs": "x", "stream": true}', "'stream' must be false"),
        ("application/jsonlines", b'"\xff"', "not UTF-8"),
        ("application/jsonlines", b"  ", "the line is empty"),
        ("text/plain", b"\xff", "not UTF-8"),
        ("text/plain", b"", "the line is empty"),
        ("text/csv", b"a,b", "must have one column, the input, got 2"),
        ("text/csv", b'"a', "not CSV"),
    ],
    ids=str,
)
def test_a_bad_line_is_told_in_its_place(
    service: Service, content_type: str, line: bytes, words: str
) -> None:
    good = json.dumps(PROMPTS[0]).encode() if "json" in content_type else PROMPTS[0].encode()
    first, bad, last = answered(service, b"\n".join([good, line, good]), content_type)
    assert first == last == ANSWERS[0]
    assert bad["code"] == 400
    assert words in bad["error"]


def test_more_lines_than_the_queue_holds(service: Service) -> None:
    numbers = range(20, 60)
    assert service.configuration.max_queue < len(numbers) < 4 * service.model.limits.max_rows
    body = "\n".join(f"Write {n} in words." for n in numbers).encode()
    reply = service.answer(body, Wanted(content_type="text/plain"))
    assert isinstance(reply, Reply)
    texts = [json.loads(line)["outputs"][0] for line in reply.body.splitlines()]
    assert [text.split()[0] for text in texts[::10]] == ["twenty", "thirty", "forty", "fifty"]


def test_a_full_queue_is_the_answer_to_all_lines(service: Service) -> None:
    """Who sent them tries again; a 200 would lose the lines that found no room."""
    body = json.dumps({"inputs": ["x"] * 8}).encode()
    reply = asyncio.run(service.answer_async(b"\n".join([body] * 9)))
    assert isinstance(reply, Reply)
    assert reply.status == 503
    assert reply.headers["retry-after"]
    assert service.answer_batch([b'{"inputs": "x"}'])[0].status == 200


def test_lines_within_djls_dynamic_batch(service: Service) -> None:
    single, lines, bad = service.answer_batch([b'{"inputs": "Write 7 in words."}', OBJECTS, b"{"])
    assert json.loads(single.body) == ANSWERS[0]
    assert [json.loads(line) for line in lines.body.splitlines()] == ANSWERS
    assert bad.status == 400


def test_the_server_takes_the_content_type(server: httpx.Client) -> None:
    body, headers = "\n".join(PROMPTS), {"content-type": "text/plain"}
    for route in ("/invocations", "/endpoints/x/invocations"):
        reply = server.post(route, content=body, headers=headers)
        assert reply.headers["content-type"] == "application/jsonlines"
        assert [json.loads(line) for line in reply.text.splitlines()] == ANSWERS


@given(st.binary(), st.sampled_from([*JSON_LINES_TYPES, "text/plain", "text/csv", "", "x/y"]))
def test_any_bytes_make_as_many_requests_as_lines(content: bytes, content_type: str) -> None:
    requests = split_lines(content, content_type)
    if requests is not None:
        assert len(requests) == len(content.rstrip().split(b"\n"))
