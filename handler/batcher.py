"""Batches for engines that run whole generations: waiting -> one batch at a time -> done.

Requests that may run together (the engine's ``batch_key``) wait for each other only while another
batch runs; nobody waits for a batch to fill.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.ranks import World, end_job
from handler.runner import Runner

if TYPE_CHECKING:
    from handler.engines.protocol import BatchEngine

logger = logging.getLogger(__name__)


class Batcher(Runner):
    """Owns a batch engine, which only its thread calls."""

    pads_prompts = True

    def __init__(self, engine: BatchEngine, max_queue: int) -> None:
        super().__init__(engine, max_queue)
        self.supported_parameters = engine.supported_parameters
        self.scores = engine.scores
        self.draws_seeds = engine.draws_seeds
        self._engine = engine
        self._running: list[Generation] = []
        self._start()

    def _start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    def _run(self) -> None:
        while self._waiting.wait():
            self._run_batch()

    def _in_progress(self) -> list[Generation]:
        return list(self._running)

    def _forget(self) -> None:
        self._running = []

    def _free(self) -> None:
        self._engine.close()

    def _run_batch(self) -> None:
        self._running = self._take_batch()
        for generation in self._running:
            generation.started()
        if self._running:
            self._generate()

    def _take_batch(self) -> list[Generation]:
        """The next prompt and, in their order, those that may run beside it."""
        first = self._waiting.take(1)
        if not first:
            return []
        key = self._engine.batch_key(first[0])
        rows = self._engine.max_rows // first[0].rows
        if key is None or rows < 2:
            return first
        return first + self._waiting.take(
            rows - 1, lambda other: self._engine.batch_key(other) == key
        )

    def _generate(self) -> None:
        try:
            self._engine.generate(self._running)
        except BaseException as error:  # whatever it was, nobody may be left waiting
            if not isinstance(error, RequestError):
                self._engine_failed(error)
            failure = as_request_error(error)
            for generation in self._running:
                generation.fail(failure)
        for generation in self._running:
            generation.fail(RequestError("the engine returned no answer", 424))
        self._running = []

    def _engine_failed(self, error: BaseException) -> None:
        logger.error("the engine failed", exc_info=error)


class Lockstep(Batcher):
    """The batcher of one rank of several. All ranks must make the same calls of their engines in
    the same order, and do not talk about it: who comes when, who waits no longer, how fast a rank
    is, none of it may decide what runs with whom.

    So nothing runs until all prompts of a call are there, then everything does, batch by batch, in
    the thread that called: the thread that loaded the model, whose current GPU is this rank's. An
    engine that fails ends the job, because the other ranks wait for this one for ever.
    """

    def __init__(
        self, engine: BatchEngine, max_queue: int, world: World, seeds: random.Random
    ) -> None:
        """seeds: random numbers that all ranks get alike."""
        self._world = world
        self._seeds = seeds
        super().__init__(engine, max_queue)

    def _start(self) -> None:
        """No thread."""

    @property
    def healthy(self) -> bool:
        return not self._waiting.closed

    def new_seed(self) -> int:
        return self._seeds.getrandbits(64)

    def run_submitted(self) -> None:
        while self._waiting:
            self._run_batch()

    def close(self) -> None:
        self._waiting.close()
        self._engine.close()

    def _engine_failed(self, error: BaseException) -> None:
        super()._engine_failed(error)
        end_job(self._world, error)
