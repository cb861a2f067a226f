"""Drawing tokens: the filters of transformers, exact probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from draws import FILTERS, assert_draws_follow
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers_scores import EOS, rounding_decides, transformers_scores

from handler.parameters import GenerationParameters
from handler.sampling import RowSampling, choose_tokens, warp

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


def drawn(logits: Logits, p: GenerationParameters, numbers: Any) -> list[int]:
    """The token for each of these numbers from [0, 1)."""
    rows = [Fixed(p, float(number)) for number in numbers]
    return choose_tokens(np.tile(logits, (len(rows), 1)), rows, [0] * len(rows), EOS)[0]


parameters = st.builds(
    sampled,
    temperature=st.sampled_from([0.01, 0.5, 1.0, 1.7, 40.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 30, 50, 300, 5000]),
    top_p=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0]),
    typical_p=st.sampled_from([0.0, 0.001, 0.2, 0.9, 0.999, 1.0]),
    min_new_tokens=st.sampled_from([0, 3]),
)
sizes = st.one_of(st.integers(2, 40), st.integers(250, 2000), st.integers(4096, 9000))
spreads = st.sampled_from([0.01, 1.0, 3.0, 20.0])


@settings(deadline=None)
@given(p=parameters, size=sizes, spread=spreads, seed=st.integers(0, 1000))
def test_each_token_has_its_share_as_in_transformers(
    p: GenerationParameters, size: int, spread: float, seed: int
) -> None:
    """A token's share of [0, 1) begins and ends where the exact probabilities say."""
    logits = random_logits(size, spread, seed)
    assume(not rounding_decides(logits, p))
    shares = transformers_scores(logits, p).double().softmax(-1).numpy()
    ends = shares.cumsum()
    tokens = np.flatnonzero(shares > 1e-6)
    tokens = tokens[np.unique(np.linspace(0, len(tokens) - 1, 60).astype(int))]
    within = np.minimum(shares[tokens] / 4, 1e-6 + shares[tokens] / 50)
    assert drawn(logits, p, ends[tokens] - shares[tokens] + within) == tokens.tolist()
    assert drawn(logits, p, ends[tokens] - within) == tokens.tolist()


@settings(deadline=None)
@given(p=parameters, size=sizes, seed=st.integers(0, 100))
def test_the_least_and_the_greatest_number_draw_kept_tokens(
    p: GenerationParameters, size: int, seed: int
) -> None:
    logits = random_logits(size, seed=seed)
    assume(not rounding_decides(logits, p))
    kept = torch.isfinite(transformers_scores(logits, p))
    for token in drawn(logits, p, [0.0, math.nextafter(1.0, 0.0)]):
        assert kept[token]


@pytest.mark.parametrize("size", [6, 5000])
def test_equals_of_the_last_of_top_k_stay(size: int) -> None:
    logits = np.full(size, -9, np.float32)
    logits[[0, 1, 2, 3, 4]] = [2, 1, 3, 1, 1]
    p = sampled(top_k=3)
    assert set(drawn(logits, p, np.linspace(0, 0.999, 500))) == {0, 1, 2, 3, 4}
    assert torch.isfinite(transformers_scores(logits, p)).sum() == 5


@pytest.mark.parametrize("size", [10, 1000, 5000])
def test_all_stay_in_top_k_where_all_are_equal(size: int) -> None:
    numbers = (np.arange(size) + 0.5) / size
    assert drawn(np.ones(size, np.float32), sampled(top_k=3), numbers) == list(range(size))


@pytest.mark.parametrize("top_k", [0, 1])  # 1: all are equal, so that all stay
@pytest.mark.parametrize("size", [10, 1000, 5000])
def test_of_equals_top_p_keeps_as_many_as_reach_it(size: int, top_k: int) -> None:
    """The last ones; which ones transformers keeps, its sort decides."""
    p = sampled(top_p=0.2955, top_k=top_k)
    logits = np.zeros(size, np.float32)
    count = math.ceil(0.2955 * size)
    kept = drawn(logits, p, (np.arange(count) + 0.5) / count)
    assert kept == list(range(size - count, size))
    assert torch.isfinite(transformers_scores(logits, p)).sum() == count


def test_typical_p_may_leave_the_best_token_out() -> None:
    logits = np.log(np.array([0.4] + [0.06] * 10, np.float32))
    p = sampled(typical_p=0.5)
    assert 0 not in drawn(logits, p, np.linspace(0, 0.999, 100))
    assert transformers_scores(logits, p)[0] == -torch.inf


