"""Weights of matrix products in 8 bits, with one scale for each output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

INT8_MAX = 127
# The scale of a row of zeros.
TINY = 1e-30


@dataclass(frozen=True)
class QuantizedWeight:
    """weight [out, in] = values * scales[:, None]; values in int8, symmetric, scales [out]."""

    values: npt.NDArray[np.int8]
    scales: Array


Weight = Union[Array, QuantizedWeight]


def row_scales(weight: Array, largest: int = INT8_MAX) -> Array:
    """[..., in] -> [...]: the largest of each row becomes ``largest``."""
    most = np.maximum(weight.max(-1), -weight.min(-1))  # without a copy as np.abs would make it
    scales: Array = np.maximum(most / largest, TINY).astype(np.float32)
    return scales


def quantize(weight: Array, scales: Array) -> npt.NDArray[np.int8]:
    """[..., in] with its scales [...], of the same rows."""
    steps = weight / scales[..., None]
    return np.round(steps, out=steps).astype(np.int8)


def over_rows(weight: Weight, change: Callable[[Any], Any]) -> Weight:
    """The weight with its outputs changed: ``change`` takes arrays of which they are axis 0."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(change(weight.values), change(weight.scales))
    changed: Array = change(weight)
    return changed


def over_columns(weight: Weight, change: Callable[[Any], Any]) -> Weight:
    """The weight with its inputs changed: ``change`` takes an array of which they are axis 0."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(change(weight.values.T).T, weight.scales)
    changed: Array = change(weight.T).T
    return changed


def joined_rows(weights: Sequence[Weight]) -> Weight:
    """One weight with the outputs of all, which are all quantized or all not."""
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    if not quantized:
        return np.concatenate([w for w in weights if not isinstance(w, QuantizedWeight)])
    return QuantizedWeight(
        np.concatenate([w.values for w in quantized]), np.concatenate([w.scales for w in quantized])
    )
