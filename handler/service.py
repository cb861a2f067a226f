"""One Service per process: loads the model once, and is the door for every way requests arrive."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from handler.answering import Answering, Wanted
from handler.checkpoints.partition import partition_as_told
from handler.config import Configuration, read_configuration, without_djls_own
from handler.djl_input import batched_bodies, body_of, header_of
from handler.djl_output import to_async_output, to_async_outputs, to_batch_output, to_output
from handler.engines import Model, load_model
from handler.errors import LoadError, RequestError
from handler.ranks import end_job, end_process, rank_0_gets_all_requests, world_of
from handler.responses import Reply, StreamReply, error_reply
from handler.schemas import schema_before_reading
from handler.steps import NO_STEPS, Steps
from handler.streaming import BlockingStream

if TYPE_CHECKING:
    from djl_python.inputs import Input
    from djl_python.outputs import Output

logger = logging.getLogger(__name__)

# How long a rank that could not load lets DJL read why, before it ends the job.
_FAREWELL_SECONDS = 5.0
# How long answers that tell of a lost engine have to leave the process.
_LAST_ANSWERS_SECONDS = 1.0


_T = TypeVar("_T")
_AnyReply = TypeVar("_AnyReply", bound="Reply | StreamReply[BlockingStream]")


class Service(Answering):
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


def _event_loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _immediately(value: _T) -> _T:
    return value


service = Service()
