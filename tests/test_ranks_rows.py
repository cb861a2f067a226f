"""Rows that come and go on one model on several ranks. All tests here share it: a process has one
such model at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from oracle import Oracle
from step_engines import encoded, open_engine, run_ahead
from test_scheduler import Bench, play, scripts
from test_tensor_parallel import ranks_of_this_process

from handler.engines import init_inference
from handler.engines.torch_ranks.engine import TensorParallelEngine
from handler.errors import LoadError


@pytest.fixture(scope="module")
def engine(oracle_of: Callable[[str], Oracle]) -> Iterator[TensorParallelEngine]:
    limits = {"max_rows": 4, "max_input_tokens": 200, "max_output_tokens": 200}
    folder = oracle_of("flan-t5").folder
    opened = open_engine("torch", folder, tensor_parallel_degree=2, **limits)
    assert isinstance(opened, TensorParallelEngine)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def bench(engine: TensorParallelEngine) -> Bench:
    return Bench("torch", engine)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts)
def test_no_schedule_changes_an_answer(bench: Bench, script: list[tuple[str, Any]]) -> None:
    play(bench, script)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts)
def test_nor_does_one_that_runs_ahead(bench: Bench, script: list[tuple[str, Any]]) -> None:
    """Tokens then come to the other ranks by their process group alone."""
    engine = bench.engine.inner
    on_host = engine.sampler
    run_ahead(engine)
    try:
        play(bench, script)
    finally:
        engine.sampler = engine._engine.sampler = on_host
        engine.runs_ahead = False


def test_every_rank_forgets_what_nobody_holds(engine: TensorParallelEngine) -> None:
    """Else each would fill its memory with prompts."""
    (rank,) = ranks_of_this_process()
    prompts = [list(range(3, 203))] * 20
    size = encoded(engine, prompts)[0].nbytes * len(prompts)
    before = None
    for _ in range(12):
        encoded(engine, prompts)
        gc.collect()
        before = before or rank.memory_info().rss
    assert before is not None
    assert rank.memory_info().rss - before < 5 * size


def test_a_second_model_on_ranks_is_refused_before_it_starts_any(
    engine: TensorParallelEngine, demo: Path
) -> None:
    before = ranks_of_this_process()
    with pytest.raises(LoadError, match="close the other first"):
        init_inference(str(demo), 2)
    assert ranks_of_this_process() == before
    beside = init_inference(str(demo), backend="torch")
    try:
        assert beside.pipeline_generate(["Write 7 in words."]) == ["seven"]
    finally:
        beside.close()
