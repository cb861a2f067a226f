"""Drawing tokens: the filters of transformers, exact probabilities, seeds that decide alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from handler.parameters import MAX_SEED, GenerationParameters
from handler.sampling import RowSampling, choose_tokens

EOS = 1
Logits = npt.NDArray[np.float32]


class Fixed(RowSampling):
    """Draws with this number instead of one of the seed's."""

    def __init__(self, parameters: GenerationParameters, number: float) -> None:
        super().__init__(parameters)
        self._number = number

    def uniform(self, step: int) -> float:
        return self._number


def sampled(**values: Any) -> GenerationParameters:
    return GenerationParameters(do_sample=True, **values)


def random_logits(size: int, spread: float = 3.0, seed: int = 0) -> Logits:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def chosen(logits: Logits, rows: Sequence[RowSampling], step: int = 0) -> list[int]:
    """One token for each row, all from the same logits."""
    tokens, _ = choose_tokens(np.tile(logits, (len(rows), 1)), rows, [step] * len(rows), EOS)
    return tokens


def transformers_scores(logits: Logits, p: GenerationParameters) -> torch.Tensor:
    """What transformers leaves of the logits at the first step."""
    ids = torch.zeros((1, 1), dtype=torch.long)
    scores = torch.from_numpy(logits.copy())[None]
    if p.min_new_tokens:
        scores = MinNewTokensLengthLogitsProcessor(1, p.min_new_tokens, EOS)(ids, scores)
    scores = TemperatureLogitsWarper(p.temperature)(ids, scores)
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(ids, scores)
    scores = scores.double()
    if 0 < p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(ids, scores)
    return scores[0]


# Filters


parameters = st.builds(
    sampled,
    temperature=st.sampled_from([0.01, 0.5, 1.0, 1.7, 40.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 300, 5000]),
    top_p=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_new_tokens=st.sampled_from([0, 3]),
)


