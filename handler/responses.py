"""What goes back to one client, whoever sends it: a whole body, or a stream of pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from handler.errors import RequestError, one_line
from handler.generation import GenerationResult
from handler.schemas.protocol import ParsedRequest, Schema
from handler.schemas.records import JSON, to_json
from handler.streaming import AsyncStream, BlockingStream
from handler.tokenizer import Tokenizer

# Seconds after which a client that met a full queue may try again.
_RETRY_AFTER = "1"

AnyStream = TypeVar("AnyStream", AsyncStream, BlockingStream)


@dataclass(frozen=True)
class Reply:
    """A whole answer. error: what went wrong, in one line of ASCII; None where nothing did."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": JSON})
    error: str | None = None


@dataclass(frozen=True)
class StreamReply(Generic[AnyStream]):
    """An answer in pieces, the first of which is there: its status is 200 for good."""

    stream: AnyStream
    headers: dict[str, str]
    status: int = 200


def reply(
    schema: Schema,
    request: ParsedRequest,
    results: Sequence[GenerationResult],
    tokenizer: Tokenizer,
) -> Reply:
    """Answer ``request``. Raises RequestError for results that JSON cannot tell."""
    return Reply(to_json(schema.answer(request, results, tokenizer)).encode())


def stream_reply(stream: AnyStream) -> StreamReply[AnyStream]:
    """Without what proxies would hold back."""
    headers = {
        "content-type": stream.media_type,
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    return StreamReply(stream, headers)


def error_reply(schema: Schema, error: Exception) -> Reply:
    """The answer to a request that failed. An error that is not a RequestError is a 424."""
    if not isinstance(error, RequestError):
        error = RequestError(one_line(str(error)) or type(error).__name__, 424)
    error = schema.worded(error)
    headers = {"content-type": JSON}
    if error.code == 503:
        headers["retry-after"] = _RETRY_AFTER
    return Reply(to_json(schema.error(error)).encode(), error.code, headers, str(error))
