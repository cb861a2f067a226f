"""Replies -> djl's Output, in the form that each of DJL's modes needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Union

from handler.responses import Reply, StreamReply
from handler.schemas.records import JSON
from handler.streaming import AsyncStream, BlockingStream

if TYPE_CHECKING:
    from djl_python.outputs import Output

AnyReply = Union[Reply, "StreamReply[AsyncStream]", "StreamReply[BlockingStream]"]


def to_output(answer: Reply | StreamReply[BlockingStream]) -> Output:
    """For DJL's sync mode: one request, its own status."""
    from djl_python.outputs import Output

    output = Output(answer.status, getattr(answer, "error", None) or "OK")
    _add_headers(output, answer)
    if isinstance(answer, Reply):
        output.add(answer.body)
    elif hasattr(output, "add_stream_content"):
        output.add_stream_content(answer.stream, output_formatter=None)
    else:  # DJL 0.20 has no streams: the same records, all at the end
        output.add(b"".join(answer.stream))
    return output


def to_batch_output(answers: Sequence[Reply]) -> Output:
    """For DJL's dynamic batch: one status for all, so an error is told in that item's body."""
    from djl_python.outputs import Output

    output = Output()
    output.add_property("content-type", JSON)
    for index, answer in enumerate(answers):
        output.add(answer.body, key="data", batch_index=index)
    return output


def to_async_output(answer: Reply) -> Output:
    """For DJL's async mode: a binary map; of an error Java keeps what is in ``error`` only."""
    if answer.error is None:
        return _async_output(answer, {"data": answer.body.decode(), "last": True})
    error = {"error": answer.error, "code": answer.status, "last": True}
    return _async_output(answer, error)


async def to_async_outputs(answer: StreamReply[AsyncStream]) -> AsyncIterator[Output]:
    """For DJL's async mode: an Output for each piece. An error is a piece too: Java would write
    it in a form of its own.

    An empty one ends the stream. Java's ChunkedBytesSupplier notes the end before it has the last
    piece, and who looks in between never gets that.
    """
    try:
        async for piece in answer.stream:
            yield _async_output(answer, {"data": piece.decode(), "last": False})
        yield _async_output(answer, {"data": "", "last": True})
    finally:
        answer.stream.close()


def _async_output(answer: AnyReply, content: dict[str, object]) -> Output:
    from djl_python.outputs import Output

    output = Output()
    _add_headers(output, answer)
    output.add(Output.binary_encode(content))
    return output


def _add_headers(output: Output, answer: AnyReply) -> None:
    for name, value in answer.headers.items():
        output.add_property(name, value)
