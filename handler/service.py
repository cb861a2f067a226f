"""One Service per process: loads the model once, and is the door for every way requests arrive."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import threading
import time
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handler.config import Configuration, read_configuration, without_djls_own
from handler.engines import Model, load_model
from handler.errors import LoadError, RequestError
from handler.generation import GenerationResult
from handler.ranks import end_job, world_of
from handler.request_parsing import ParsedRequest, parse_request
from handler.responses import (
    Reply,
    error_reply,
    reply,
    to_async_output,
    to_batch_output,
    to_output,
)

if TYPE_CHECKING:
    from djl_python.inputs import Input
    from djl_python.outputs import Output

logger = logging.getLogger(__name__)

# DJL's dynamic batch: batch_000.data, before 0.21 batch_0.data. Three digits are DJL's own limit,
# and keep small what is made of a client's form whose fields have such names.
_BATCH_KEY = re.compile(r"batch_(\d{1,3})\.")
_LARGEST_BATCH = 1000
# How long a rank that could not load lets DJL read why, before it ends the job.
_FAREWELL_SECONDS = 5.0
# Reading and tokenizing a longer body takes long enough to hold up an event loop.
_LONG_BODY = 32_768


@dataclass(frozen=True)
class _Submitted:
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

    @property
    def model(self) -> Model:
        """The loaded model; loads it by the environment alone when nobody called ``load``."""
        if self._load_failure is not None:
            raise LoadError(str(self._load_failure))
        return self._model or self.load(read_configuration(environment=os.environ))

    def load(self, configuration: Configuration) -> Model:
        """Load the model; without effect once there is one. Raises LoadError."""
        with self._loading:
            if self._model is None:
                start = time.monotonic()
                self._model = load_model(configuration)
                self.configuration = configuration
                logger.info("model loaded in %.1f s", time.monotonic() - start)
            return self._model

    def close(self) -> None:
        """Finish what runs and unload."""
        with self._loading:
            if self._model is not None:
                self._model.close()
                self._model = None

    # DJL's front doors

    def handle(self, inputs: Input) -> Output | Awaitable[Output | None] | None:
        """What DJLServing calls: an Output, or in async mode a coroutine that gives one.

        The empty first call loads the model and alone configures it. A later empty one is a
        client's: DJLServing makes it of an empty form.
        """
        in_async_mode = _event_loop_runs()
        if inputs.is_empty() and not self._first_call_came:
            self._load_as_told(inputs.get_properties(), in_async_mode)
            return _nothing() if in_async_mode else None
        if in_async_mode:
            return self._handle_async(inputs)
        bodies = _batched_bodies(inputs)
        if bodies is not None:
            return to_batch_output(self.answer_batch(bodies))
        return to_output(self.answer(_body(inputs)))

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

    async def _handle_async(self, inputs: Input) -> Output:
        return to_async_output(await self.answer_async(_body(inputs)))

    # The same without DJL

    def answer(self, body: bytes) -> Reply:
        """Answer one request, waiting for it."""
        return self.answer_batch([body])[0]

    def answer_batch(self, bodies: Sequence[bytes]) -> list[Reply]:
        """Answer requests together, each by itself: one that is bad fails alone."""
        deadline = time.monotonic() + self.configuration.request_timeout
        submitted = [self._try_submit(body) for body in bodies]
        if not all(isinstance(s, Reply) for s in submitted):
            self.model.run_submitted()
        return [
            s if isinstance(s, Reply) else self._wait(s, deadline - time.monotonic())
            for s in submitted
        ]

    async def answer_async(self, body: bytes) -> Reply:
        """Answer one request; a cancelled call frees its rows."""
        deadline = time.monotonic() + self.configuration.request_timeout
        if len(body) > _LONG_BODY:
            submitted = await asyncio.to_thread(self._try_submit, body)
        else:
            submitted = self._try_submit(body)
        if isinstance(submitted, Reply):
            return submitted
        answers = [asyncio.wrap_future(future) for future in submitted.futures]
        try:
            await asyncio.wait(
                answers,
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_EXCEPTION,
            )
            return self._collect(submitted)
        finally:
            for answer in answers:  # and those that failed count as looked at
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()

    def _try_submit(self, body: bytes) -> _Submitted | Reply:
        try:
            request = parse_request(body, self.model.limits)
            prompts = request.generation_requests(self.configuration.prompt_template)
            if self.configuration.log_prompts:
                logger.info("prompts %r", request.inputs)
            return _Submitted(request, self.model.submit(prompts))
        except RequestError as error:
            return error_reply(error)
        except Exception as error:  # DJL's async mode would lose the text of it
            logger.exception("a request failed")
            return error_reply(error)

    def _wait(self, submitted: _Submitted, seconds: float) -> Reply:
        wait(submitted.futures, timeout=max(0.0, seconds), return_when="FIRST_EXCEPTION")
        return self._collect(submitted)

    def _collect(self, submitted: _Submitted) -> Reply:
        """The answer if everything is done, the first error, or that time is up."""
        try:
            failed = [f for f in submitted.futures if f.done() and f.exception() is not None]
            if not failed and not all(future.done() for future in submitted.futures):
                raise RequestError(
                    f"not done after {self.configuration.request_timeout:g} s "
                    "(option.request_timeout); ask for fewer tokens or raise it",
                    504,
                )
            results = [future.result() for future in failed or submitted.futures]
            if self.configuration.log_prompts:
                logger.info("answers %r", [result.text for result in results])
            return reply(
                submitted.request,
                results,
                self.configuration.response_schema,
                self.model.tokenizer,
            )
        except RequestError as error:
            return error_reply(error)
        finally:
            for future in submitted.futures:
                future.cancel()


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


def _body(inputs: Input) -> bytes:
    return bytes(inputs.get_as_bytes() or b"")


def _batched_bodies(inputs: Input) -> list[bytes] | None:
    """The bodies of DJL's dynamic batch, or None for a single request.

    Recognized by the content's keys alone: ``batch_size`` is a property, and a client's header of
    that name looks the same.
    """
    content: Any = inputs.get_content()
    keys = [content.key_at(i) for i in range(content.size())]
    matches = [_BATCH_KEY.match(key or "") for key in keys]
    indices = [int(match.group(1)) for match in matches if match]
    if not indices or len(indices) < len(keys):
        return None
    bodies: dict[int, bytes] = {}
    for position, index in enumerate(indices):
        if index not in bodies or keys[position].endswith(".data"):
            bodies[index] = bytes(content.value_at(position))
    size = max(max(indices) + 1, _told_batch_size(inputs))  # the last ones may have no content
    return [bodies.get(index, b"") for index in range(size)]


def _told_batch_size(inputs: Input) -> int:
    try:
        return min(int(inputs.get_property("batch_size")), _LARGEST_BATCH)
    except (TypeError, ValueError):
        return 0


def _event_loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _nothing() -> None:
    return None


service = Service()