@pytest.mark.parametrize("p", [{"top_p": 0.9}, {"typical_p": 0.9}], ids=str)
@pytest.mark.parametrize("far", [-1e4, -1e30, -np.inf])
def test_a_far_away_token_does_not_coarsen_the_filter(p: dict[str, float], far: float) -> None:
    logits = random_logits(9000, 1.0)
    logits[5] = far
    kept = torch.isfinite(transformers_scores(logits, sampled(**p))).nonzero().flatten().tolist()
    assert set(drawn(logits, sampled(**p), np.linspace(0, 0.9999, 2000))) <= set(kept)


@pytest.mark.parametrize("p", [{"top_p": 0.9}, {"top_p": 0.2}, {"typical_p": 0.6}], ids=str)
@pytest.mark.parametrize("equals", [False, True], ids=["", "many equals"])
@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0], ids=["flat", "usual", "peaked"])
def test_a_whole_vocabulary_is_filtered_as_in_transformers(
    p: dict[str, float], spread: float, equals: bool
) -> None:
    """Of equals at the border transformers' sort decides which stay: their number is the same."""
    logits = random_logits(32128, spread, 5)
    if equals:
        logits = logits.round(1)
    allowed = torch.isfinite(transformers_scores(logits, sampled(**p))).numpy()
    (border,) = logits[allowed].min(keepdims=True)
    shares = np.exp(logits.astype(np.float64)) * allowed
    numbers = np.linspace(0.0, 0.9999, 64)
    expected = np.flatnonzero(allowed)[
        (shares[allowed].cumsum() / shares.sum()).searchsorted(numbers)
    ]
    tokens = drawn(logits, sampled(**p), numbers)
    assert allowed[[token for token in tokens if logits[token] > border]].all()
    assert logits[tokens].min() >= border
    if not equals:
        assert np.mean(tokens == expected) > 0.98, "all but where rounding decides"


@pytest.mark.parametrize(("size", "temperature"), [(500, 1e5), (5000, 1e4)])
def test_typical_p_tells_tokens_apart_that_are_nearly_equal(size: int, temperature: float) -> None:
    logits = random_logits(size, 1.0)
    p = sampled(typical_p=0.3003, temperature=temperature)
    allowed = torch.isfinite(transformers_scores(logits.astype(np.float64), p)).numpy()
    kept = np.flatnonzero(allowed)
    shares = np.exp(logits[kept].astype(np.float64) / temperature)
    ends = shares.cumsum() / shares.sum()
    places = np.linspace(0, len(kept) - 1, 20).astype(int)
    numbers = ends[places] - shares[places] / shares.sum() / 2
    assert drawn(logits, p, numbers) == kept[places].tolist()


@settings(deadline=None)
@given(p=parameters, size=st.integers(4, 300), spread=spreads, seed=st.integers(0, 1000))
def test_beams_keep_two_tokens_at_least_as_in_transformers(
    p: GenerationParameters, size: int, spread: float, seed: int
) -> None:
    logits = random_logits(size, spread, seed)
    assume(not rounding_decides(logits, p, num_beams=3))
    scores = transformers_scores(logits, replace(p, min_new_tokens=0), num_beams=3)
    (warped,) = warp(logits[None], [RowSampling(p)])
    np.testing.assert_allclose(warped, scores.numpy(), rtol=1e-5)


# Probabilities


def on_host(logits: Logits, rows: Sequence[RowSampling], steps: Sequence[int]) -> list[int]:
    return choose_tokens(logits, rows, steps, EOS)[0]


@pytest.mark.parametrize(
    "filters", [*FILTERS[:-1], pytest.param(FILTERS[-1], marks=pytest.mark.long)], ids=str
)
def test_draws_follow_the_probabilities(filters: dict[str, Any]) -> None:
    assert_draws_follow(on_host, random_logits(30, spread=1.5, seed=4), filters)


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"typical_p": 0.8}, {"top_k": 40}], ids=str)
def test_draws_from_many_tokens_do_too(filters: dict[str, Any], spread: float) -> None:
    """Where few of them hold top_p's share the others are not looked at; of flat ones all are."""
    assert_draws_follow(on_host, random_logits(1100, spread, seed=4), filters)
