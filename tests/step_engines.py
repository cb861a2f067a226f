"""Engines that run single steps: how each is opened, and when two of its answers are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from handler.config import configuration_of
from handler.engines.protocol import StepEngine
from handler.generation import GenerationResult

Array = npt.NDArray[np.float32]

MODULES = {
    "onnxruntime": "handler.engines.onnx_t5",
    "torch": "handler.engines.torch_t5",
}
# Whose rows have the same bits whatever runs beside them; torch's products do not promise that.
SAME_BITS = {"onnxruntime": True, "torch": False}
TOLERANCE = 1e-4


def open_engine(backend: str, checkpoint: Path, **options: Any) -> StepEngine:
    limits = {"max_rows": 16, "max_input_tokens": 800, "max_output_tokens": 200, "threads": 1}
    c = configuration_of(str(checkpoint), backend=backend, **{**limits, **options})
    engine: StepEngine = import_module(MODULES[backend]).load(checkpoint, c)
    return engine


def run_ahead(engine: Any) -> None:
    """As on a GPU: torch's engine, or the one of its ranks, chooses tokens where the logits are."""
    own = getattr(engine, "_engine", engine)
    own.run_ahead()
    engine.sampler, engine.runs_ahead = own.sampler, own.runs_ahead


def assert_equal(backend: str, found: Array, expected: Array) -> None:
    """Bit for bit, or within 1e-4 of the largest."""
    if SAME_BITS[backend]:
        assert np.array_equal(found, expected)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def assert_same(
    backend: str, found: Sequence[GenerationResult], expected: Sequence[GenerationResult]
) -> None:
    """Bit for bit, or but for log-probabilities that are within 1e-4."""
    if SAME_BITS[backend]:
        assert found == expected
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert _without_numbers(one) == _without_numbers(other)
        assert one.log_probs == pytest.approx(other.log_probs, rel=TOLERANCE, abs=TOLERANCE)
        assert_same(backend, one.alternatives, other.alternatives)


def _without_numbers(result: GenerationResult) -> GenerationResult:
    return replace(result, log_probs=(), top_tokens=(), alternatives=())


# Single steps


def encoded(engine: StepEngine, prompts: Sequence[Sequence[int]]) -> Sequence[Any]:
    *_, handles = engine.encode(prompts)
    assert handles is not None
    return handles


def start(engine: StepEngine, *handles: Any) -> None:
    for row, handle in enumerate(handles):
        engine.attach(handle, row)


def random_ids(*shape: int, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 300, shape)


def stepped(engine: StepEngine, tokens: npt.NDArray[np.int64], first: int = 0) -> Array:
    """Logits [rows, tokens, vocabulary], one step at a time."""
    rows, count = tokens.shape
    return np.concatenate(
        [
            engine.decode(rows, tokens[:, [k]], np.full(rows, first + k)).copy()
            for k in range(count)
        ],
        axis=1,
    )
