"""Batches for engines that run whole generations: waiting -> one batch at a time -> done.

Requests that may run together (the engine's ``batch_key``) wait for each other only while another
batch runs; nobody waits for a batch to fill.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from handler.errors import RequestError
from handler.generation import Generation

if TYPE_CHECKING:
    from handler.engines.protocol import BatchEngine

logger = logging.getLogger(__name__)


class Batcher:
    """Owns the engine: only its thread calls it. ``submit`` and ``close`` are for any thread."""

    def __init__(self, engine: BatchEngine, max_queue: int) -> None:
        self._engine = engine
        self._max_queue = max_queue
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of them or, raising RequestError, none."""
        if len(generations) > self._max_queue:
            raise RequestError(
                f"a request of {len(generations)} inputs cannot be queued, allowed are "
                f"{self._max_queue} (option.max_queue); split it"
            )
        with self._changed:
            if self._closed:
                raise RequestError("the model is being unloaded", 503)
            if len(self._waiting) + len(generations) > self._max_queue:
                self._waiting = deque(g for g in self._waiting if not g.done)
            if len(self._waiting) + len(generations) > self._max_queue:
                raise RequestError(
                    f"{len(self._waiting)} prompts wait already, allowed are {self._max_queue} "
                    "(option.max_queue); try again later",
                    503,
                )
            self._waiting.extend(generations)
            self._changed.notify()

    def close(self) -> None:
        """Finish what runs, fail what waits, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._schedule():
            self._generate()
        for generation in self._waiting:
            generation.fail(RequestError("the model is being unloaded", 503))
        self._engine.close()

    def _schedule(self) -> bool:
        """Fill ``_running`` with the oldest request and others like it; False when closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return False
                self._waiting = deque(g for g in self._waiting if not g.done)
                if self._waiting:
                    break
            self._running = self._take_batch(self._waiting.popleft())
            return True

    def _take_batch(self, first: Generation) -> list[Generation]:
        """``first`` and, in their order, those that may run beside it."""
        key = self._engine.batch_key(first.parameters)
        if key is None:
            return [first]
        rows = max(1, self._engine.max_rows // first.parameters.num_beams)
        batch, left = [first], deque[Generation]()
        for generation in self._waiting:
            joins = len(batch) < rows and self._engine.batch_key(generation.parameters) == key
            (batch if joins else left).append(generation)
        self._waiting = left
        return batch

    def _generate(self) -> None:
        try:
            self._engine.generate(self._running)
        except BaseException as error:  # whatever it was, nobody may be left waiting
            logger.exception("the engine failed")
            failure = _as_request_error(error)
            for generation in self._running:
                generation.fail(failure)
        for generation in self._running:
            generation.fail(RequestError("the engine returned no answer", 424))
        self._running = []


def _as_request_error(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    # torch.cuda.OutOfMemoryError by name: torch need not be there
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return RequestError(
            f"out of memory: {error}; lower option.max_rows or option.max_input_tokens", 507
        )
    return RequestError(f"the engine failed: {type(error).__name__}: {error}", 424)
