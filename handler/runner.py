"""What brings prompts to an engine: a queue, and the one thread that may call the engine."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.parameters import random_seed
from handler.waiting import WaitingPrompts

if TYPE_CHECKING:
    from handler.engines.protocol import Engine


logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_GOODBYE_SECONDS = 10.0
_running: weakref.WeakSet[Runner] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Python must not be taken down around a thread that is inside an engine: it would abort."""
    for runner in tuple(_running):
        runner.abandon()


class Runner(ABC):
    """The base of the scheduler and the batcher. Every public method is for any thread.

    supported_parameters: names of those that it and its engine honour; ``submit`` is given no
    request that uses another one. pads_prompts: whether those of a batch take as long as the
    longest of them. scores: whether it honours ``forced`` tokens. draws_seeds: see BatchEngine.
    answers_are_shared: whether every answer must come by ``on_all_ranks``.
    """

    supported_parameters: frozenset[str]
    pads_prompts = False
    scores = False
    draws_seeds = False
    answers_are_shared = False

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self.tokenizer = engine.tokenizer
        self.max_rows = engine.max_rows
        self.quality_warning = engine.quality_warning
        self._waiting = WaitingPrompts(max_queue)
        self._process = os.getpid()
        self._ended: str | None = None
        self._when_ended: Callable[[str], None] = lambda reason: None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        _running.add(self)

    @property
    def healthy(self) -> bool:
        """Whether what is submitted will be answered."""
        return self._thread.is_alive() and not self._waiting.closed

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
        self._check_process()
        self._waiting.check_room(count)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of a client's prompts or, raising RequestError, none."""
        self._check_process()
        self._waiting.submit(generations)

    def new_seed(self) -> int:
        """For a request that gives none and needs one."""
        return random_seed()

    def run_submitted(self) -> None:  # noqa: B027 (most runners have a thread)
        """Called after the last prompt of a call, by who submitted them.

        Nothing to do for a runner whose thread takes prompts as they come.
        """

    def on_all_ranks(self, answer: Callable[[], _T]) -> _T:
        """Where every MPI rank gets every call: what ``answer`` gives, the same on each of them."""
        return answer()

    def close(self) -> None:
        """Finish what runs, refuse what waits, free the engine."""
        if os.getpid() == self._process:
            self._waiting.close()
            self._thread.join()

    def drain(self) -> None:
        """Take nothing more; when what was taken is done, the engine is freed."""
        if os.getpid() == self._process:
            self._waiting.close(refuse=False)

    def abandon(self) -> None:
        """As close, but what runs is cancelled."""
        if os.getpid() == self._process and self._thread.is_alive():
            self._waiting.close()
            for generation in self._in_progress():
                generation.future.cancel()
            self._thread.join(_GOODBYE_SECONDS)

    def end(self, reason: str) -> None:
        """The engine cannot go on: everybody is told so, now and later."""
        self._ended = reason
        failure = RequestError(f"the engine failed: {reason}", 424)
        self._waiting.close(refuse=False)
        for generation in (*self._waiting.remove_all(), *self._in_progress()):
            generation.fail(failure)
        self._when_ended(reason)

    def when_ended(self, action: Callable[[str], None]) -> None:
        """Call this, once, with the reason, should the engine be unable to go on."""
        self._when_ended = action
        if self._ended is not None:
            action(self._ended)

    def _check_process(self) -> None:
        """Threads stay behind at a fork, and so do the locks that they hold."""
        if os.getpid() != self._process:
            raise RequestError(
                "the model was loaded in another process, from which this one was forked; load it "
                "after the fork",
                503,
            )
        if self._ended is not None:
            raise RequestError(f"the engine failed: {self._ended}; it must be started again", 503)

    def _serve(self) -> None:
        """The thread. Whatever fails, everybody is answered and the next ones are served."""
        while True:
            try:
                self._run()
                break
            except BaseException as error:
                logger.critical("the engine's thread failed and goes on", exc_info=error)
                failure = as_request_error(error)
                for generation in (*self._in_progress(), *self._waiting.remove_all()):
                    generation.fail(failure)
                self._forget()
        self._free()

    @abstractmethod
    def _run(self) -> None:
        """Serve until the queue is closed and empty."""

    @abstractmethod
    def _in_progress(self) -> Sequence[Generation]:
        """What has left the queue and is not done."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what is in progress."""

    @abstractmethod
    def _free(self) -> None:
        """Close the engine."""
