"""Whether draws follow exact probabilities: Pearson's chi-squared over 100 000 of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers_scores import transformers_scores

from handler.parameters import GenerationParameters
from handler.sampling import RowSampling

DRAWS = 100_000
_ROWS = 1000
_LEAST_EXPECTED = 5  # of fewer the statistic is not chi-squared: they are counted together

Logits = npt.NDArray[np.float32]
Choose = Callable[[Logits, Sequence[RowSampling], Sequence[int]], Sequence[int]]

FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.6},
    {"top_k": 6},
    {"top_p": 0.8},
    {"typical_p": 0.7},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "typical_p": 0.8},
    {"temperature": 0.8, "top_p": 0.9, "typical_p": 0.8},
]


def assert_draws_follow(choose: Choose, logits: Logits, filters: dict[str, Any]) -> None:
    """A thousand seeds, a hundred steps of each."""
    p = GenerationParameters(do_sample=True, **filters)
    rows = [RowSampling(replace(p, seed=seed)) for seed in range(_ROWS)]
    counted = np.zeros(len(logits), np.int64)
    for step in range(DRAWS // _ROWS):
        tokens = choose(np.tile(logits, (_ROWS, 1)), rows, [step] * _ROWS)
        counted += np.bincount(tokens, minlength=len(logits))
    assert_counts_follow(counted, transformers_scores(logits, p).double().softmax(-1).numpy())


def assert_counts_follow(
    counted: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]
) -> None:
    """counted, probabilities: [outcomes]. What is not possible never came."""
    assert counted[probabilities == 0.0].sum() == 0
    expected = probabilities * counted.sum()
    rare = (expected < _LEAST_EXPECTED) & (expected > 0.0)
    usual = expected >= _LEAST_EXPECTED
    expected, counted = expected[usual], counted[usual]
    statistic = float(((counted - expected) ** 2 / expected).sum())
    assert statistic < _chi_squared_limit(len(expected) - 1 + rare.any())


def _chi_squared_limit(freedom: int) -> float:
    """Exceeded once in ten thousand (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3)
