"""In-flight batching: waiting -> running -> done. A prompt joins and leaves at every step.

The running rows are always the engine's leading ones. Between two decoding steps the engine encodes
the next prompts, in parts, for about as long as a step takes: rows that run wait for no more than
that and one part, and new ones soon run beside them. Where nothing ran, prompts that came together
begin together: a step of many rows takes little longer than one of a single row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from handler.encoder_cache import EncoderCache
from handler.encoding import PromptEncoder, Ready
from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.rows import Row, rows_for, take_tokens
from handler.runner import Runner

if TYPE_CHECKING:
    from handler.engines.protocol import StepEngine

logger = logging.getLogger(__name__)

# How long rows without a token may wait for others that came with them.
_GATHER_SECONDS = 0.5

SUPPORTED_PARAMETERS = frozenset(
    """
    max_new_tokens min_new_tokens do_sample temperature top_k top_p typical_p num_beams
    length_penalty early_stopping num_return_sequences seed repetition_penalty presence_penalty
    frequency_penalty no_repeat_ngram_size stop_sequences bad_words_list regex choices details
    return_log_probs top_n_tokens return_full_text truncate ignore_eos_token
    """.split()
)


class Scheduler(Runner):
    """Owns a step engine, which only its thread calls.

    encoder_cache: bytes of encoded prompts that are kept for when they come again.
    """

    supported_parameters = SUPPORTED_PARAMETERS
    scores = True

    def __init__(self, engine: StepEngine, max_queue: int, encoder_cache: int = 0) -> None:
        super().__init__(engine, max_queue)
        self._engine = engine
        self._cache = EncoderCache(encoder_cache)
        self._encoder = PromptEncoder(engine, self._cache)
        self._rows: list[Row] = []
        self._step_seconds = 0.0  # what the last decoding step took
        self._thread.start()

    @property
    def running(self) -> int:
        generations = {id(row.generation) for row in tuple(self._rows)}
        return len(generations) + len(self._encoder.generations)

    @property
    def encoder_cache_use(self) -> tuple[int, int]:
        return self._cache.hits, self._cache.misses

    def _run(self) -> None:
        while self._rows or self._encoder.generations or self._waiting.wait():
            self._encode_for_a_while()
            self._decode()

    def _in_progress(self) -> list[Generation]:
        generations = [row.generation for row in tuple(self._rows)]
        return [*generations, *self._encoder.generations]

    def _forget(self) -> None:
        self._rows = []
        self._encoder.stop()

    def _free(self) -> None:
        self._engine.close()

    def _encode_for_a_while(self) -> None:
        """Encode the next prompts for as long as a decoding step takes, at least one part.

        While no row has a token yet there is no stream to hold up: then until every prompt that
        there is room for has its row, or for _GATHER_SECONDS.
        """
        start = perf_counter()
        while self._admit():
            try:
                self._start(self._encoder.work())
            except BaseException as error:  # whatever it was, nobody may be left waiting
                self._fail(self._encoder.generations, error)
                self._encoder.stop()
            has_begun = any(row.position for row in self._rows)
            allowed = self._step_seconds if has_begun else _GATHER_SECONDS
            if self._rows and perf_counter() - start >= allowed:
                return

    def _admit(self) -> bool:
        """Whether there is something to encode; what is known already gets its rows at once."""
        while not self._encoder.generations:
            taken = self._next_prompts()
            if not taken:
                return False
            unknown = []
            for generation in taken:
                ready = self._encoder.known(generation)
                if ready is None:
                    unknown.append(generation)
                else:
                    self._start([ready])
            self._encoder.begin(unknown)
        return True

    def _next_prompts(self) -> list[Generation]:
        """As many as fit together, in their turn. One that finds no room holds up the others, or
        those with many rows would wait for ever."""
        rows, tokens = self._engine.max_rows - len(self._rows), self._engine.encode_tokens
        all_fit, taken = True, 0

        def fits(generation: Generation) -> bool:
            nonlocal rows, tokens, all_fit, taken
            rows -= generation.rows
            tokens -= len(generation.prompt_ids)
            all_fit = all_fit and rows >= 0 and (tokens >= 0 or not taken)
            taken += 1
            return all_fit

        return self._waiting.take(rows, fits)

    def _start(self, ready: Iterable[Ready]) -> None:
        """Give each its rows, the next free ones."""
        for generation, handle, cached in ready:
            rows = rows_for(generation, self._engine.decoder_start_token_id)
            try:
                for place in range(len(self._rows), len(self._rows) + len(rows)):
                    self._engine.attach(handle, place)
            except BaseException as error:
                self._fail([generation], error)
                continue
            generation.started(cached=cached)
            self._rows += rows

    def _decode(self) -> None:
        """One step of all running rows."""
        rows = self._rows
        if not rows:
            return
        start = perf_counter()
        try:
            tokens = np.array([[row.token] for row in rows])
            positions = np.array([row.position for row in rows])
            logits = self._engine.decode(len(rows), tokens, positions)[:, 0]
        except BaseException as error:
            self._fail([row.generation for row in rows], error)
            self._rows = []
            return
        take_tokens(rows, logits, self._engine, self._fail)
        self._step_seconds = perf_counter() - start
        self._free_rows()

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
