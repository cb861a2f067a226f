"""One model on several ranks, which are real processes: the answers of one process, and what is
left of the ranks when the model is closed. See test_lost_ranks.py for how they are missed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from oracle import Oracle
from random_checkpoints import VARIANTS
from step_engines import encoded, open_engine
from test_scheduler import Bench, play, scripts

from handler.engines import Model, init_inference
from handler.engines.torch_t5.parallel_engine import TensorParallelEngine
from handler.errors import LoadError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import parse_parameters

OracleOf = Callable[[str], Oracle]
PROMPTS = ["x", "Write 7 in words.", "Sort these words: cat, apple", "a b c " * 30]
LENGTH = 24


def ranks_of_this_process() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "torch_t5.rank" in " ".join(p.cmdline())]


@contextmanager
def loaded(folder: Path, degree: int, **options: Any) -> Iterator[Model]:
    model = init_inference(str(folder), degree, backend="torch", **options)
    try:
        assert len(ranks_of_this_process()) == degree - 1
        yield model
    finally:
        model.close()
    assert not ranks_of_this_process()


def answers(model: Model, prompts: Sequence[str], **parameters: Any) -> list[GenerationResult]:
    parsed = parse_parameters({"max_new_tokens": LENGTH, **parameters})
    return model.generate([GenerationRequest(prompt, parsed) for prompt in prompts])


# Equal to transformers

# one start of several processes is in `make test` for each degree, all others in `make test-long`
_QUICK = {("t5-v1.0", 2), ("umt5", 4), ("odd", 3)}
CASES = [
    pytest.param(variant, degree, marks=() if (variant, degree) in _QUICK else pytest.mark.long)
    for variant, degree in itertools.product(VARIANTS, (1, 2, 3, 4))
    if VARIANTS[variant].get("num_heads", 4) % degree == 0
]


@pytest.mark.parametrize(("variant", "degree"), CASES)
def test_greedy_and_beams_are_the_oracles(oracle_of: OracleOf, variant: str, degree: int) -> None:
    oracle = oracle_of(variant)
    with loaded(oracle.folder, degree, max_rows=6) as model:
        for prompt, result in zip(PROMPTS, answers(model, PROMPTS)):
            assert result.token_ids == oracle.generate(prompt, max_new_tokens=LENGTH)
            expected = oracle.log_probs(prompt, result.token_ids)
            assert result.log_probs == pytest.approx(expected, abs=1e-4)
        (best,) = answers(model, PROMPTS[1:2], num_beams=3)
        beams = oracle.generate(PROMPTS[1], max_new_tokens=LENGTH, num_beams=3)
        assert best.token_ids == beams[: len(best.token_ids)]


# Rows that come and go


@pytest.fixture(scope="module")
def engine(oracle_of: OracleOf) -> Iterator[TensorParallelEngine]:
    limits = {"max_rows": 4, "max_input_tokens": 200, "max_output_tokens": 200}
    folder = oracle_of("flan-t5").folder
    opened = open_engine("torch", folder, tensor_parallel_degree=2, **limits)
    assert isinstance(opened, TensorParallelEngine)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def bench(engine: TensorParallelEngine) -> Bench:
    return Bench("torch", engine)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts)
def test_no_schedule_changes_an_answer(bench: Bench, script: list[tuple[str, Any]]) -> None:
    play(bench, script)


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


# Starting and ending


def test_a_degree_that_does_not_divide(demo: Path) -> None:
    before = ranks_of_this_process()
    with pytest.raises(LoadError, match=r"option.tensor_parallel_degree=3 does not divide .* 1, 2"):
        init_inference(str(demo), 3)
    assert ranks_of_this_process() == before


def test_layers_are_not_shared_out(demo: Path) -> None:
    with pytest.raises(LoadError, match=r"pipeline_parallel_degree=2 .* set option.tensor_parall"):
        init_inference(str(demo), 2, 2)


def test_a_second_model_on_ranks_is_refused_before_it_starts_any(
    engine: TensorParallelEngine, demo: Path
) -> None:
    before = ranks_of_this_process()
    with pytest.raises(LoadError, match="close the other first"):
        init_inference(str(demo), 2)
    assert ranks_of_this_process() == before
    with init_inference_on_one(demo) as beside:
        assert beside.pipeline_generate(["Write 7 in words."]) == ["seven"]


@contextmanager
def init_inference_on_one(folder: Path) -> Iterator[Model]:
    model = init_inference(str(folder), backend="torch")
    yield model
    model.close()
