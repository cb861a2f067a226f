"""Beam search over one prompt's rows, as transformers 5 does it, beam for beam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from handler.continuation import Continuation
from handler.parameters import GenerationParameters

Floats = npt.NDArray[np.float32]


class NextTokens(NamedTuple):
    """What each beam reads next, and which beam it goes on from."""

    tokens: list[int]
    parents: list[int]


class BeamSearch:
    """num_beams texts that compete; ``advance`` takes a decoding step.

    A text's score is the sum of its tokens' log-probabilities, after the request's processors;
    that of a finished one is divided by its length to the power of length_penalty. Each step keeps
    the best 2 * num_beams continuations of all beams: those that ended and are among the best
    num_beams of them are finished texts, the best num_beams of the others go on.
    """

    def __init__(self, parameters: GenerationParameters, text: Continuation) -> None:
        self._beams = parameters.num_beams
        self._wanted = parameters.num_return_sequences
        self._penalty = parameters.length_penalty
        self._early_stopping = parameters.early_stopping
        self._longest = parameters.max_new_tokens
        self._running = [text.fork() for _ in range(self._beams)]
        # All begin alike: the first one alone may be continued, else all would stay alike.
        self._scores = np.full(self._beams, -np.inf, np.float32)
        self._scores[0] = 0.0
        self._finished: list[tuple[np.float32, Continuation]] = []
        self.length = 0

    @property
    def best(self) -> list[Continuation]:
        """The finished texts that are wanted, the best first."""
        return [text for _, text in self._finished[: self._wanted]]

    def advance(
        self, log_probs: Floats, scores: Floats, noise: Floats | None = None
    ) -> NextTokens | None:
        """Choose among all continuations; None when the search is over.

        log_probs: the model's own, [beams, vocabulary]; scores: the same after the processors;
        noise: Gumbel noise of that shape, by which continuations are drawn without replacement in
        proportion to their probability instead of the best being taken.
        """
        self.length += 1
        totals = (scores + self._scores[:, None]).ravel()
        places = largest(totals if noise is None else totals + noise.ravel(), 2 * self._beams)
        parents, tokens = np.divmod(places, scores.shape[1])
        texts = []
        for parent, token in zip(parents.tolist(), tokens.tolist()):
            text = self._running[parent].fork()
            text.append(token, float(log_probs[parent, token]))
            texts.append(text)
        kept = totals[places]
        possible = kept > -np.inf
        ended = np.array([text.finish_reason is not None for text in texts])
        self._finish(kept, ended & possible, texts)
        going_on = np.flatnonzero(~ended & possible)
        going_on = going_on[np.argsort(-kept[going_on], kind="stable")][: self._beams]
        if not going_on.size or self._is_over(kept[going_on[0]]):
            return None
        return self._go_on(going_on, kept, texts, tokens, parents)

    def _go_on(
        self,
        chosen: npt.NDArray[np.intp],
        scores: Floats,
        texts: Sequence[Continuation],
        tokens: npt.NDArray[np.intp],
        parents: npt.NDArray[np.intp],
    ) -> NextTokens:
        """Where fewer than num_beams continuations are possible, the last beams are dead."""
        dead = self._beams - len(chosen)
        chosen = np.concatenate([chosen, np.repeat(chosen[-1:], dead)])
        self._running = [texts[i] for i in chosen]
        self._scores = scores[chosen]
        if dead:
            self._scores[-dead:] = -np.inf
        return NextTokens(tokens[chosen].tolist(), parents[chosen].tolist())

    def _finish(
        self, totals: Floats, ended: npt.NDArray[np.bool_], texts: list[Continuation]
    ) -> None:
        for i in np.flatnonzero(ended[: self._beams]):
            self._finished.append((self._normalized(totals[i], self.length), texts[i]))
        self._finished.sort(
            key=lambda finished: -finished[0]
        )  # stable: the earlier one stays first
        del self._finished[self._beams :]

    def _is_over(self, best_running: np.float32) -> bool:
        """Whether no running text is expected to become better than the worst finished one."""
        if len(self._finished) < self._beams:
            return False
        if self._early_stopping is True:
            return True
        longest = self._early_stopping == "never" and self._penalty > 0.0
        hoped_for = self._normalized(best_running, self._longest if longest else self.length)
        return bool(hoped_for <= self._finished[-1][0])

    def _normalized(self, score: np.float32, length: int) -> np.float32:
        normalized: np.float32 = score / np.float32(length**self._penalty)
        return normalized


def largest(values: Floats, count: int) -> npt.NDArray[np.intp]:
    """Places of the largest values, in descending order of value; of equal ones the first."""
    count = min(count, len(values))
    least = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: count - len(above)]
    places = np.sort(np.concatenate([above, equal]))
    order: npt.NDArray[np.intp] = places[np.argsort(-values[places], kind="stable")]
    return order
