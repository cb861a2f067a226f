"""Bodies of requests -> replies: one, several together, or as a stream; waiting or awaited."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from handler.config import Configuration
from handler.engines import Model
from handler.errors import RequestError
from handler.generation import GenerationRequest, GenerationResult, TokenEvent
from handler.request_lines import is_of_all_lines, lines_reply, split_lines
from handler.request_parsing import UnreadRequest
from handler.responses import Reply, StreamReply, error_reply, reply, stream_reply
from handler.schemas import recognized, schema_before_reading
from handler.schemas.protocol import Deployment, ParsedRequest, Schema, StreamWriter
from handler.streaming import AsyncEvents, AsyncStream, BlockingEvents, BlockingStream, Deadline

logger = logging.getLogger(__name__)

# Reading and tokenizing a longer body takes long enough to hold up an event loop.
_LONG_BODY = 4_096
# And so does making the first guide of a large vocabulary.
_REGEX, _GRAMMAR = b"regex", b"grammar"
# Writing a longer answer does, too.
_LONG_ANSWER = 5_000  # tokens
# Lines of one body that wait at the same time, for each row: others' requests find room.
_LINES_PER_ROW = 4
_NO_STREAMS = (
    "parameter 'stream' must be false where DJLServing batches requests, and in lines; set "
    "batch_size=1 in serving.properties, or send it alone, to stream"
)
_NO_STREAMS_ON_RANKS = (
    "parameter 'stream' must be false where every MPI rank gets every request; set "
    "option.use_passive_workers=true or engine=Python to stream"
)


@dataclass(frozen=True)
class Wanted:
    """What a client says of its answer besides its body.

    accept: its header of that name. route: the schema of the route it came by, or ``root``; None
    where option.response_schema holds. streams: the route streams whatever the body says.
    content_type: its header of that name, which may say that its body has several lines.
    """

    accept: str = ""
    content_type: str = ""
    route: str | None = None
    streams: bool = False


@dataclass(frozen=True)
class Submitted:
    """A request that is being answered."""

    schema: Schema
    request: ParsedRequest
    futures: list[Future[GenerationResult]]


class Answering(ABC):
    """What answers requests with a loaded model."""

    configuration: Configuration
    model_name: str

    @property
    @abstractmethod
    def model(self) -> Model:
        """The loaded model."""

    def answer(self, body: bytes, wanted: Wanted = Wanted()) -> Reply | StreamReply[BlockingStream]:
        """Answer one request, waiting for it, or for the first token of a stream.

        A body of several lines is answered with as many.
        """
        deadline = Deadline(self.configuration.request_timeout)
        lines = split_lines(body, wanted.content_type)
        if lines is not None:
            return lines_reply(self._answer_together(lines, wanted, deadline))
        events = BlockingEvents()
        submitted = self.submit(UnreadRequest(body), wanted, events)
        if isinstance(submitted, Reply):
            return submitted
        self.model.run_submitted()
        if not submitted.request.parameters.stream:
            return self._wait(submitted, deadline)
        stream = BlockingStream(
            events, submitted.futures[0], self._writer(submitted, wanted), deadline
        )
        try:
            stream.open()
        except RequestError as error:
            stream.close()
            return error_reply(submitted.schema, error)
        return stream_reply(stream)

    def answer_batch(self, bodies: Sequence[bytes]) -> list[Reply]:
        """Answer requests together, each by itself: one that is bad, or a stream, fails alone."""
        deadline = Deadline(self.configuration.request_timeout)
        of_lines = [split_lines(body) for body in bodies]
        requests = [lines or [UnreadRequest(body)] for body, lines in zip(bodies, of_lines)]
        flat = [request for several in requests for request in several]
        replies = iter(self._answer_together(flat, Wanted(), deadline))
        return [
            next(replies) if lines is None else lines_reply([next(replies) for _ in lines])
            for lines in of_lines
        ]

    def _answer_together(
        self, requests: Sequence[UnreadRequest], wanted: Wanted, deadline: Deadline
    ) -> list[Reply]:
        """Each by itself; no more at a time than the queue holds."""
        replies: list[Reply] = []
        most = self.configuration.max_queue
        for start in range(0, len(requests), most):
            submitted = [self.submit(r, wanted, None) for r in requests[start : start + most]]
            if not all(isinstance(s, Reply) for s in submitted):
                self.model.run_submitted()
            replies += [s if isinstance(s, Reply) else self._wait(s, deadline) for s in submitted]
        return replies

    async def answer_async(
        self, body: bytes, wanted: Wanted = Wanted()
    ) -> Reply | StreamReply[AsyncStream]:
        """Answer one request, or await the first token of a stream; a cancelled call frees its
        rows. A body of several lines is answered with as many."""
        deadline = Deadline(self.configuration.request_timeout)
        lines = split_lines(body, wanted.content_type)
        if lines is not None:
            return await self._answer_lines(lines, wanted, deadline)
        events = AsyncEvents()
        submitted = await self._submit_async(UnreadRequest(body), wanted, events)
        if isinstance(submitted, Reply):
            return submitted
        if not submitted.request.parameters.stream:
            return await self._wait_async(submitted, deadline)
        stream = AsyncStream(
            events, submitted.futures[0], self._writer(submitted, wanted), deadline
        )
        try:
            await stream.open()
        except RequestError as error:
            stream.close()
            return error_reply(submitted.schema, error)
        except BaseException:  # cancelled
            stream.close()
            raise
        return stream_reply(stream)

    async def _answer_lines(
        self, lines: Sequence[UnreadRequest], wanted: Wanted, deadline: Deadline
    ) -> Reply:
        room = asyncio.Semaphore(_LINES_PER_ROW * self.model.limits.max_rows)

        async def answer(line: UnreadRequest) -> Reply:
            async with room:
                submitted = await self._submit_async(line, wanted, None)
                if isinstance(submitted, Reply):
                    return submitted
                return await self._wait_async(submitted, deadline)

        answers = [asyncio.ensure_future(answer(line)) for line in lines]
        try:
            return lines_reply(await _until_given_up(answers))
        finally:
            for each in answers:
                each.cancel()

    async def _submit_async(
        self, request: UnreadRequest, wanted: Wanted, events: AsyncEvents | None
    ) -> Submitted | Reply:
        """Where it takes long, in a thread, which a cancelled call cannot stop: what it submits
        then is cancelled."""
        content = request.content
        if len(content) <= _LONG_BODY and _REGEX not in content and _GRAMMAR not in content:
            return self.submit(request, wanted, events)
        work = asyncio.ensure_future(asyncio.to_thread(self.submit, request, wanted, events))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda done: _cancel(done.result()))
            raise

    def submit(
        self,
        request: UnreadRequest,
        wanted: Wanted = Wanted(),
        events: AsyncEvents | BlockingEvents | None = None,
    ) -> Submitted | Reply:
        """Read a request and queue its prompts without waiting; a refusal is its answer.

        events: who reads a stream, None where nobody could. ``model.run_submitted`` must follow,
        and when its futures are done, ``collect``.
        """
        configured = self.configuration.response_schema
        schema = schema_before_reading(configured, wanted.route)
        try:
            fields = request.fields()
            schema = recognized(fields, configured, wanted.route)
            parsed = schema.parse(
                {**fields, "stream": True} if wanted.streams else fields, self._deployment()
            )
            if self.configuration.log_prompts:
                logger.info("prompts %r", parsed.inputs)
            return Submitted(schema, parsed, self._submit(parsed, events))
        except RequestError as error:
            return error_reply(schema, error)
        except Exception as error:  # DJL's async mode would lose the text of it
            logger.exception("a request failed")
            return error_reply(schema, error)

    def _submit(
        self, request: ParsedRequest, events: AsyncEvents | BlockingEvents | None
    ) -> list[Future[GenerationResult]]:
        model = self.model
        if not request.parameters.stream:
            return model.submit(request.prompts)
        if events is None:
            raise RequestError(_NO_STREAMS_ON_RANKS if model.answers_are_shared else _NO_STREAMS)
        (prompt,) = request.prompts
        assert isinstance(prompt, GenerationRequest)  # what is scored has no 'stream'
        put = events.put
        on_event = partial(_log_and_put, put) if self.configuration.log_prompts else put
        return [model.submit_stream(prompt, on_event)]

    def _deployment(self) -> Deployment:
        model, template = self.model, self.configuration.prompt_template
        return Deployment(model.limits, template, self.model_name, model.new_seed)

    def _writer(self, submitted: Submitted, wanted: Wanted) -> StreamWriter:
        return submitted.schema.stream(submitted.request, self.model.tokenizer, wanted.accept)

    def _wait(self, submitted: Submitted, deadline: Deadline) -> Reply:
        wait(submitted.futures, timeout=deadline.left, return_when="FIRST_EXCEPTION")
        return self._collect(submitted, deadline)

    async def _wait_async(self, submitted: Submitted, deadline: Deadline) -> Reply:
        answers = [asyncio.wrap_future(future) for future in submitted.futures]
        try:
            await asyncio.wait(answers, timeout=deadline.left, return_when=asyncio.FIRST_EXCEPTION)
            if tokens_done(submitted) > _LONG_ANSWER:
                return await asyncio.to_thread(self._collect, submitted, deadline)
            return self._collect(submitted, deadline)
        finally:
            for answer in answers:  # and those that failed count as looked at
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()

    def collect(self, submitted: Submitted) -> Reply:
        """The answer, once its futures are done, or the first error."""
        return self._collect(submitted, Deadline(self.configuration.request_timeout))

    def _collect(self, submitted: Submitted, deadline: Deadline) -> Reply:
        """The answer if everything is done, the first error, or that time is up."""
        try:
            failed = [f for f in submitted.futures if f.done() and f.exception() is not None]
            if not failed and not all(future.done() for future in submitted.futures):
                raise deadline.passed()
            results = [future.result() for future in failed or submitted.futures]
            if self.configuration.log_prompts:
                logger.info("answers %r", [result.text for result in results])
            return reply(submitted.schema, submitted.request, results, self.model.tokenizer)
        except RequestError as error:
            return error_reply(submitted.schema, error)
        except Exception as error:
            logger.exception("an answer could not be written")
            return error_reply(submitted.schema, error)
        finally:
            for future in submitted.futures:
                future.cancel()


async def _until_given_up(answers: Sequence[asyncio.Future[Reply]]) -> list[Reply]:
    """All of them, or the first ones where one of these is for all lines."""
    replies = []
    for answer in answers:
        replies.append(await answer)
        if is_of_all_lines(replies[-1]):
            break
    return replies


def _cancel(submitted: Submitted | Reply) -> None:
    if isinstance(submitted, Submitted):
        for future in submitted.futures:
            future.cancel()


def tokens_done(submitted: Submitted) -> int:
    futures = (f for f in submitted.futures if f.done() and not f.cancelled())
    results = (future.result() for future in futures if future.exception() is None)
    return sum(len(one.token_ids) for r in results for one in (r, *r.alternatives))


def _log_and_put(put: Callable[[TokenEvent | None], None], event: TokenEvent | None) -> None:
    if event is not None and event.result is not None:
        logger.info("answers %r", [event.result.text])
    put(event)
