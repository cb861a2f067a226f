"""Logits -> next tokens, each row by its own parameters.

The order of the filters and their formulas are those of transformers' logits processors:
temperature, top_k, top_p. Random numbers are counter-based, keyed by the request's seed and the
step: they do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from handler.parameters import GenerationParameters, random_seed

Floats = npt.NDArray[np.float32]


# Candidates that are sorted first where top_p cuts the tail off; mostly they suffice.
_LIKELY = 256


class RowSampling:
    """How one row's tokens are chosen: its parameters and its seed."""

    def __init__(self, parameters: GenerationParameters) -> None:
        self.parameters = parameters
        self.seed = random_seed() if parameters.seed is None else parameters.seed

    def ends_not_yet(self, step: int) -> bool:
        """Whether the end of the text must not be chosen at this step."""
        return self.parameters.ignore_eos_token or step < self.parameters.min_new_tokens

    def fork(self) -> RowSampling:
        """A copy that goes on by itself."""
        return self

    def uniform(self, step: int) -> float:
        """A number from [0, 1) for this step."""
        bits = np.random.Philox(key=self.seed, counter=step)
        return float(np.random.Generator(bits).random())


def choose_tokens(
    logits: Floats,
    rows: Sequence[RowSampling],
    steps: Sequence[int],
    eos_token_id: int,
    tokens_in_use: int | None = None,
) -> tuple[list[int], list[float]]:
    """The next token of each row and its log-probability before any filter.

    logits: [rows, vocabulary], overwritten; steps: how many tokens each row has generated;
    tokens_in_use: ids from here on are the vocabulary's padding.
    """
    best = logits.max(-1, keepdims=True)
    normalizer = best[:, 0] + np.log(np.exp(logits - best).sum(-1))
    if tokens_in_use is not None:
        logits[:, tokens_in_use:] = -np.inf
    for row, (sampling, step) in enumerate(zip(rows, steps)):
        if sampling.ends_not_yet(step):
            logits[row, eos_token_id] = -np.inf
    tokens = logits.argmax(-1)
    for row, (sampling, step) in enumerate(zip(rows, steps)):
        if sampling.parameters.samples:
            tokens[row] = _sample(logits[row], sampling.parameters, sampling.uniform(step))
    chosen = logits[np.arange(len(rows)), tokens]
    return tokens.tolist(), (chosen - normalizer).tolist()


def process(
    scores: Floats, rows: Sequence[RowSampling], steps: Sequence[int], eos_token_id: int
) -> Floats:
    """Scores [rows, vocabulary] after the rows' processors, in place."""
    for row, (sampling, step) in enumerate(zip(rows, steps)):
        if sampling.ends_not_yet(step):
            scores[row, eos_token_id] = -np.inf
    return scores


def log_softmax(logits: Floats) -> Floats:
    """Of logits [rows, vocabulary]."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def gumbel(row: RowSampling, step: int, shape: tuple[int, ...]) -> Floats:
    """Gumbel noise for this step: argmax of log-probabilities plus it is a draw of them."""
    bits = np.random.Generator(np.random.Philox(key=row.seed, counter=step))
    noise: Floats = -np.log(-np.log(bits.random(shape, np.float32).clip(1e-20, None)))
    return noise


def _sample(logits: Floats, p: GenerationParameters, uniform: float) -> int:
    """Draw one token: the first whose cumulative probability exceeds ``uniform``."""
    tokens, scores = _top_k(logits / np.float32(p.temperature), p.top_k)
    probabilities = np.exp(scores.astype(np.float64) - scores.max())
    if 0.0 < p.top_p < 1.0:
        kept = _top_p(probabilities, p.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    cumulative = probabilities.cumsum()
    drawn = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])


def _top_k(scores: Floats, k: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """(tokens, scores) of the k best in the vocabulary's order; equals of the last one stay."""
    if not 0 < k < len(scores):
        return np.arange(len(scores)), scores
    least = np.partition(scores, -k)[-k]
    tokens = np.flatnonzero(scores >= least)
    return tokens, scores[tokens]


def _top_p(weights: npt.NDArray[np.float64], p: float) -> npt.NDArray[np.intp]:
    """Places of the fewest largest weights whose share reaches p, in ascending order of place.

    A weight stays if those larger hold less than p; of equal ones the first places come first.
    """
    reach = p * weights.sum()
    candidates = weights
    if len(weights) > _LIKELY:
        likely = np.partition(weights, -_LIKELY)[-_LIKELY:]
        candidates = likely if likely.sum() >= reach else weights
    descending = np.sort(candidates)[::-1]
    before = descending.cumsum() - descending
    count = int(before.searchsorted(reach))
    least = descending[max(count, 1) - 1]
    above = np.flatnonzero(weights > least)
    equal = np.flatnonzero(weights == least)[: max(count, 1) - len(above)]
    return np.sort(np.concatenate([above, equal]))
