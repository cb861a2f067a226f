"""The runners of MPI ranks that compute one model together. Rank 0 has the scheduler.

DJLServing gives requests to rank 0 alone (passive workers), or each of them to every rank, in the
same order, and keeps the answer of one. Then all give what rank 0 answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from handler.errors import RequestError
from handler.generation import Generation
from handler.ranks import end_process
from handler.runner import Runner
from handler.scheduler import SUPPORTED_PARAMETERS, Scheduler

if TYPE_CHECKING:
    from handler.engines.protocol import Engine, StepEngine

    class SharingEngine(StepEngine, Protocol):
        def share(self, answer: object) -> None:
            """Give the other ranks what was answered."""


logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# mpirun ends the job when a rank ends: time for rank 0 to answer what it has.
_LAST_ANSWERS_SECONDS = 5.0


class Leading(Scheduler):
    """Rank 0's scheduler where every rank gets every request."""

    answers_are_shared = True

    def __init__(self, engine: SharingEngine, max_queue: int, encoder_cache: int) -> None:
        super().__init__(engine, max_queue, encoder_cache)
        self._share = engine.share

    def on_all_ranks(self, answer: Callable[[], _T]) -> _T:
        answered = answer()
        with suppress(RequestError):  # a rank is lost: the answer says so, and nobody shares it
            self._share(answered)
        return answered


class Follower(Protocol):
    """What a rank other than 0 has of an engine: ``run`` does what rank 0 does, to its end."""

    answers: SimpleQueue[Any]

    @property
    def engine(self) -> Engine: ...

    def run(self) -> None:
        """Closes the engine at the end. Raises EOFError when rank 0 is gone."""


class Following(Runner):
    """A rank other than 0. It has no requests of its own, and no queue for them.

    shares: whether it gets calls, for rank 0's answers.
    """

    supported_parameters = SUPPORTED_PARAMETERS

    def __init__(self, follower: Follower, *, shares: bool) -> None:
        super().__init__(follower.engine, max_queue=0)
        self.answers_are_shared = shares
        self._follower = follower
        self._thread.start()

    @property
    def running(self) -> int:
        return 0

    def check_room(self, count: int) -> None:
        raise RequestError(
            "this process is not MPI rank 0, which has the requests; set "
            "option.use_passive_workers=true",
            503,
        )

    def submit(self, generations: Sequence[Generation]) -> None:
        self.check_room(len(generations))

    def on_all_ranks(self, answer: Callable[[], _T]) -> _T:
        """The next of rank 0's answers, whatever this rank would have made of the call."""
        shared: _T = self._follower.answers.get()
        return shared

    def _run(self) -> None:
        try:
            self._follower.run()
        except EOFError:
            end_process("rank 0 is gone", after=0)
        except BaseException:  # rank 0 knows, and ends the job
            logger.exception("this rank failed")
            end_process("this rank cannot go on", after=_LAST_ANSWERS_SECONDS)

    def _in_progress(self) -> Sequence[Generation]:
        return ()

    def _forget(self) -> None:
        """Nothing is in progress."""

    def _free(self) -> None:
        """The follower has closed its engine, between what else its end needs."""
