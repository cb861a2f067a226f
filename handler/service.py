"""One Service per process: loads the model once, and is the door for every way requests arrive."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from handler.checkpoints.partition import partition_as_told
from handler.config import Configuration, read_configuration, without_djls_own
from handler.djl_input import accept_of, batched_bodies, body_of
from handler.djl_output import to_async_output, to_async_outputs, to_batch_output, to_output
from handler.engines import Model, load_model
from handler.errors import LoadError, RequestError
from handler.generation import GenerationRequest, GenerationResult, TokenEvent
from handler.ranks import end_job, end_process, world_of
from handler.request_parsing import parse_body
from handler.responses import Reply, StreamReply, error_reply, reply, stream_reply
from handler.schemas import recognized, schema_before_reading
from handler.schemas.protocol import Deployment, ParsedRequest, Schema, StreamWriter
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

_T = TypeVar("_T")


@dataclass(frozen=True)
class Wanted:
    """What a client says of its answer besides its body.

    accept: its header of that name. route: the schema of the route it came by, or ``root``; None
    where option.response_schema holds. streams: the route streams whatever the body says.
    """

    accept: str = ""
    route: str | None = None
    streams: bool = False


@dataclass(frozen=True)
class _Submitted:
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
        self, inputs: Input
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
            return self._handle_async(inputs)
        bodies = batched_bodies(inputs)
        if bodies is not None:
            return to_batch_output(self.answer_batch(bodies))
        return to_output(self.answer(body_of(inputs), Wanted(accept_of(inputs))))

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
        refusal = error_reply(
            schema_before_reading(self.configuration.response_schema, None),
            RequestError("partition is not for requests; use the partition command"),
        )
        return _immediately(to_async_output(refusal)) if _event_loop_runs() else to_output(refusal)

    def _load_as_told(self, properties: Mapping[str, str], in_async_mode: bool) -> None:
        """Load by DJL's first call. Should it fail, DJL 0.20 sends requests all the same.

        One rank of several that fails ends them all: the others wait for it to load.
        """
        self._first_call_came = True
        world = world_of()
        try:
            if world.size > 1:
                _refuse_uneven_calls(properties, in_async_mode)
            told = without_djls_own(properties, os.environ)
            self.load(read_configuration(properties=told, environment=os.environ))
        except Exception as error:
            self._load_failure = error
            if world.size > 1:
                end_job(world, error, after=_FAREWELL_SECONDS)
            raise

    async def _handle_async(self, inputs: Input) -> Output | AsyncIterator[Output]:
        answer = await self.answer_async(body_of(inputs), Wanted(accept_of(inputs)))
        return to_async_output(answer) if isinstance(answer, Reply) else to_async_outputs(answer)

    # The same without DJL

    def answer(self, body: bytes, wanted: Wanted = Wanted()) -> Reply | StreamReply[BlockingStream]:
        """Answer one request, waiting for it, or for the first token of a stream."""
        deadline = Deadline(self.configuration.request_timeout)
        events = BlockingEvents()
        submitted = self._try_submit(body, wanted, events)
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
        submitted = [self._try_submit(body, Wanted(), None) for body in bodies]
        if not all(isinstance(s, Reply) for s in submitted):
            self.model.run_submitted()
        return [s if isinstance(s, Reply) else self._wait(s, deadline) for s in submitted]

    async def answer_async(
        self, body: bytes, wanted: Wanted = Wanted()
    ) -> Reply | StreamReply[AsyncStream]:
        """Answer one request, or await the first token of a stream; a cancelled call frees its
        rows."""
        deadline = Deadline(self.configuration.request_timeout)
        events = AsyncEvents()
        if len(body) > _LONG_BODY or _REGEX in body or _GRAMMAR in body:
            submitted = await self._submit_off_the_loop(body, wanted, events)
        else:
            submitted = self._try_submit(body, wanted, events)
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

    async def _submit_off_the_loop(
        self, body: bytes, wanted: Wanted, events: AsyncEvents
    ) -> _Submitted | Reply:
        """In a thread, which a cancelled call cannot stop: what it submits then is cancelled."""
        work = asyncio.ensure_future(asyncio.to_thread(self._try_submit, body, wanted, events))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(lambda done: _cancel(done.result()))
            raise

    def _try_submit(
        self, body: bytes, wanted: Wanted, events: AsyncEvents | BlockingEvents | None
    ) -> _Submitted | Reply:
        """events: who reads a stream, None where nobody could."""
        configured = self.configuration.response_schema
        schema = schema_before_reading(configured, wanted.route)
        try:
            fields = parse_body(body)
            schema = recognized(fields, configured, wanted.route)
            request = schema.parse(
                {**fields, "stream": True} if wanted.streams else fields, self._deployment()
            )
            if self.configuration.log_prompts:
                logger.info("prompts %r", request.inputs)
            return _Submitted(schema, request, self._submit(request, events))
        except RequestError as error:
            return error_reply(schema, error)
        except Exception as error:  # DJL's async mode would lose the text of it
            logger.exception("a request failed")
            return error_reply(schema, error)

    def _submit(
        self, request: ParsedRequest, events: AsyncEvents | BlockingEvents | None
    ) -> list[Future[GenerationResult]]:
        if not request.parameters.stream:
            return self.model.submit(request.prompts)
        if events is None:
            raise RequestError(
                "parameter 'stream' must be false where DJLServing batches requests; set "
                "batch_size=1 in serving.properties to stream"
            )
        (prompt,) = request.prompts
        assert isinstance(prompt, GenerationRequest)  # what is scored has no 'stream'
        put = events.put
        on_event = partial(_log_and_put, put) if self.configuration.log_prompts else put
        return [self.model.submit_stream(prompt, on_event)]

    def _deployment(self) -> Deployment:
        model, template = self.model, self.configuration.prompt_template
        return Deployment(model.limits, template, self.model_name, model.new_seed)

    def _writer(self, submitted: _Submitted, wanted: Wanted) -> StreamWriter:
        return submitted.schema.stream(submitted.request, self.model.tokenizer, wanted.accept)

    def _wait(self, submitted: _Submitted, deadline: Deadline) -> Reply:
        wait(submitted.futures, timeout=deadline.left, return_when="FIRST_EXCEPTION")
        return self._collect(submitted, deadline)

    async def _wait_async(self, submitted: _Submitted, deadline: Deadline) -> Reply:
        answers = [asyncio.wrap_future(future) for future in submitted.futures]
        try:
            await asyncio.wait(answers, timeout=deadline.left, return_when=asyncio.FIRST_EXCEPTION)
            if _tokens_done(submitted) > _LONG_ANSWER:
                return await asyncio.to_thread(self._collect, submitted, deadline)
            return self._collect(submitted, deadline)
        finally:
            for answer in answers:  # and those that failed count as looked at
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()

    def _collect(self, submitted: _Submitted, deadline: Deadline) -> Reply:
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


def _refuse_uneven_calls(properties: Mapping[str, str], in_async_mode: bool) -> None:
    """Of several ranks each must get every call, in the same order. Raises LoadError."""
    if in_async_mode:
        raise LoadError(
            "option.async_mode=true: calls would reach each MPI rank in another order; set it to "
            "false, or set engine=Python"
        )
    # Passive workers came with async mode: then only rank 0 gets requests.
    new = importlib.util.find_spec("djl_python.async_utils") is not None
    if new and str(properties.get("use_passive_workers", "true")).lower() != "false":
        raise LoadError(
            "option.use_passive_workers=true (this DJLServing's default): requests would reach MPI "
            "rank 0 only; set it to false, or set engine=Python"
        )


def _cancel(submitted: _Submitted | Reply) -> None:
    if isinstance(submitted, _Submitted):
        for future in submitted.futures:
            future.cancel()


def _tokens_done(submitted: _Submitted) -> int:
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
