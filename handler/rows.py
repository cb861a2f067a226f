"""The running rows, and how each comes to its next token: chosen, scored, or by a beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from handler.beams import BeamSearch, largest
from handler.continuation import TopToken
from handler.generation import Generation, not_a_number, nothing_left, too_few_texts
from handler.sampling import (
    Chosen,
    Floats,
    RowSampling,
    gumbel,
    log_softmax,
    process,
    warp,
)

if TYPE_CHECKING:
    from handler.engines.protocol import StepEngine

Fail = Callable[[Sequence[Generation], BaseException], None]


class Row:
    """One row of the engine: what it decodes, and the token that it reads next."""

    def __init__(
        self, generation: Generation, token: int, search: BeamSearch | None = None, beam: int = 0
    ) -> None:
        self.generation = generation
        self.token = token
        self.search = search
        self.beam = beam
        guide = generation.guide and generation.guide.fork()
        self.sampling = RowSampling(
            generation.parameters,
            token,
            generation.bad_words,
            guide,
            log_probs=generation.log_probs,
        )

    @property
    def position(self) -> int:
        return len(self.generation.token_ids) if self.search is None else self.search.length

    @property
    def last_position(self) -> int:
        """Where the longest text that it may become reads its last token."""
        return self.generation.parameters.max_new_tokens - 1


def rows_for(generation: Generation, start_token: int) -> list[Row]:
    """The rows of a generation that begins: one, or one a beam."""
    if generation.rows == 1:
        return [Row(generation, start_token)]
    search = BeamSearch(generation.parameters, generation.continuation)
    return [Row(generation, start_token, search, beam) for beam in range(generation.rows)]


def choose_next(
    rows: Sequence[Row], logits: Any, engine: StepEngine, fail: Fail
) -> Callable[[], None]:
    """Begin to choose every row's next token, from logits [rows, vocabulary] of the engine's
    sampler, which may be overwritten. What this returns waits for them and gives them to the rows.

    An error fails the generations that it hits.
    """
    searches: dict[BeamSearch, list[int]] = {}
    free, forced = [], []
    for place, row in enumerate(rows):
        if row.search is not None:
            searches.setdefault(row.search, []).append(place)
        elif row.generation.forced:
            forced.append(place)
        else:
            free.append(place)
    for places in (*([place] for place in forced), *searches.values()):
        places.sort(key=lambda place: rows[place].beam)
        affected = [rows[place] for place in places]
        try:
            if affected[0].search is None:
                _score(affected[0], engine.sampler.on_host(logits[places]))
            else:
                _advance(affected, places, engine.sampler.on_host(logits[places]), engine)
        except BaseException as error:
            fail([affected[0].generation], error)
    if not free:
        return lambda: None
    whole = len(free) == len(rows)
    return _choose([rows[place] for place in free], logits if whole else logits[free], engine, fail)


def _choose(rows: Sequence[Row], logits: Any, engine: StepEngine, fail: Fail) -> Callable[[], None]:
    """See choose_next."""
    sampler, tokenizer = engine.sampler, engine.tokenizer
    top: list[tuple[TopToken, ...]] = [()] * len(rows)
    try:
        for i, row in enumerate(rows):
            if row.generation.parameters.top_n_tokens:
                top[i] = _top_tokens(row, sampler.on_host(logits[i : i + 1]))
        chosen = sampler.choose(
            logits,
            [row.sampling for row in rows],
            [row.position for row in rows],
            tokenizer.eos_token_id,
            tokenizer.size,
        )
    except BaseException as error:
        fail([row.generation for row in rows], error)
        return lambda: None
    return lambda: _take(rows, chosen, top, fail)


def _take(
    rows: Sequence[Row],
    chosen: Callable[[], Chosen],
    top: Sequence[tuple[TopToken, ...]],
    fail: Fail,
) -> None:
    try:
        tokens, log_probs = chosen()
    except BaseException as error:
        fail([row.generation for row in rows], error)
        return
    for row, token, log_prob, likeliest in zip(rows, tokens, log_probs, top):
        if row.generation.done:  # it has run once more, for nothing
            continue
        row.token = token
        try:
            row.generation.append(token, log_prob, likeliest)
        except BaseException as error:  # its text, or who listens to it
            fail([row.generation], error)


def _score(row: Row, logits: Floats) -> None:
    """The log-probability of the token that comes next, whatever the model would choose."""
    row.token = row.generation.forced[row.position]
    top = _top_tokens(row, logits)
    row.generation.append(row.token, float(log_softmax(logits)[0, row.token]), top)


def _advance(
    rows: Sequence[Row], places: Sequence[int], logits: Floats, engine: StepEngine
) -> None:
    """A step of one beam search. rows: in the beams' order, at these places of the engine."""
    search, generation = rows[0].search, rows[0].generation
    assert search is not None
    log_probs = log_softmax(logits)
    if np.isnan(log_probs).any():
        raise not_a_number()
    step, tokenizer = search.length, engine.tokenizer
    samplings = [row.sampling for row in rows]
    scores = log_probs.copy()
    scores[:, tokenizer.size :] = -np.inf
    process(scores, samplings, [step] * len(rows), tokenizer.eos_token_id)
    noise = None
    if generation.parameters.samples:
        scores = warp(scores, samplings)
        noise = gumbel(samplings[0], step, scores.shape)
    chosen = search.advance(log_probs, scores, noise)
    if chosen is None:
        if not search.best:
            raise nothing_left(step)
        wanted = generation.parameters.num_return_sequences
        if len(search.best) < wanted:
            raise too_few_texts(wanted, len(search.best))
        generation.finish(search.best)
        return
    engine.reorder(places, [places[parent] for parent in chosen.parents])
    for row, token, parent in zip(rows, chosen.tokens, chosen.parents):
        row.token, row.sampling = token, samplings[parent].fork()
        row.sampling.append(token)


def _top_tokens(row: Row, logits: Floats) -> tuple[TopToken, ...]:
    """The likeliest tokens of logits [1, vocabulary], where the request asked for them."""
    count = row.generation.parameters.top_n_tokens
    if not count:
        return ()
    log_probs = log_softmax(logits)[0]
    return tuple(TopToken(int(i), float(log_probs[i])) for i in largest(log_probs, count))
