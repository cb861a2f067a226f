"""Prompts that wait for their turn: bounded, and fair between clients."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from handler.errors import RequestError
from handler.generation import Generation


class WaitingPrompts:
    """First come, first served; a client's list gives one prompt in its turn, then others' come.

    ``submit`` and ``close`` are for any thread, the rest for the one that serves.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lists: deque[deque[Generation]] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return sum(map(len, tuple(self._lists)))

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all of a client's prompts or, raising RequestError, none."""
        with self._changed:
            self.check_room(len(generations))
            self._lists.append(deque(generations))
            self._changed.notify()

    def check_room(self, count: int) -> None:
        """Raises RequestError where ``count`` more prompts cannot be queued."""
        if count > self._most:
            raise RequestError(
                f"a request of {count} texts cannot be queued, allowed are {self._most} "
                "(option.max_queue); split it"
            )
        with self._changed:
            if self._closed:
                raise _unloading()
            if len(self) + count > self._most:
                self._drop_done()
            if len(self) + count > self._most:
                raise RequestError(
                    f"{len(self)} prompts wait already, allowed are {self._most} "
                    "(option.max_queue); try again later",
                    503,
                )

    def wait(self) -> bool:
        """Block until a prompt waits; False when closed and none is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._lists or self._closed)
            return bool(self._lists)

    def take(
        self, most: int, accepts: Callable[[Generation], bool] = lambda _: True
    ) -> list[Generation]:
        """Remove the next prompts in turn, of those that are accepted; what is done is dropped."""
        with self._changed:
            self._drop_done()
            taken: list[Generation] = []
            for generation in self._in_turn():
                if len(taken) == most:
                    break
                if accepts(generation):
                    taken.append(generation)
            self._remove(taken)
            return taken

    def close(self, *, refuse: bool = True) -> None:
        """Refuse what comes and, unless told otherwise, what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if refuse:
            for generation in self.remove_all():
                generation.fail(_unloading())

    def remove_all(self) -> list[Generation]:
        with self._changed:
            removed = list(self._in_turn())
            self._lists.clear()
            return removed

    def _in_turn(self) -> Iterator[Generation]:
        for turn in range(max(map(len, self._lists), default=0)):
            for prompts in self._lists:
                if turn < len(prompts):
                    yield prompts[turn]

    def _remove(self, taken: Sequence[Generation]) -> None:
        """The more prompts a list gave, the farther back it goes."""
        gone = set(map(id, taken))
        left = [deque(g for g in prompts if id(g) not in gone) for prompts in self._lists]
        given = [len(prompts) - len(rest) for prompts, rest in zip(self._lists, left)]
        order = sorted(range(len(left)), key=given.__getitem__)
        self._lists = deque(left[i] for i in order if left[i])

    def _drop_done(self) -> None:
        if any(g.done for prompts in self._lists for g in prompts):
            kept = (deque(g for g in prompts if not g.done) for prompts in self._lists)
            self._lists = deque(prompts for prompts in kept if prompts)


def _unloading() -> RequestError:
    return RequestError("the model is being unloaded", 503)
