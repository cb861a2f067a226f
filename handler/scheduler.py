"""In-flight batching: waiting -> running -> done. A prompt joins and leaves at every step.

The running rows are always the engine's leading ones. Between two decoding steps the engine encodes
the next prompts, in parts, for about as long as a step takes: rows that run wait for no more than
that and one part, and new ones soon run beside them. Where nothing ran, prompts that came together
begin together: a step of many rows takes little longer than one of a single row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.runner import Runner
from handler.sampling import RowSampling, choose_tokens

if TYPE_CHECKING:
    from handler.engines.protocol import StepEngine

logger = logging.getLogger(__name__)

# How long rows without a token may wait for others that came with them.
_GATHER_SECONDS = 0.5

SUPPORTED_PARAMETERS = frozenset(
    """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p seed stop_sequences details
    return_log_probs return_full_text truncate ignore_eos_token
    """.split()
)


class _Row:
    """One running generation: what the decoder reads next, and how its answer is chosen."""

    def __init__(self, generation: Generation, start_token: int) -> None:
        self.generation = generation
        self.token = start_token
        self.sampling = RowSampling(generation.parameters)

    @property
    def position(self) -> int:
        return len(self.generation.token_ids)


class Scheduler(Runner):
    """Owns a step engine, which only its thread calls."""

    supported_parameters = SUPPORTED_PARAMETERS

    def __init__(self, engine: StepEngine, max_queue: int) -> None:
        super().__init__(engine, max_queue)
        self._engine = engine
        self._encoding: list[Generation] = []
        self._parts: Iterator[Sequence[Any] | None] = iter(())
        self._rows: list[_Row] = []
        self._step_seconds = 0.0  # what the last decoding step took
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._rows) + len(self._encoding)

    def _run(self) -> None:
        while self._rows or self._encoding or self._waiting.wait():
            self._encode_for_a_while()
            self._decode()
        self._engine.close()

    def _encode_for_a_while(self) -> None:
        """Encode the next prompts for as long as a decoding step takes, at least one part.

        While no row has a token yet there is no stream to hold up: then until every prompt that
        there is room for has its row, or for _GATHER_SECONDS.
        """
        start = perf_counter()
        while True:
            self._admit()
            if not self._encoding:
                return
            self._encode()
            allowed = self._step_seconds if self._some_row_has_a_token else _GATHER_SECONDS
            if self._rows and perf_counter() - start >= allowed:
                return

    @property
    def _some_row_has_a_token(self) -> bool:
        return any(row.position for row in self._rows)

    def _admit(self) -> None:
        """Begin to encode the next prompts if there is a row for each of them."""
        free = self._engine.max_rows - len(self._rows)
        if self._encoding or not free:
            return
        tokens = 0

        def fits(generation: Generation) -> bool:
            nonlocal tokens
            tokens += len(generation.prompt_ids)
            return tokens <= self._engine.encode_tokens

        self._encoding = self._waiting.take(1)
        if not self._encoding:
            return
        tokens = len(self._encoding[0].prompt_ids)
        if tokens < self._engine.encode_tokens and free > 1:
            self._encoding += self._waiting.take(free - 1, fits)
        self._parts = self._parts_of([g.prompt_ids for g in self._encoding])

    def _parts_of(self, prompts: list[list[int]]) -> Iterator[Sequence[Any] | None]:
        """The engine is asked with the first part, where its errors are expected."""
        yield from self._engine.encode(prompts)

    def _encode(self) -> None:
        """Do the next part of the encoding; after the last one its prompts get their rows."""
        if all(g.done for g in self._encoding):
            self._encoding = []
            return
        try:
            handles = next(self._parts)
        except BaseException as error:  # whatever it was, nobody may be left waiting
            self._fail(self._encoding, error)
            handles = ()
        if handles is None:
            return
        for generation, handle in zip(self._encoding, handles):
            if not generation.done:
                self._start(generation, handle)
        self._encoding = []

    def _start(self, generation: Generation, handle: Any) -> None:
        try:
            self._engine.attach(handle, len(self._rows))
            self._rows.append(_Row(generation, self._engine.decoder_start_token_id))
        except BaseException as error:
            self._fail([generation], error)

    def _decode(self) -> None:
        """One step of all running rows."""
        rows = self._rows
        if not rows:
            return
        start = perf_counter()
        try:
            chosen, log_probs = self._next_tokens(rows)
        except BaseException as error:
            self._fail([row.generation for row in rows], error)
            self._rows = []
            return
        for row, token, log_prob in zip(rows, chosen, log_probs):
            row.token = token
            try:
                row.generation.append(token, log_prob)
            except BaseException as error:  # its text, or who listens to it
                self._fail([row.generation], error)
        self._step_seconds = perf_counter() - start
        self._free_rows()

    def _next_tokens(self, rows: Sequence[_Row]) -> tuple[list[int], list[float]]:
        tokens = np.array([[row.token] for row in rows])
        positions = np.array([row.position for row in rows])
        return choose_tokens(
            self._engine.decode(len(rows), tokens, positions)[:, 0],
            [row.sampling for row in rows],
            positions.tolist(),
            self._engine.tokenizer.eos_token_id,
        )

    def _free_rows(self) -> None:
        """The last running row takes the place of one that is done (or that nobody wants)."""
        rows = self._rows
        for place in reversed(range(len(rows))):
            while place < len(rows) and rows[place].generation.done:
                last = rows.pop()
                if place == len(rows):
                    break
                try:
                    self._engine.move(len(rows), place)
                    rows[place] = last
                except BaseException as error:
                    self._fail([last.generation], error)

    def _fail(self, generations: Sequence[Generation], error: BaseException) -> None:
        if not isinstance(error, RequestError):
            logger.error("the engine failed", exc_info=error)
        for generation in generations:
            generation.fail(as_request_error(error))
