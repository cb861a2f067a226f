"""In-flight batching: waiting -> running -> done. A prompt joins and leaves at every step.

The running rows are always the engine's leading ones. Between two decoding steps the engine encodes
the next prompts, in parts, for about as long as a step takes: rows that run wait for no more than
that and one part, and new ones soon run beside them. Where nothing ran, prompts that came together
begin together: a step of many rows takes little longer than one of a single row.

Where the engine is a device that works by itself, a step begins as soon as the last one's tokens
are chosen there: it runs while they come back, are made text of and are told. A row that they end
has then run once more, for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from handler.encoder_cache import EncoderCache
from handler.encoding import PromptEncoder, Ready
from handler.errors import RequestError, as_request_error
from handler.generation import Generation
from handler.rows import Row, choose_next, rows_for
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


class _Step(NamedTuple):
    """A decoding step of these rows, and the logits [rows, vocabulary] that come of it."""

    rows: Sequence[Row]
    logits: Any


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
        self._begun: _Step | None = None  # ahead of its rows' tokens
        self._step_seconds = 0.0  # what the last decoding step took
        self._waited = 0.0  # of them, before prompts were encoded
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
        self._rows, self._begun = [], None
        self._encoder.stop()

    def _free(self) -> None:
        self._engine.close()

    def _encode_for_a_while(self) -> None:
        """Encode the next prompts for as long as a decoding step takes, at least one part.

        While no row has a token yet there is no stream to hold up: then until every prompt that
        there is room for has its row, or for _GATHER_SECONDS.
        """
        start = None
        while self._admit():
            if start is None:
                start = self._when_step_is_done()
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

    def _when_step_is_done(self) -> float:
        """The time at which it is: encoding is measured from then on."""
        start = perf_counter()
        self._engine.wait()
        done = perf_counter()
        self._waited = done - start
        return done

    def _decode(self) -> None:
        """One step of all running rows; those that came while it ran have theirs next."""
        start = perf_counter()
        try:
            step = self._next_step()
            if step is None:
                return
            tell = choose_next(step.rows, step.logits, self._engine, self._fail)
            try:
                self._begun = self._begin(step.rows) if self._goes_ahead() else None
            finally:
                tell()  # what is chosen counts, whatever becomes of the next step
        except BaseException as error:
            self._fail([row.generation for row in self._rows], error)
            self._rows, self._begun = [], None
            return
        self._step_seconds = perf_counter() - start + self._waited
        self._waited = 0.0
        self._free_rows()
        if not self._rows:
            self._begun = None  # for nothing, and its logits may be all that holds their memory

    def _next_step(self) -> _Step | None:
        """The one that has begun, if any of its rows still runs, or a new one; None without rows.

        Those that have ended stay in it: to pick the others' logits, the device would have to be
        told which, and torch waits for it then.
        """
        begun, self._begun = self._begun, None
        if begun is not None and not all(row.generation.done for row in begun.rows):
            return begun
        return self._begin() if self._rows else None

    def _goes_ahead(self) -> bool:
        """Whether the next step can begin before the last one's tokens are known.

        Those of beams and of scores come from the host; of rows that all end now none is needed.
        """
        rows = self._rows
        return (
            self._engine.runs_ahead
            and not any(row.search is not None or row.generation.forced for row in rows)
            and any(row.position < row.last_position for row in rows)
        )

    def _begin(self, chosen: Sequence[Row] = ()) -> _Step:
        """A step of all running rows. chosen: those whose tokens only the sampler knows yet."""
        rows = list(self._rows)
        of_sampler = {row: -1 - i for i, row in enumerate(chosen)}
        tokens = np.array([[of_sampler.get(row, row.token)] for row in rows])
        # a row that its token ends has no further place: it takes its last one again
        positions = np.array(
            [min(row.position + (row in of_sampler), row.last_position) for row in rows]
        )
        return _Step(rows, self._engine.decode(len(rows), tokens, positions)[:, 0])

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
