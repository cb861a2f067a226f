"""Batches for engines that run whole generations: waiting -> one batch at a time -> done.

Requests that may run together (the engine's ``batch_key``) wait for each other only while another
batch runs; nobody waits for a batch to fill.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.runner import Runner

if TYPE_CHECKING:
    from handler.engines.protocol import BatchEngine

logger = logging.getLogger(__name__)


class Batcher(Runner):
    """Owns a batch engine, which only its thread calls."""

    def __init__(self, engine: BatchEngine, max_queue: int) -> None:
        super().__init__(engine, max_queue)
        self.supported_parameters = engine.supported_parameters
        self._engine = engine
        self._running: list[Generation] = []
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    def _run(self) -> None:
        while self._waiting.wait():
            self._running = self._take_batch()
            if self._running:
                self._generate()
        self._engine.close()

    def _take_batch(self) -> list[Generation]:
        """The next prompt and, in their order, those that may run beside it."""
        first = self._waiting.take(1)
        if not first:
            return []
        parameters = first[0].parameters
        key = self._engine.batch_key(parameters)
        rows = self._engine.max_rows // parameters.num_beams
        if key is None or rows < 2:
            return first
        return first + self._waiting.take(
            rows - 1, lambda other: self._engine.batch_key(other.parameters) == key
        )

    def _generate(self) -> None:
        try:
            self._engine.generate(self._running)
        except BaseException as error:  # whatever it was, nobody may be left waiting
            if not isinstance(error, RequestError):
                logger.exception("the engine failed")
            failure = as_request_error(error)
            for generation in self._running:
                generation.fail(failure)
        for generation in self._running:
            generation.fail(RequestError("the engine returned no answer", 424))
        self._running = []
