"""The processes of a tensor-parallel model on one host: how they meet, talk, and miss each other.

Rank 0 tells the others by a socket what to compute; the results meet in torch's process group. A
process group waits for a rank that is gone, or for ever for one that stands still, so every rank
also says at short intervals that it is alive.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

import handler
from handler.config import Configuration
from handler.errors import LoadError, RequestError
from handler.ranks import end_process

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 0.5
# A rank that was not heard for so long stands still. Requests are to know within 10 seconds.
_SILENCE_SECONDS = 8.0
# Importing torch and reaching the socket.
_START_SECONDS = 300.0
_GOODBYE_SECONDS = 10.0
_LAST_WORDS_SECONDS = 1.0


class Ranks:
    """Rank 0's hold of the others, for any thread. What one thread sends stays in its order.

    processes: those that are to be killed when one is lost; of MPI ranks mpirun takes care.
    """

    def __init__(self, size: int, processes: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        self.size = size
        self.lost: str | None = None
        self._processes = processes
        self._closing = False
        self._when_lost: Callable[[str], None] = lambda reason: None
        self._changed = threading.Condition()
        self._told: dict[tuple[str, int], Any] = {}
        self._links: dict[int, connection.Connection] = {}
        self._sending = threading.Lock()
        self._patience = _START_SECONDS

    def meet(self, store: TCPStore) -> None:
        """Wait for all to connect. Raises LoadError."""
        folder = tempfile.mkdtemp(prefix="t5-ranks-")
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"{folder}/socket")
                listener.listen(self.size)
                listener.settimeout(_BEAT_SECONDS)
                store.set("socket", f"{folder}/socket")
                self._accept(listener)
        except OSError as error:
            raise LoadError(f"no socket {folder}/socket for ranks: {error}; set TMPDIR") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while len(self._links) < self.size - 1:
            ended = self._ended_process()
            if ended is not None or time.monotonic() > deadline:
                self._kill()
                raise LoadError(ended or f"not all {self.size} ranks started in {_START_SECONDS} s")
            with suppress(TimeoutError, EOFError):  # nobody came, or is gone already
                link = connection.Connection(listener.accept()[0].detach())
                if link.poll(_START_SECONDS):
                    self._links[link.recv()] = link

    def all_told(self, what: str, patience: float | None = None) -> list[Any]:
        """What every rank told of this, waiting for it. Raises LoadError where one failed, and
        TimeoutError after ``patience`` seconds."""
        expected = {(what, rank) for rank in range(1, self.size)}
        with self._changed:
            told = self._changed.wait_for(
                lambda: self.lost or self._told.keys() >= expected, patience
            )
            if self.lost is not None:
                raise LoadError(self.lost)
            if not told:
                raise TimeoutError(what)
            return [self._told[key] for key in sorted(expected)]

    def agree(self, what: str, failure: str | None, patience: float | None = None) -> str | None:
        """See fast_steps.Agree."""
        try:
            failures = [failure, *self.all_told(what, None if failure is None else patience)]
        except TimeoutError:
            raise TimeoutError(failure) from None
        named = [f"rank {rank} of {self.size}: {why}" for rank, why in enumerate(failures) if why]
        against = named[0] if named else None
        self.send(what, against)
        return against

    @contextmanager
    def ending_if_stuck(self) -> Iterator[None]:
        """Should a rank be lost meanwhile, and who waits for it in the process group not come out
        of there, this process ends: NCCL waits for minutes, and nothing interrupts it."""
        over = threading.Event()

        def end(reason: str) -> None:
            if not over.wait(_GOODBYE_SECONDS):
                end_process(f"{reason}; rank 0 waits for it in vain", after=0)

        def watch(reason: str) -> None:
            threading.Thread(target=end, args=(reason,), name="stuck", daemon=True).start()

        self.when_lost(watch)
        try:
            yield
        finally:
            over.set()

    def serve(self) -> None:
        """From now on a rank that stands still is missed soon: requests wait for it. One that
        loads may be held up for long, by a disk or a driver."""
        self._patience = _SILENCE_SECONDS

    def send(self, command: str, *arguments: Any) -> None:
        """Let every other rank do this. Raises RankLost."""
        for link in self._links.values():
            if self.lost is not None:
                raise RankLost(self.lost)
            try:
                with self._sending:
                    link.send((command, arguments))
            except OSError as error:
                raise RankLost(self.lost or f"a rank is gone: {error}") from error

    def when_lost(self, action: Callable[[str], None]) -> None:
        """Call this, once, with what happened, should a rank be lost."""
        with self._changed:
            self._when_lost = action
            lost = self.lost
        if lost is not None:
            action(lost)

    def lose(self, reason: str) -> None:
        """The ranks cannot go on together."""
        with self._changed:
            if self.lost is not None or self._closing:
                return
            self.lost = reason
            action = self._when_lost
            self._changed.notify_all()
        logger.critical("%s", reason)
        action(reason)
        self._kill()  # who waits for them in the process group fails then

    def blame(self, error: BaseException) -> str:
        """Rank 0 failed, often because another is gone: that is then the reason, which is told."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, timeout=2 * _BEAT_SECONDS)
        if self.lost is None:
            logger.error("rank 0 failed", exc_info=error)
        self.lose(f"rank 0 of {self.size}: {error or type(error).__name__}")
        return self.lost or str(error)

    def say_goodbye(self) -> None:
        """Let the others end. They leave the process group, as this rank must, too."""
        with self._changed:
            self._closing = True
        for link in self._links.values():
            try:
                link.send(("close", ()))
            except OSError:
                pass

    def close(self) -> None:
        """Leave the process group together with the others, and see them end."""
        if not self._closing:
            self.say_goodbye()
        leave_group(self.lost)
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for link in self._links.values():
            link.close()

    def _watch(self) -> None:
        heard = dict.fromkeys(self._links, time.monotonic())
        rank_of = {link: rank for rank, link in self._links.items()}
        while not self._closing:
            before = time.monotonic()
            try:
                ready = connection.wait(list(rank_of), _BEAT_SECONDS)
            except (OSError, ValueError):  # closed
                return
            now = time.monotonic()
            if now - before > 4 * _BEAT_SECONDS:  # it was this process that stood still
                heard = dict.fromkeys(heard, now)
            for link in ready:
                rank = rank_of[link]  # type: ignore[index]
                heard[rank] = now
                if not self._hear(rank):
                    return
            for rank, when in heard.items():
                if now - when > self._patience:
                    self.lose(
                        f"rank {rank} of {self.size} stands still: not heard for {now - when:.0f} s"
                    )
                    return

    def _hear(self, rank: int) -> bool:
        """Take what this rank says; False when it is gone."""
        try:
            what, about = self._links[rank].recv()
        except (EOFError, OSError):
            # its socket is closed before its status can be read
            ended = self._ended_process(_BEAT_SECONDS) if self._processes else None
            self.lose(ended or f"rank {rank} of {self.size} is gone")
            return False
        if what == "failed":
            self.lose(about)
            return False
        if what != "alive":
            with self._changed:
                self._told[what, rank] = about
                self._changed.notify_all()
        return True

    def _ended_process(self, wait: float = 0.0) -> str | None:
        deadline = time.monotonic() + wait
        while True:
            for rank, process in enumerate(self._processes, 1):
                if process.poll() is not None:
                    return f"rank {rank} of {self.size} ended with status {process.returncode}"
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.01)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()


