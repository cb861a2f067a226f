"""One Service per process: loads the model once, and is the door for every way requests arrive."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from handler.checkpoints.partition import partition_as_told
from handler.config import Configuration, read_configuration, without_djls_own
from handler.djl_input import batched_bodies, body_of, header_of
from handler.djl_output import to_async_output, to_async_outputs, to_batch_output, to_output
from handler.engines import Model, load_model
from handler.errors import LoadError, RequestError
from handler.generation import GenerationRequest, GenerationResult, TokenEvent
from handler.ranks import end_job, end_process, rank_0_gets_all_requests, world_of
from handler.request_lines import is_of_all_lines, lines_reply, split_lines
from handler.request_parsing import UnreadRequest
from handler.responses import Reply, StreamReply, error_reply, reply, stream_reply
from handler.schemas import recognized, schema_before_reading
from handler.schemas.protocol import Deployment, ParsedRequest, Schema, StreamWriter
from handler.steps import NO_STEPS, Steps
from handler.streaming import AsyncEvents, AsyncStream, BlockingEvents, BlockingStream, Deadline

if TYPE_CHECKING:
    from djl_python.inputs import Input
    from djl_python.outputs import Output

logger = logging.getLogger(__name__)

# How long a rank that could not load lets DJL read why, before it ends the job.
_FAREWELL_SECONDS = 5.0
# How long answers that tell of a lost engine have to leave the process.
_LAST_ANSWERS_SECONDS = 1.0
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

_T = TypeVar("_T")
_AnyReply = TypeVar("_AnyReply", bound="Reply | StreamReply[BlockingStream]")


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


class Service:
    """Answers bodies of requests. ``load`` comes first, and counts once."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._model: Model | None = None
        self._first_call_came = False
        self._load_failure: Exception | None = None
        self.configuration = Configuration()
        self.model_name = "model"
        self.loaded_at = 0  # seconds since 1970

    @property
    def model(self) -> Model:
        """The loaded model; loads it by the environment alone when nobody called ``load``."""
        if self._load_failure is not None:
            raise LoadError(str(self._load_failure))
        return self._model or self.load(read_configuration(environment=os.environ))

    def load(self, configuration: Configuration, name: str | None = None) -> Model:
        """Load the model; without effect once there is one. Raises LoadError.

        name: what answers call the model; else its folder's.
        """
        with self._loading:
            if self._model is None:
                start = time.monotonic()
                self._model = load_model(configuration)
                self._model.when_ended(_end_process)
                self.configuration = configuration
                place = configuration.model_id or configuration.model_dir or ""
                self.model_name = name or Path(place).name or self.model_name
                self.loaded_at = int(time.time())
                logger.info("model loaded in %.1f s", time.monotonic() - start)
            return self._model

    def close(self) -> None:
        """Finish what runs and unload."""
        with self._loading:
            if self._model is not None:
                self._model.close()
                self._model = None

    # DJL's front doors

    def handle(
        self, inputs: Input, steps: Steps = NO_STEPS
    ) -> Output | Awaitable[Output | AsyncIterator[Output] | None] | None:
        """What DJLServing calls: an Output, or in async mode a coroutine that gives one, or an
        asynchronous generator of them.

        The empty first call loads the model and alone configures it. A later empty one is a
        client's: DJLServing makes it of an empty form.
        """
        in_async_mode = _event_loop_runs()
        if inputs.is_empty() and not self._first_call_came:
            self._load_as_told(inputs.get_properties(), in_async_mode)
            return _immediately(None) if in_async_mode else None
        if in_async_mode:
            return self._handle_async(inputs, steps)
        bodies = batched_bodies(inputs)
        if bodies is not None:
            return to_batch_output(self.answer_on_all_ranks(bodies, steps))
        if self._shares_answers:
            return to_output(self.answer_on_all_ranks([body_of(inputs)], steps)[0])
        body = self._before(steps, body_of(inputs))
        if isinstance(body, Reply):
            return to_output(body)
        return to_output(self._after(steps, self.answer(body, _wanted(inputs))))

    def partition(self, inputs: Input) -> Output | Awaitable[Output] | None:
        """What DJL's partition command calls, in a process of its own, with all properties.

        In a worker DJL lets a client name the function that its request is for. Such a call has
        come through the worker's socket, which gives it that name, and not as the first one.
        """
        if inputs.get_function_name() is None and not self._first_call_came and inputs.is_empty():
            self._first_call_came = True
            properties = without_djls_own(inputs.get_properties(), os.environ)
            partition_as_told(read_configuration(properties=properties, environment=os.environ))
            return None
        refusal = self._refusal(
            RequestError("partition is not for requests; use the partition command")
        )
        return _immediately(to_async_output(refusal)) if _event_loop_runs() else to_output(refusal)

    def _load_as_told(self, properties: Mapping[str, str], in_async_mode: bool) -> None:
        """Load by DJL's first call. Should it fail, DJL 0.20 sends requests all the same.

        One rank of several that fails ends them all: the others wait for it to load.
        """
        self._first_call_came = True
        world = world_of()
        try:
            told = without_djls_own(properties, os.environ)
            configuration = read_configuration(properties=told, environment=os.environ)
            if world.size > 1 and in_async_mode:
                _refuse_uneven_calls(configuration)
            self.load(configuration)
        except Exception as error:
            self._load_failure = error
            if world.size > 1:
                end_job(world, error, after=_FAREWELL_SECONDS)
            raise

    async def _handle_async(self, inputs: Input, steps: Steps) -> Output | AsyncIterator[Output]:
        body = self._before(steps, body_of(inputs))
        if isinstance(body, Reply):
            return to_async_output(body)
        answer = await self.answer_async(body, _wanted(inputs))
        if isinstance(answer, Reply):
            return to_async_output(self._after(steps, answer))
        return to_async_outputs(answer)

    @property
    def _shares_answers(self) -> bool:
        return self._model is not None and self._model.answers_are_shared

    def answer_on_all_ranks(self, bodies: Sequence[bytes], steps: Steps = NO_STEPS) -> list[Reply]:
        """``answer_batch``, whose replies are the same on every MPI rank that gets the call."""
        if self._model is None or not self._shares_answers:
            return self._answer_batch(bodies, steps)
        return self._model.on_all_ranks(lambda: self._answer_batch(bodies, steps))

    def _answer_batch(self, bodies: Sequence[bytes], steps: Steps) -> list[Reply]:
        prepared = [self._before(steps, body) for body in bodies]
        answers = iter(self.answer_batch([p for p in prepared if not isinstance(p, Reply)]))
        return [p if isinstance(p, Reply) else self._after(steps, next(answers)) for p in prepared]

    def _before(self, steps: Steps, body: bytes) -> bytes | Reply:
        """The body to answer, or the refusal of a step."""
        try:
            return steps.request(body)
        except Exception as error:
            return self._refusal(error)

    def _after(self, steps: Steps, answer: _AnyReply) -> _AnyReply | Reply:
        if not isinstance(answer, Reply) or answer.error is not None:
            return answer
        try:
            return replace(answer, body=steps.answer(answer.body))
        except Exception as error:
            return self._refusal(error)

    def _refusal(self, error: Exception) -> Reply:
        if not isinstance(error, RequestError):
            logger.error("a step of model.py failed", exc_info=error)
        schema = schema_before_reading(self.configuration.response_schema, None)
        return error_reply(schema, error)

    # The same without DJL

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


def _end_process(reason: str) -> None:
    """Whoever started this process starts it again; DJLServing does."""
    end_process(f"this process ends, its engine cannot go on: {reason}", _LAST_ANSWERS_SECONDS)


def _refuse_uneven_calls(c: Configuration) -> None:
    """Each rank must get every call, in the same order, or rank 0 all of them. Raises LoadError."""
    if not rank_0_gets_all_requests(c.use_passive_workers):
        raise LoadError(
            "option.async_mode=true: calls would reach each MPI rank in another order; set it to "
            "false, or set option.use_passive_workers=true or engine=Python"
        )


def _wanted(inputs: Input) -> Wanted:
    """DJL hands headers over as properties."""
    return Wanted(
        accept=header_of(inputs, "accept"), content_type=header_of(inputs, "content-type")
    )


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


def _event_loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _immediately(value: _T) -> _T:
    return value


service = Service()
