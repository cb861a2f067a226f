"""Weights in 8 bits: what is lost, and that changing their shape loses nothing more."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from handler.checkpoints.quantized import (
    QuantizedWeight,
    joined_rows,
    over_columns,
    over_rows,
    quantize,
    row_scales,
)

weights = arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


def quantized(weight: np.ndarray) -> QuantizedWeight:
    scales = row_scales(weight)
    return QuantizedWeight(quantize(weight, scales), scales)


def exact(weight: QuantizedWeight) -> np.ndarray:
    return weight.values * weight.scales[:, None].astype(np.float64)


@given(weights)
def test_each_weight_is_within_half_a_step(weight: np.ndarray) -> None:
    q = quantized(weight)
    assert q.values.dtype == np.int8
    assert q.values.min() >= -127
    assert (np.abs(exact(q) - weight) <= 0.5001 * q.scales[:, None]).all()


@given(weights)
def test_negation_is_exact(weight: np.ndarray) -> None:
    assert np.array_equal(exact(quantized(-weight)), -exact(quantized(weight)))


@given(weights)
def test_shapes_change_and_numbers_do_not(weight: np.ndarray) -> None:
    q = quantized(weight)
    twice = joined_rows([q, q])
    assert isinstance(twice, QuantizedWeight)
    assert np.array_equal(exact(twice), np.concatenate([exact(q)] * 2))
    upside_down = over_rows(q, lambda rows: rows[::-1])
    assert isinstance(upside_down, QuantizedWeight)
    assert np.array_equal(exact(upside_down), exact(q)[::-1])
    turned = over_columns(q, lambda columns: columns[::-1])
    assert isinstance(turned, QuantizedWeight)
    assert np.array_equal(exact(turned), exact(q)[:, ::-1])
