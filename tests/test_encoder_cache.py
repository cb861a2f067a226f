"""Encoded prompts that come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_engines import assert_same

from handler.encoder_cache import EncoderCache
from handler.engines import Model, init_inference
from handler.generation import GenerationRequest
from handler.parameters import GenerationParameters


class Handle:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@settings(deadline=None)
@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 15)), max_size=60))
def test_the_least_recently_used_is_forgotten(budget: int, asked: list[tuple[int, int]]) -> None:
    cache, model = EncoderCache(budget), OrderedDict[int, int]()
    hits = 0
    sizes: dict[int, int] = {}
    for prompt, size in asked:
        size = sizes.setdefault(prompt, size)
        handle = cache.get([prompt])
        assert (handle is not None) == (prompt in model)
        if handle is not None:
            hits += 1
            model.move_to_end(prompt)
            continue
        cache.put([prompt], Handle(size))
        if size <= budget:
            model[prompt] = size
        while sum(model.values()) > budget:
            model.popitem(last=False)
    assert (cache.hits, cache.misses) == (hits, len(asked) - hits)


def request(text: str) -> GenerationRequest:
    return GenerationRequest(text, GenerationParameters(max_new_tokens=20))


PROMPTS = ["Write 7 in words.", "a b c", "Count from 3 to 9.", "a b c", "Write 7 in words."] * 4


@pytest.fixture(
    scope="module",
    params=[("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("torch", "fp32")],
    ids="-".join,
)
def models(request: pytest.FixtureRequest, demo: Path) -> Iterator[list[Model]]:
    backend, dtype = request.param
    options: dict[str, Any] = {"backend": backend, "dtype": dtype, "max_rows": 3, "threads": 1}
    both = [init_inference(str(demo), encoder_cache=size, **options) for size in (256, 0)]
    yield both
    for model in both:
        model.close()


def test_the_same_answers_with_and_without(models: list[Model]) -> None:
    with_cache, without = models
    results = with_cache.generate([request(text) for text in PROMPTS])
    expected = without.generate([request(text) for text in PROMPTS])
    assert_same(without.backend, results, expected)
    assert [result.input_cached for result in results[3:]] == [True] * (len(PROMPTS) - 3)
    assert not any(r.input_cached for r in without.generate([request("a b c")]))
    hits, misses = with_cache.encoder_cache_use
    assert misses == 3
    assert hits == len(PROMPTS) - 3