@given(
    p=parameters,
    size=st.one_of(st.integers(2, 40), st.integers(250, 2000)),
    spread=st.sampled_from([0.01, 1.0, 3.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_each_token_has_its_share_as_in_transformers(
    p: GenerationParameters, size: int, spread: float, seed: int
) -> None:
    """A number in the middle of each kept token's share of [0, 1) draws that token."""
    logits = random_logits(size, spread, seed)
    scores = transformers_scores(logits, p)
    if 0 < p.top_p < 1:  # where rounding decides, both are right
        unfiltered = transformers_scores(logits, replace(p, top_p=0.0))
        reached = unfiltered.softmax(-1).sort(descending=True).values.cumsum(-1)
        assume(((reached - p.top_p).abs() > 1e-6).all())
    shares = scores.softmax(-1).numpy()
    ends = shares.cumsum()
    tokens = np.flatnonzero(shares > 1e-9)
    rows = [Fixed(p, float(ends[token] - shares[token] / 2)) for token in tokens]
    assert chosen(logits, rows) == tokens.tolist()


@given(p=parameters, size=st.integers(2, 600), seed=st.integers(0, 100))
def test_the_least_and_the_greatest_number_draw_kept_tokens(
    p: GenerationParameters, size: int, seed: int
) -> None:
    logits = random_logits(size, seed=seed)
    kept = torch.isfinite(transformers_scores(logits, p))
    for token in chosen(logits, [Fixed(p, 0.0), Fixed(p, math.nextafter(1.0, 0.0))]):
        assert kept[token]


def test_equals_of_the_last_of_top_k_stay() -> None:
    logits = np.array([2, 1, 3, 1, 1, 0], np.float32)
    p = sampled(top_k=3)
    rows = [Fixed(p, u) for u in np.linspace(0, 0.999, 500)]
    assert set(chosen(logits, rows)) == {0, 1, 2, 3, 4}
    assert torch.isfinite(transformers_scores(logits, p)).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("size", [10, 1000])
def test_top_p_among_equals_keeps_as_many_as_reach_it(size: int) -> None:
    rows = [Fixed(sampled(top_p=0.295), u) for u in np.linspace(0, 0.9999, 2 * size)]
    kept = set(chosen(np.zeros(size, np.float32), rows))
    assert len(kept) == math.ceil(0.295 * size)


# Probabilities


def chi_squared_limit(freedom: int) -> float:
    """Exceeded once in ten thousand (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3)


def chi_squared(counted: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    return float(((counted - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1.6}, {"temperature": 0.8, "top_k": 6}, {"top_p": 0.8}],
    ids=str,
)
def test_draws_follow_the_probabilities(values: dict[str, Any]) -> None:
    """100 000 draws: a thousand seeds, a hundred steps of each."""
    seeds, steps = 1000, 100
    logits = random_logits(12, spread=1.5, seed=4)
    expected = transformers_scores(logits, sampled(**values)).softmax(-1).numpy()
    rows = [RowSampling(sampled(seed=seed, **values)) for seed in range(seeds)]
    counted = np.zeros(len(logits), np.int64)
    for step in range(steps):
        counted += np.bincount(chosen(logits, rows, step), minlength=len(logits))
    possible = expected > 0
    assert counted[~possible].sum() == 0
    assert counted.sum() == seeds * steps
    statistic = chi_squared(counted[possible], expected[possible] * seeds * steps)
    assert statistic < chi_squared_limit(possible.sum() - 1)


@pytest.fixture(scope="module")
def numbers() -> npt.NDArray[np.float64]:
    """[seeds, steps]"""
    rows = [RowSampling(sampled(seed=seed)) for seed in range(300)]
    return np.array([[row.uniform(step) for step in range(100)] for row in rows])


@pytest.mark.parametrize("neighbours", ["steps", "seeds"])
def test_numbers_do_not_follow_from_their_neighbours(
    numbers: npt.NDArray[np.float64], neighbours: str
) -> None:
    """All pairs of a number and the next one are equally frequent."""
    table = numbers if neighbours == "steps" else numbers.T
    bins = (table * 10).astype(int)
    pairs = 10 * bins[:, :-1] + bins[:, 1:]
    counted = np.bincount(pairs.ravel(), minlength=100)
    assert chi_squared(counted, np.full(100, pairs.size / 100)) < chi_squared_limit(99)


def test_numbers_do_not_repeat(numbers: npt.NDArray[np.float64]) -> None:
    assert len(np.unique(numbers)) == numbers.size


# Seeds


@given(seed=st.integers(0, MAX_SEED), step=st.integers(0, 100_000))
def test_a_number_belongs_to_its_seed_and_step(seed: int, step: int) -> None:
    row = RowSampling(sampled(seed=seed))
    number = row.uniform(step)
    assert 0.0 <= number < 1.0
    row.uniform(step + 1)
    assert row.uniform(step) == number
    assert RowSampling(sampled(seed=seed)).uniform(step) == number
    assert RowSampling(sampled(seed=(seed + 1) % MAX_SEED)).uniform(step) != number
    assert row.uniform(step + 1) != number


def test_without_a_seed_each_request_has_its_own() -> None:
    seeds = {RowSampling(sampled()).seed for _ in range(10)}
    assert len(seeds) == 10


@given(
    rows=st.lists(
        st.tuples(
            st.one_of(parameters, st.just(GenerationParameters())),
            st.integers(0, 2**64 - 1),
            st.integers(0, 500),
        ),
        min_size=1,
        max_size=16,
    ),
    seed=st.integers(0, 100),
)
def test_a_row_is_chosen_the_same_alone_and_among_others(
    rows: list[tuple[GenerationParameters, int, int]], seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (len(rows), 700)).astype(np.float32)
    logits[0] *= 200
    samplings = [RowSampling(replace(p, seed=s)) for p, s, _ in rows]
    steps = [step for _, _, step in rows]
    tokens, log_probs = choose_tokens(logits.copy(), samplings, steps, EOS)
    for row, sampling in enumerate(samplings):
        alone = choose_tokens(logits[row : row + 1].copy(), [sampling], [steps[row]], EOS)
        assert alone == ([tokens[row]], [log_probs[row]])


# Greedy, the end of the text, log-probabilities


@pytest.mark.parametrize(
    "p",
    [
        GenerationParameters(),
        GenerationParameters(seed=3),
        GenerationParameters(temperature=0.3, top_k=40),
        sampled(temperature=0.0),
        sampled(temperature=1e-6),
        sampled(top_k=1, temperature=9.0),
        sampled(top_p=1e-9),
    ],
    ids=str,
)
def test_greedy_takes_the_best(p: GenerationParameters) -> None:
    logits = np.stack([random_logits(500, seed=seed) for seed in range(50)])
    best = logits.argmax(-1).tolist()
    assert choose_tokens(logits, [RowSampling(p)] * 50, list(range(50)), EOS)[0] == best


def test_of_equals_greedy_takes_the_first() -> None:
    logits = np.array([0, 1, 5, 5, 2], np.float32)
    assert chosen(logits, [RowSampling(GenerationParameters())]) == [2]


@pytest.mark.parametrize("samples", [False, True])
def test_the_end_is_not_chosen_before_min_new_tokens(samples: bool) -> None:
    logits = random_logits(20)
    logits[EOS] = 30.0
    p = GenerationParameters(min_new_tokens=5, do_sample=samples, top_k=3, seed=1)
    for step in range(10):
        (token,) = chosen(logits, [RowSampling(p)], step)
        assert (token == EOS) == (step >= 5)


@pytest.mark.parametrize("samples", [False, True])
def test_the_end_is_never_chosen_where_it_is_ignored(samples: bool) -> None:
    logits = random_logits(20)
    logits[EOS] = 30.0
    p = GenerationParameters(ignore_eos_token=True, do_sample=samples, seed=1)
    for step in range(200):
        assert chosen(logits, [RowSampling(p)], step) != [EOS]


def test_one_row_may_end_while_another_must_not() -> None:
    logits = random_logits(20)
    logits[EOS] = 30.0
    rows = [RowSampling(GenerationParameters(min_new_tokens=n)) for n in (0, 3, 0)]
    tokens = chosen(logits, rows)
    assert (tokens[0], tokens[2]) == (EOS, EOS)
    assert tokens[1] != EOS


@given(p=parameters, greedy=st.booleans(), seed=st.integers(0, 50))
def test_log_probs_are_the_models_own(p: GenerationParameters, greedy: bool, seed: int) -> None:
    """Before temperature, filters and what must not be chosen."""
    logits = np.stack([random_logits(700, seed=seed), random_logits(700, 40.0, seed + 1)])
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    rows = [RowSampling(replace(p, do_sample=not greedy, seed=seed))] * 2
    tokens, log_probs = choose_tokens(logits.copy(), rows, [0, 9], EOS)
    for row in range(2):
        assert log_probs[row] == pytest.approx(expected[row, tokens[row]].item(), abs=2e-5)
        assert log_probs[row] <= 0.0
