"""The same request means the same on backend transformers and on our own engine.

Log-probabilities may differ by 1e-4. Draws are compared where a filter leaves one token, for each
backend has random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_checkpoints import write_checkpoint

from handler.engines import Model, init_inference
from handler.generation import GenerationRequest, GenerationResult, ScoreRequest
from handler.parameters import parse_parameters

PROMPTS = ("Sort these words: pony, apple, golden, key", "a b c")

ALONE: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 3},
    {"min_new_tokens": 10},
    {"ignore_eos_token": True},
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"no_repeat_ngram_size": 1},
    {"bad_words_list": ["four", "apple", "a"]},
    {"stop_sequences": ["a", "o"]},
    {"regex": "[0-9]{3}"},
    {"regex": "[a-z]+( [a-z]+){2}"},
    {"choices": ["yes", "yes and no", "no", "7"]},
    {"truncate": 4},
]
ONE_TEXT: list[dict[str, Any]] = [
    {"top_n_tokens": 5},
    {"top_k": 1, "do_sample": True, "temperature": 3.0, "top_n_tokens": 2},
]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "n": 2, "length_penalty": -1.0, "early_stopping": True},
    {"num_beams": 2, "best_of": 2, "length_penalty": 2.0, "early_stopping": "never"},
]
ALL_MIXED = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 4,
    "bad_words_list": ["four"],
    "stop_sequences": ["key"],
    "regex": "[a-z ,]+",
}
REFUSED: list[dict[str, Any]] = [
    {"choices": ["seven"], "min_new_tokens": 8},
    {"choices": ["seven"], "min_new_tokens": 8, "num_beams": 2},
    {"choices": ["seven", "no"], "num_beams": 4, "num_return_sequences": 3},
    {"choices": ["no"], "num_beams": 4, "length_penalty": 8.0, "num_return_sequences": 2},
    {"choices": ["no"], "bad_words_list": ["no"], "num_beams": 3},
]
SENT = [
    *ALONE,
    *ONE_TEXT,
    *BEAMS,
    *({"num_beams": 4, "num_return_sequences": 3, **one} for one in ALONE),
    ALL_MIXED,
    {**ALL_MIXED, "top_n_tokens": 3},
    {**ALL_MIXED, "num_beams": 4, "num_return_sequences": 2},
    *REFUSED,
]
DIFFERENT = ["t5-v1.0", "umt5", "byt5", "deep-decoder"]
TARGETS = ("four thousand", "x", "Count from 3 to 9. " * 5, "a b c")


class Pair(NamedTuple):
    ours: Model
    transformers: Model


@pytest.fixture(
    scope="module",
    params=[
        *("demo", "umt5"),
        *(pytest.param(v, marks=pytest.mark.long) for v in DIFFERENT if v != "umt5"),
    ],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo: Path
) -> Iterator[Pair]:
    yield from open_pair(request.param, tmp_path_factory, demo)


@pytest.fixture(scope="module")
def flan(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[Pair]:
    yield from open_pair("flan-t5", tmp_path_factory, demo)


def open_pair(variant: str, folders: pytest.TempPathFactory, demo: Path) -> Iterator[Pair]:
    folder = demo
    if variant != "demo":
        folder = write_checkpoint(folders.mktemp(variant), variant, demo)
    models = [init_inference(str(folder), backend=b) for b in ("onnxruntime", "transformers")]
    yield Pair(*models)
    for model in models:
        model.close()


def outcomes(model: Model, requests: list[GenerationRequest]) -> list[list[GenerationResult] | str]:
    """All submitted at once, so that they run beside each other."""
    futures = [model.submit([request])[0] for request in requests]
    found: list[list[GenerationResult] | str] = []
    for future in futures:
        error = future.exception(60)
        result = None if error else future.result()
        found.append([result, *result.alternatives] if result else str(error))
    return found


def assert_alike(
    request: GenerationRequest,
    one: list[GenerationResult] | str,
    other: list[GenerationResult] | str,
) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other, request
        return
    assert [r.token_ids for r in one] == [r.token_ids for r in other], request
    for ours, theirs in zip(one, other):
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason), request
        assert (ours.input_tokens, ours.truncated) == (theirs.input_tokens, theirs.truncated)
        assert_close(ours, theirs)


def assert_close(ours: GenerationResult, theirs: GenerationResult) -> None:
    assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
    assert len(ours.top_tokens) == len(theirs.top_tokens)
    for top, expected in zip(ours.top_tokens, theirs.top_tokens):
        assert [t.log_prob for t in top] == pytest.approx([t.log_prob for t in expected], abs=1e-4)


def test_every_parameter_alone_and_mixed(pair: Pair) -> None:
    requests = [
        GenerationRequest(prompt, parse_parameters({"max_new_tokens": 12, **sent}))
        for sent in SENT
        for prompt in PROMPTS
    ]
    answers = zip(requests, outcomes(pair.ours, requests), outcomes(pair.transformers, requests))
    for request, ours, theirs in answers:
        assert_alike(request, ours, theirs)


def any_request() -> st.SearchStrategy[dict[str, Any]]:
    """Some of the parameters, those of a beam search among them or not."""
    optional = {
        "min_new_tokens": st.integers(0, 10),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "no_repeat_ngram_size": st.integers(0, 4),
        "bad_words_list": st.lists(st.sampled_from(["a", "apple", "party", "e"]), max_size=2),
        "stop_sequences": st.lists(st.sampled_from(["a", "st", "e", " b"]), max_size=2),
        "ignore_eos_token": st.booleans(),
        "regex": st.sampled_from(["[a-z ]+", "[0-9]{2,9}", "(a|b|st)*c"]),
    }
    search = {
        "num_beams": st.integers(2, 5),
        "num_return_sequences": st.integers(1, 2),
        "length_penalty": st.floats(-3.0, 3.0),
        "early_stopping": st.sampled_from([True, False, "never"]),
    }
    each = st.fixed_dictionaries({"max_new_tokens": st.integers(10, 20)}, optional=optional)
    beams = st.fixed_dictionaries(search)
    return st.one_of(each, st.builds(lambda one, other: {**one, **other}, each, beams))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(any_request(), min_size=4, max_size=8))
def test_any_parameters_beside_each_other(flan: Pair, sent: list[dict[str, Any]]) -> None:
    requests = [GenerationRequest(PROMPTS[0], parse_parameters(one)) for one in sent]
    answers = zip(requests, outcomes(flan.ours, requests), outcomes(flan.transformers, requests))
    for request, ours, theirs in answers:
        assert_alike(request, ours, theirs)


def test_scores(pair: Pair) -> None:
    requests = [
        ScoreRequest(prompt, TARGETS, parse_parameters({"top_n_tokens": top}))
        for prompt in PROMPTS
        for top in (0, 3)
    ]
    for ours, theirs in zip(pair.ours.score(requests), pair.transformers.score(requests)):
        assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
        for one, other in zip(ours, theirs):
            assert one.text == other.text
            assert_close(one, other)
