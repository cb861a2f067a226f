"""Lines in, answers out, in their order: as many at a time as the engine takes, and no more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from handler.answering import Submitted, tokens_done
from handler.batch.files import Line
from handler.batch.lines import LineForm
from handler.batch.progress import Progress
from handler.batch.results import Results
from handler.errors import LoadError
from handler.generation import GenerationResult
from handler.responses import Reply
from handler.service import Service

# For each of the engine's rows: lines that are being answered, and lines that are, or wait for one
# before them to be written. So a long answer holds up nothing but the writing.
_ANSWERING_PER_ROW = 4
_KEPT_PER_ROW = 64
# Lines that are answered in the order of their length by an engine that pads them: a third of its
# work less where lengths differ much.
_SORTED_PER_ROW = 8
_KEPT_BYTES = 64 << 20
# So many in a row that the engine fails on are not the lines' fault.
_MOST_FAILURES = 100
# How often a signal is looked for while nothing happens.
_POLL_SECONDS = 0.5

_ENGINE_FAILED = 424
_OF_THE_SERVER = (503, 504, 507)


@dataclass
class _Pending:
    """answer: None of a line whose turn has not come."""

    line: Line
    answer: Submitted | Reply | None = None

    @property
    def futures(self) -> list[Future[GenerationResult]]:
        return self.answer.futures if isinstance(self.answer, Submitted) else []

    @property
    def size(self) -> int:
        return len(self.line.content or b"")

    @property
    def done(self) -> bool:
        return self.answer is not None and all(future.done() for future in self.futures)


class Batch:
    """One run over an input's lines. ``stop``: set from a signal, ends it at the next line."""

    def __init__(
        self,
        service: Service,
        form: LineForm,
        results: Results,
        progress: Progress,
        *,
        strict: bool,
        stop: threading.Event,
    ) -> None:
        self._service, self._form = service, form
        self._results, self._progress = results, progress
        self._strict, self._stop = strict, stop
        rows = service.model.limits.max_rows
        self._most_answering, self._most_kept = _ANSWERING_PER_ROW * rows, _KEPT_PER_ROW * rows
        self._sorted = _SORTED_PER_ROW * rows if service.model.pads_prompts else 1
        self._answering = _Answering(stop)
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0
        self._failures: list[tuple[Line, Reply]] = []

    def run(self, lines: Iterable[Line]) -> None:
        """Until the last line, or ``stop``. What is done by then is written, however it ends.

        Raises LoadError: with ``strict`` for a bad line, else where the engine cannot go on.
        """
        try:
            for together in _groups(lines, self._sorted):
                self._make_room(together)
                for pending in sorted(together, key=lambda p: p.size):
                    self._answering.wait_below(self._most_answering)
                    if self._stop.is_set():
                        break
                    self._submit(pending)
                    self._write_done()
                if self._stop.is_set():
                    break
            while self._pending and not self._stop.is_set():
                self._write_first()
            if self._stop.is_set():
                self._write_done()
            else:
                self._tell_failures()
                self._results.commit(complete=True)
        finally:
            for pending in self._pending:
                for future in pending.futures:
                    future.cancel()
            if not self._results.checkpoint.complete:
                self._results.commit()

    def _make_room(self, together: list[_Pending]) -> None:
        """Keep these lines, once there is room. All that are kept before have had their turn."""
        size = sum(pending.size for pending in together)
        while self._pending and not self._stop.is_set():
            full = len(self._pending) + len(together) > self._most_kept
            if not full and self._pending_bytes + size <= _KEPT_BYTES:
                break
            self._write_first()
        self._pending += together
        self._pending_bytes += size

    def _submit(self, pending: _Pending) -> None:
        pending.answer = self._answer(pending.line)
        if pending.futures:
            self._answering.add(pending.futures)
            self._service.model.run_submitted()

    def _answer(self, line: Line) -> Submitted | Reply:
        if line.content is None:
            return Reply(b"", 413, error="the line is longer than 64 MiB")
        if line.is_blank:
            return Reply(b"", 204)
        request = self._form.request(line.content)
        while True:
            waiting_for = self._answering.count
            answer = self._service.submit(request, self._form.wanted)
            if isinstance(answer, Submitted) or answer.status != 503 or not waiting_for:
                return answer
            self._answering.wait_below(waiting_for)  # lists of inputs have filled the queue
            if self._stop.is_set():
                return answer

    def _write_done(self) -> None:
        while self._pending and self._pending[0].done:
            self._write_first()
        self._results.commit_in_time()

    def _write_first(self) -> None:
        """Wait for the first line's answer, and write it; without effect where ``stop`` comes."""
        first = self._pending[0]
        if not self._answering.wait_for(first):
            return
        reply, tokens = first.answer, 0
        assert reply is not None
        if isinstance(reply, Submitted):
            tokens = tokens_done(reply)
            reply = self._service.collect(reply)
        if reply.status in _OF_THE_SERVER:
            raise LoadError(f"line {first.line.number}: {reply.error}")
        self._pending.popleft()
        self._pending_bytes -= first.size
        self._write(first.line, reply)
        self._progress.advance(first.line.number, len(first.futures), tokens)
        self._results.commit_in_time()

    def _write(self, line: Line, reply: Reply) -> None:
        """Failures of the engine are kept back until it answers again: one that cannot go on must
        not turn the rest of the input into bad lines."""
        if reply.status == _ENGINE_FAILED:
            self._failures.append((line, reply))
            if len(self._failures) > _MOST_FAILURES:
                raise LoadError(
                    f"the engine failed on {len(self._failures)} lines in a row, the first is line "
                    f"{self._failures[0][0].number}: {self._failures[0][1].error}"
                )
            return
        self._tell_failures()
        if reply.status == 204:
            self._results.skip(line)
        elif reply.error is None:
            assert line.content is not None
            self._results.answer(line, self._form.answer(line.content, reply))
        else:
            self._refuse(line, reply)

    def _tell_failures(self) -> None:
        for line, reply in self._failures:
            self._refuse(line, reply)
        self._failures = []

    def _refuse(self, line: Line, reply: Reply) -> None:
        if self._strict:
            raise LoadError(f"line {line.number}: {reply.error}")
        self._results.refuse(line, reply.status, reply.error or "")


