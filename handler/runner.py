"""What brings prompts to an engine: a queue, and the one thread that may call the engine."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from handler.generation import Generation
from handler.parameters import random_seed
from handler.waiting import WaitingPrompts

if TYPE_CHECKING:
    from handler.engines.protocol import Engine


class Runner(ABC):
    """The base of the scheduler and the batcher. Every public method is for any thread.

    supported_parameters: names of those that it and its engine honour; ``submit`` is given no
    request that uses another one. scores: whether it honours ``forced`` tokens.
    """

    supported_parameters: frozenset[str]
    scores = False

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self.tokenizer = engine.tokenizer
        self.max_rows = engine.max_rows
        self.quality_warning = engine.quality_warning
        self._waiting = WaitingPrompts(max_queue)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Prompts that wait for a row."""
        return len(self._waiting)

    @property
    @abstractmethod
    def running(self) -> int:
        """Prompts that are being answered."""

    @property
    def encoder_cache_use(self) -> tuple[int, int]:
        """(hits, misses) of encoded prompts that came again."""
        return 0, 0

    def check_room(self, count: int) -> None:
        """Raises RequestError where so many prompts could not be queued now."""
        self._waiting.check_room(count)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of a client's prompts or, raising RequestError, none."""
        self._waiting.submit(generations)

    def new_seed(self) -> int:
        """For a request that gives none and needs one."""
        return random_seed()

    def run_submitted(self) -> None:  # noqa: B027 (most runners have a thread)
        """Called after the last prompt of a call, by who submitted them.

        Nothing to do for a runner whose thread takes prompts as they come.
        """

    def close(self) -> None:
        """Finish what runs, refuse what waits, free the engine."""
        self._waiting.close()
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """The thread: serve until the queue is closed, then close the engine."""
