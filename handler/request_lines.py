"""A body of several requests, a line each, as SageMaker's batch transform joins records."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from handler.errors import RequestError, shown
from handler.request_parsing import UnreadRequest, decoded, parse_json
from handler.responses import Reply
from handler.schemas.records import JSON_LINES, as_line

JSON_LINES_TYPES = (
    JSON_LINES,
    "application/jsonl",
    "application/x-jsonlines",
    "application/x-ndjson",
)
TEXT, CSV = "text/plain", "text/csv"

# What keeps the server from answering is no line's own affair: who sent them may try again.
_OF_ALL_LINES = (503, 504, 507)


def split_lines(content: bytes, content_type: str = "") -> list[UnreadRequest] | None:
    """A body's requests, or None where all of it is one.

    Lines are told by the content type; JSON objects on lines of their own also without it, as a
    text/plain body that begins like an object is JSON. Blank lines at the end do not count.
    """
    media_type = content_type.split(";")[0].strip().lower()
    stripped = content.strip()
    if not stripped:
        return None
    if media_type in JSON_LINES_TYPES:
        parse = parse_line
    elif media_type == CSV:
        parse = _parse_row
    elif media_type == TEXT and not stripped.startswith((b"{", b"\xef\xbb\xbf{")):
        parse = _parse_text
    elif _are_objects(stripped):
        parse = parse_line
    else:
        return None
    lines = content.rstrip().split(b"\n")
    return [UnreadRequest(line, partial(_not_blank, parse=parse)) for line in lines]


def is_of_all_lines(reply: Reply) -> bool:
    """Whether it is the answer to the whole body: the server could not, or not in time."""
    return reply.status in _OF_ALL_LINES


def lines_reply(replies: Sequence[Reply]) -> Reply:
    """A JSON line for each. A line's own error is told in its place."""
    for reply in filter(is_of_all_lines, replies):
        return reply
    body = b"".join(as_line(reply.body.decode()) for reply in replies)
    return Reply(body, headers={"content-type": JSON_LINES})


def parse_line(line: bytes) -> dict[str, Any]:
    """A JSON object, or a string that is its ``inputs``. Raises RequestError."""
    value = parse_json(line)
    if isinstance(value, str):
        return {"inputs": value}
    if not isinstance(value, dict):
        raise RequestError(f"a line must be a JSON object or a string, got {shown(value)}")
    return value


def _not_blank(line: bytes, parse: Any) -> dict[str, Any]:
    if not line.strip():
        raise RequestError("the line is empty")
    fields: dict[str, Any] = parse(line)
    return fields


def _parse_text(line: bytes) -> dict[str, Any]:
    return {"inputs": decoded(line.rstrip(b"\r"))}


def _parse_row(line: bytes) -> dict[str, Any]:
    text = decoded(line.rstrip(b"\r"))
    try:
        (row,) = csv.reader([text], strict=True)
    except csv.Error as error:
        raise RequestError(f"the line is not CSV: {error}") from None
    if len(row) != 1:
        raise RequestError(
            f"a line of CSV must have one column, the input, got {len(row)}; put a text with "
            "commas between double quotes"
        )
    return {"inputs": row[0]}


def _are_objects(content: bytes) -> bool:
    """Whether it is JSON objects, each on a line of its own, and not one value.

    One that is cut off is answered in its line's place; what does not begin as an object is none.
    """
    first, newline, others = content.partition(b"\n")
    first = first.strip()
    if not newline or not first.startswith((b"{", b"\xef\xbb\xbf{")) or not first.endswith(b"}"):
        return False
    lines = (line.strip() for line in others.split(b"\n"))
    if not all(line.startswith(b"{") for line in lines if line):
        return False
    try:
        json.loads(content)
    except RecursionError:
        return False
    except ValueError:
        return True
    return False
