"""Batches for engines that run whole generations: waiting -> one batch at a time -> done.

Requests that may run together (the engine's ``batch_key``) wait for each other only while another
batch runs; nobody waits for a batch to fill.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.waiting import WaitingPrompts

if TYPE_CHECKING:
    from handler.engines.protocol import BatchEngine

logger = logging.getLogger(__name__)


class Batcher:
    """Owns the engine: only its thread calls it. ``submit`` and ``close`` are for any thread."""

    def __init__(self, engine: BatchEngine, max_queue: int) -> None:
        self.supported_parameters = engine.supported_parameters
        self._engine = engine
        self._waiting = WaitingPrompts(max_queue)
        self._running: list[Generation] = []
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of them or, raising RequestError, none."""
        self._waiting.submit(generations)

    def close(self) -> None:
        """Finish what runs, refuse what waits, end the thread."""
        self._waiting.close()
        self._thread.join()

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
            logger.exception("the engine failed")
            failure = as_request_error(error)
            for generation in self._running:
                generation.fail(failure)
        for generation in self._running:
            generation.fail(RequestError("the engine returned no answer", 424))
        self._running = []
