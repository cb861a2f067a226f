"""Bytes of a body -> a JSON object. What is none is in bad_requests.py."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import RequestError
from handler.request_parsing import parse_body

_TEXT = st.text(st.characters(codec="utf-8"))
_JSON = st.recursive(
    _TEXT
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
)


@given(st.dictionaries(_TEXT, _JSON), st.booleans())
def test_any_object_is_read_as_it_was_written(body: dict[str, object], ascii_only: bool) -> None:
    assert parse_body(json.dumps(body, ensure_ascii=ascii_only).encode()) == body


def test_a_byte_order_mark_is_no_part_of_it() -> None:
    assert parse_body(b'\xef\xbb\xbf {"a": 1}\n') == {"a": 1}


@given(st.binary())
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        body = parse_body(content)
    except RequestError:
        return
    assert isinstance(body, dict)


def test_an_object_within_another_is_read_as_strictly() -> None:
    with pytest.raises(RequestError, match="the field 'a' occurs twice"):
        parse_body(b'{"x": [{"a": 1, "a": 2}]}')
