"""Logits -> next tokens, each row by its own parameters: docs/sampling.md.

Order and formulas are those of transformers' logits processors. A draw takes the first token, in
the vocabulary's order, whose cumulative probability exceeds the row's number for this step.

A row's token and log-probability do not depend, bit for bit, on the rows beside it: sums run along
contiguous rows of one fixed length, or one element after the other where rows are padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from handler.guided import Guide
from handler.history import History
from handler.parameters import GenerationParameters, random_seed
from handler.token_filters import draw, keep, rows_of

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]

_NUMBERS = 64  # of one row that are made at a time; Philox makes 4 for each count
_FAR = 60.0  # exp of what is nearer to 0 keeps its precision in fp32, and so does a sum of them


class RowSampling:
    """How one row's tokens are chosen: its parameters, its seed, and its tokens so far.

    start_token: what the decoder reads first, which transformers' penalties count as generated.
    bad_words: sequences of ids that are never completed. guide: the form that the text must have.
    log_probs: whether its tokens' log-probabilities are wanted, which take an exponential of every
    logit.
    """

    def __init__(
        self,
        parameters: GenerationParameters,
        start_token: int = 0,
        bad_words: Sequence[Sequence[int]] = (),
        guide: Guide | None = None,
        *,
        log_probs: bool = True,
    ) -> None:
        p = self.parameters = parameters
        self.samples = p.samples
        self.filters = p.top_k, p.temperature, p.top_p, p.typical_p
        # the step from which on the text may end
        self.may_end = math.inf if p.ignore_eos_token else p.min_new_tokens
        self.log_probs = log_probs
        self.seed = random_seed() if p.seed is None else p.seed
        self.penalizes = (
            p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        )
        self.history = (
            History(p, start_token, bad_words)
            if self.penalizes or p.no_repeat_ngram_size or bad_words
            else None
        )
        self.guide = guide
        self._numbers: tuple[int, list[float]] = (-1, [])

    def append(self, token: int) -> None:
        """The row's next token is this one."""
        if self.history is not None:
            self.history.append(token)
        if self.guide is not None:
            self.guide.append(token)

    def fork(self) -> RowSampling:
        """A copy that goes on by itself."""
        other = copy(self)
        other.history = self.history and self.history.fork()
        other.guide = self.guide and self.guide.fork()
        return other

    def uniform(self, step: int) -> float:
        """A number from [0, 1) that the seed and the step decide."""
        part, place = divmod(step, _NUMBERS)
        if self._numbers[0] != part:
            bits = np.random.Philox(key=self.seed, counter=part * _NUMBERS // 4)
            self._numbers = part, np.random.Generator(bits).random(_NUMBERS).tolist()
        return self._numbers[1][place]


class Chosen(NamedTuple):
    """The next token of each row, and its log-probability where the row wants it."""

    tokens: list[int]
    log_probs: list[float | None]


def choose_tokens(
    logits: Floats,
    rows: Sequence[RowSampling],
    steps: Sequence[int],
    eos_token_id: int,
    tokens_in_use: int | None = None,
) -> Chosen:
    """The next token of each row and its log-probability before any penalty or filter.

    logits: [rows, vocabulary], overwritten; steps: how many tokens each row has generated;
    tokens_in_use: ids from here on are the vocabulary's padding. Each row is told its token. A
    log-probability of NaN says that the row's logits were no numbers, one of -inf that its
    parameters forbid every token; None is one that the row does not want.
    """
    logits = np.ascontiguousarray(logits)
    in_use = logits.shape[-1] if tokens_in_use is None else tokens_in_use
    every = np.arange(len(rows))
    tokens = logits.argmax(-1)
    best = logits[every, tokens]
    padding = logits[:, in_use:]
    hidden = padding.copy()
    padding[:] = -np.inf
    for row in np.flatnonzero(tokens >= in_use).tolist():
        tokens[row] = logits[row].argmax()
    allowed = logits[every, tokens]
    changes = process(logits, rows, steps, eos_token_id)
    if changes.rows:
        for row in {*np.flatnonzero(logits[every, tokens] != allowed).tolist(), *changes.raised}:
            tokens[row] = logits[row].argmax()
        allowed = logits[every, tokens]
    possible = np.isfinite(allowed).tolist()
    drawing = [row for row, sampling in enumerate(rows) if sampling.samples and possible[row]]
    if drawing:
        tokens[drawing] = _draw(logits, rows, steps, drawing)
    log_probs = np.zeros(len(rows))
    telling = [row for row, sampling in enumerate(rows) if sampling.log_probs]
    if telling:
        changes.undo(logits)
        padding[:] = hidden
        wanted = rows_of(logits, telling)  # overwritten: of no further use
        log_probs[telling] = _log_probs(wanted, tokens[telling], best[telling])
    log_probs[allowed == -np.inf] = -np.inf
    log_probs[~np.isfinite(best)] = np.nan
    picked: list[int] = tokens.tolist()
    for sampling, token in zip(rows, picked):
        sampling.append(token)
    told = zip(rows, log_probs.tolist())
    return Chosen(
        picked, [p if sampling.log_probs or not math.isfinite(p) else None for sampling, p in told]
    )


class HostSampler:
    """See Sampler: for logits that are numpy's."""

    def choose(
        self,
        logits: Floats,
        rows: Sequence[RowSampling],
        steps: Sequence[int],
        eos_token_id: int,
        tokens_in_use: int | None = None,
    ) -> Callable[[], Chosen]:
        chosen = choose_tokens(logits, rows, steps, eos_token_id, tokens_in_use)
        return lambda: chosen

    def on_host(self, logits: Floats) -> Floats:
        return logits


class Changes:
    """Which rows' scores were changed, in which some became larger, and what stood there before."""

    def __init__(
        self, rows: Sequence[int], raised: Sequence[int], places: Places, before: Floats
    ) -> None:
        self.rows = rows
        self.raised = raised
        self._places = places
        self._before = before

    def undo(self, scores: Floats) -> None:
        scores.reshape(-1)[self._places] = self._before


_NO_CHANGES = Changes([], [], np.zeros(0, np.int64), np.zeros(0, np.float32))


class Planned(NamedTuple):
    """What penalties, n-grams, bad words, the least length and the text's form change.

    rows: whose scores. penalized, banned: places in the flat scores, which come in this order;
    counts [penalized], penalties [penalized, 3]: see ``_penalized``.
    """

    rows: Sequence[int]
    penalized: Places
    counts: Floats
    penalties: Floats
    banned: Places


def planned(
    rows: Sequence[RowSampling], steps: Sequence[int], eos_token_id: int, size: int
) -> Planned | None:
    """Of scores [rows, size], in transformers' order; None: nothing."""
    ending = [row for row, step in enumerate(steps) if step < rows[row].may_end]
    remembering = [row for row, sampling in enumerate(rows) if sampling.history is not None]
    guided = [row for row, sampling in enumerate(rows) if sampling.guide is not None]
    if not ending and not remembering and not guided:
        return None
    forbidden = [row * size + eos_token_id for row in ending]
    parts = []
    for row in remembering:
        history = rows[row].history
        assert history is not None
        forbidden += [row * size + token for token in history.forbidden()]
        if len(history.always_forbidden):
            parts.append(history.always_forbidden + row * size)
    for row in guided:
        guide = rows[row].guide
        assert guide is not None
        other = np.ones(size, np.bool_)
        other[guide.allowed()] = False
        parts.append(np.flatnonzero(other) + row * size)
    banned = np.concatenate([np.array(forbidden, np.int64), *parts])
    return Planned([*ending, *remembering, *guided], *_penalties(rows, remembering, size), banned)


def process(
    scores: Floats, rows: Sequence[RowSampling], steps: Sequence[int], eos_token_id: int
) -> Changes:
    """Make the planned changes in place.

    scores: contiguous [rows, vocabulary], logits or, for beams, log-probabilities.
    """
    size = scores.shape[-1]
    plan = planned(rows, steps, eos_token_id, size)
    if plan is None:
        return _NO_CHANGES
    penalized = plan.penalized
    places = np.concatenate([penalized, plan.banned])
    flat = scores.reshape(-1)
    before = flat[places]
    raised: list[int] = []
    if len(penalized):
        old = before[: len(penalized)]
        flat[penalized] = new = _penalized(old, plan.counts, plan.penalties)
        raised = (penalized[new > old] // size).tolist()
    flat[plan.banned] = -np.inf
    return Changes(plan.rows, raised, places, before)


def warp(scores: Floats, rows: Sequence[RowSampling]) -> Floats:
    """[rows, vocabulary]: temperature, top_k, top_p and typical_p of beams that are drawn.

    What is filtered out is -inf. As in transformers, at least two tokens of a beam stay: one of
    them may be the end of the text.
    """
    top_k, values = filters_of(rows)
    warped: Floats = scores / values[0].astype(np.float32)[:, None]
    if top_k.any() or values[1:].any():
        warped[~keep(warped.astype(np.float64), top_k, values[1], values[2], least=2)] = -np.inf
    return warped


def log_softmax(logits: Floats) -> Floats:
    """Of logits [rows, vocabulary]."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def gumbel(row: RowSampling, step: int, shape: tuple[int, ...]) -> Floats:
    """Gumbel noise for this step: argmax of log-probabilities plus it is a draw of them."""
    # far apart: the generator counts up from there as it goes on
    bits = np.random.Generator(np.random.Philox(key=row.seed, counter=(step + 1) << 64))
    noise: Floats = -np.log(-np.log(bits.random(shape, np.float32).clip(1e-20, None)))
    return noise


def _penalties(
    rows: Sequence[RowSampling], remembering: Sequence[int], size: int
) -> tuple[Places, Floats, Floats]:
    """Places in the flat scores, how often each was generated, and its row's three penalties."""
    places, counts, penalties = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], []
    for row in remembering:
        history, p = rows[row].history, rows[row].parameters
        if history is not None and rows[row].penalizes:
            tokens, generated = history.counts()
            places.append(tokens + row * size)
            counts.append(generated)
            penalties.append((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
    lengths = [len(part) for part in places[1:]]
    by_row = np.array(penalties, np.float32).reshape(-1, 3)
    return np.concatenate(places), np.concatenate(counts), np.repeat(by_row, lengths, axis=0)


def _penalized(scores: Floats, counts: Floats, penalties: Floats) -> Floats:
    """Repetition as transformers (CTRL, arXiv 1909.05858), then frequency and presence as OpenAI's
    API and vLLM define them. scores, counts: [places]; penalties: [places, 3]."""
    repetition, presence, frequency = penalties.T
    scores = np.where(scores < 0, scores * repetition, scores / repetition)
    scores -= frequency * counts
    scores -= presence * (counts > 0)
    return scores


def _draw(
    logits: Floats, rows: Sequence[RowSampling], steps: Sequence[int], drawing: Sequence[int]
) -> Places:
    """One token for each of the rows ``drawing``."""
    top_k, values = filters_of([rows[row] for row in drawing])
    numbers = np.array([rows[row].uniform(steps[row]) for row in drawing])
    return draw(rows_of(logits, drawing), top_k, values, numbers)


def filters_of(rows: Sequence[RowSampling]) -> tuple[Places, npt.NDArray[np.float64]]:
    """top_k of each row, and [3, rows]: temperature, top_p and typical_p."""
    table = np.array([row.filters for row in rows]).T
    return table[0].astype(np.int64), table[1:]


def _log_probs(logits: Floats, tokens: Places, best: Floats) -> npt.NDArray[np.float64]:
    """Of the tokens [rows]; best: the largest logit of each row. ``logits`` are overwritten."""
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    shifts = np.where(np.abs(best) < _FAR, np.float32(0.0), best)
    with np.errstate(divide="ignore", invalid="ignore"):  # logits that are no numbers
        for row in np.flatnonzero(shifts):
            logits[row] -= shifts[row]
        np.exp(logits, out=logits)
        sums = np.log(logits.sum(-1).astype(np.float64)) + shifts
        log_probs: npt.NDArray[np.float64] = np.minimum(chosen - sums, 0.0)
    return log_probs