class RankLost(RequestError):
    """A rank is gone, stands still, or failed: nothing can be computed any more."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the engine failed: {reason}", 424)


class Link:
    """Another rank's hold of rank 0. When that is gone, this process ends."""

    def __init__(self, store: TCPStore, rank: int) -> None:
        link = socket.socket(socket.AF_UNIX)
        link.connect(store.get("socket").decode())
        self._connection = connection.Connection(link.detach())
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._connection.send(rank)
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def tell(self, what: str, about: Any = None) -> None:
        with self._sending:
            self._connection.send((what, about))

    def receive(self) -> tuple[str, tuple[Any, ...]]:
        """The next command. Raises EOFError when rank 0 is gone."""
        try:
            command, arguments = self._connection.recv()
        except OSError as error:
            raise EOFError from error
        return command, arguments

    def told(self, command: str) -> Any:
        """The argument of this command, which is the next. Raises EOFError when rank 0 is gone, or
        could not load."""
        got, arguments = self.receive()
        if got != command:
            raise EOFError
        (argument,) = arguments
        return argument

    def agree(self, what: str, failure: str | None, patience: float | None = None) -> str | None:
        """See fast_steps.Agree."""
        self.tell(what, failure)
        if failure is not None and not self._connection.poll(patience):
            raise TimeoutError(failure)
        against: str | None = self.told(what)
        return against

    def close(self) -> None:
        """Rank 0 said goodbye, and may go."""
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                self.tell("alive")
            except OSError:
                # its goodbye may be here and not be read yet; else the thread that would read it
                # may wait for rank 0 in a process group for ever
                if not self._closed.wait(_LAST_WORDS_SECONDS):
                    os._exit(1)


def start_processes(
    folder: Path, c: Configuration, size: int, port: int
) -> list[subprocess.Popen[bytes]]:
    """Ranks 1 to size - 1, each told what it is by its standard input."""
    package = Path(handler.__file__).parents[1]
    search = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    processes = []
    for rank in range(1, size):
        # a session of its own: Ctrl-C in a terminal is for rank 0, which ends the others
        process = subprocess.Popen(
            [sys.executable, "-m", "handler.engines.torch_ranks.rank"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search},
            start_new_session=True,
        )
        told = {"folder": str(folder), "rank": rank, "size": size, "port": port}
        assert process.stdin is not None
        process.stdin.write(json.dumps({**told, "configuration": asdict(c)}).encode())
        process.stdin.close()
        processes.append(process)
    return processes


def refuse_another_model() -> None:
    """Raises LoadError where this process has a model on several ranks already."""
    if dist.is_initialized():
        raise LoadError(
            "a process has one model of option.tensor_parallel_degree > 1: close the other first"
        )


def process_group(store: TCPStore, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
    """Where the ranks' results meet; returns when all are there."""
    # NCCL refuses two ranks on one GPU
    by_nccl = device.type == "cuda" and torch.cuda.device_count() >= size
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else by the host's name, which may be none
    dist.init_process_group(
        "nccl" if by_nccl else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_START_SECONDS),
        device_id=device if by_nccl else None,
    )
    group = dist.group.WORLD
    assert group is not None
    return group


def leave_group(lost: str | None = None) -> None:
    """Let this process join another one later. All ranks leave at the same time: in NCCL each waits
    for the others, and not to the end of days here. For one that is lost nobody waits."""
    if not dist.is_initialized() or (lost is not None and dist.get_backend() != "gloo"):
        return
    leaving = threading.Thread(target=dist.destroy_process_group, name="leaving", daemon=True)
    leaving.start()
    leaving.join(_GOODBYE_SECONDS)