def _groups(lines: Iterable[Line], most: int) -> Iterator[list[_Pending]]:
    """As many lines at a time, fewer where they are long."""
    group: list[_Pending] = []
    size = 0
    for line in lines:
        group.append(_Pending(line))
        size += group[-1].size
        if len(group) == most or size > _KEPT_BYTES // 4:
            yield group
            group, size = [], 0
    yield group


class _Answering:
    """How many lines are being answered."""

    def __init__(self, stop: threading.Event) -> None:
        self.count = 0
        self._changed = threading.Condition()
        self._stop = stop

    def add(self, futures: list[Future[GenerationResult]]) -> None:
        """One more line, until all of its futures are done."""
        left = len(futures)

        def one_is_done(_: Future[GenerationResult]) -> None:
            nonlocal left
            with self._changed:
                left -= 1
                if not left:
                    self.count -= 1
                    self._changed.notify_all()

        with self._changed:
            self.count += 1
        for future in futures:
            future.add_done_callback(one_is_done)

    def wait_below(self, most: int) -> None:
        """Until fewer than ``most`` are, or ``stop``."""
        with self._changed:
            while self.count >= most and not self._stop.is_set():
                self._changed.wait(_POLL_SECONDS)

    def wait_for(self, pending: _Pending) -> bool:
        """Whether it was done before ``stop``."""
        with self._changed:
            while not pending.done and not self._stop.is_set():
                self._changed.wait(_POLL_SECONDS)
        return pending.done
