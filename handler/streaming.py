"""One answer as a stream: token events of the engine's thread -> pieces of bytes, in time."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
import weakref
from concurrent.futures import CancelledError, Future

from handler.errors import RequestError, as_request_error
from handler.generation import GenerationResult, TokenEvent
from handler.schemas.protocol import StreamWriter

logger = logging.getLogger(__name__)


class Deadline:
    """When a request must be done.

    seconds: option.request_timeout.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._at - time.monotonic())

    def passed(self) -> RequestError:
        return RequestError(
            f"not done after {self._seconds:g} s (option.request_timeout); ask for fewer tokens or "
            "raise it",
            504,
        )


class BlockingEvents:
    """The events of one generation, for a reader that may wait in its thread.

    The engine's thread puts them in; None is the end of one that failed.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[TokenEvent | None] = queue.SimpleQueue()

    def put(self, event: TokenEvent | None) -> None:
        self._queue.put(event)

    def next(self, deadline: Deadline) -> TokenEvent | None:
        """Raises RequestError at the deadline."""
        try:
            return self._queue.get(timeout=deadline.left)
        except queue.Empty:
            raise deadline.passed() from None


class AsyncEvents:
    """The same for a reader on the event loop that runs where this is made; it takes no thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent | RequestError | None] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, event: TokenEvent | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody reads
            pass

    def end_at(self, deadline: Deadline) -> None:
        """One timer for the whole stream: a timeout of each token's own costs a task."""
        self._timer = self._loop.call_later(
            deadline.left, self._queue.put_nowait, deadline.passed()
        )

    async def next(self) -> TokenEvent | None:
        """Raises RequestError at the deadline."""
        event = await self._queue.get()
        if isinstance(event, RequestError):
            raise event
        return event

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Stream:
    """What both kinds share: what is written, and when it ends.

    An error is the last piece of a stream. Closing one, or dropping it, frees its row.
    """

    def __init__(
        self, future: Future[GenerationResult], writer: StreamWriter, deadline: Deadline
    ) -> None:
        self.media_type = writer.media_type
        self.ended = False
        self._future = future
        self._writer = writer
        self._deadline = deadline
        self._first: TokenEvent | None = None
        weakref.finalize(self, future.cancel)

    def close(self) -> None:
        """Nobody reads on; without effect at the end."""
        self.ended = True
        self._future.cancel()

    def _checked(self, event: TokenEvent | None) -> TokenEvent:
        if event is not None:
            return event
        try:
            error = self._future.exception(timeout=0)
        except CancelledError:
            error = None
        raise as_request_error(error or RequestError("the request was cancelled", 503))

    def _write(self, event: TokenEvent) -> bytes:
        piece = self._writer.token(event)
        self.ended = event.result is not None
        return piece

    def _write_error(self, error: Exception) -> bytes:
        if not isinstance(error, RequestError):
            logger.error("a stream failed", exc_info=error)
        self.close()
        return self._writer.error(as_request_error(error))


class BlockingStream(_Stream):
    """An iterator of pieces."""

    def __init__(
        self,
        events: BlockingEvents,
        future: Future[GenerationResult],
        writer: StreamWriter,
        deadline: Deadline,
    ) -> None:
        super().__init__(future, writer, deadline)
        self._events = events

    def open(self) -> None:
        """Wait for the first token. Raises RequestError where none comes."""
        self._first = self._next()

    def _next(self) -> TokenEvent:
        return self._checked(self._events.next(self._deadline))

    def __iter__(self) -> BlockingStream:
        return self

    def __next__(self) -> bytes:
        if self.ended:
            raise StopIteration
        first, self._first = self._first, None
        try:
            return self._write(first or self._next())
        except Exception as error:
            return self._write_error(error)


class AsyncStream(_Stream):
    """The same for an event loop."""

    def __init__(
        self,
        events: AsyncEvents,
        future: Future[GenerationResult],
        writer: StreamWriter,
        deadline: Deadline,
    ) -> None:
        super().__init__(future, writer, deadline)
        self._events = events

    async def open(self) -> None:
        """Wait for the first token. Raises RequestError where none comes."""
        self._events.end_at(self._deadline)
        self._first = await self._next()

    def close(self) -> None:
        super().close()
        self._events.close()

    async def _next(self) -> TokenEvent:
        return self._checked(await self._events.next())

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> bytes:
        if self.ended:
            raise StopAsyncIteration
        first, self._first = self._first, None
        try:
            return self._write(first or await self._next())
        except Exception as error:
            return self._write_error(error)
