"""Beam search in flight, with transformers as the oracle."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draws import DRAWS, assert_counts_follow
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from step_engines import assert_same
from transformers_scores import generate_arguments

from handler.bad_words import bad_word_ids
from handler.beams import BeamSearch, largest
from handler.continuation import Continuation
from handler.engines import Model, init_inference
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import GenerationParameters
from handler.sampling import RowSampling, gumbel
from handler.tokenizer import ByteTokenizer

EOS = 1
PROMPTS = ["Write 4312 in words.", "a b c", "Sort these words: pony, apple, golden, key"]
LENGTH = 20
EVERY_SETTING = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams, penalty, early in itertools.product(
        (2, 4, 8), (-1.0, 0.0, 1.0, 2.0), (True, False, "never")
    )
]
# in each of them several times every number of beams, every penalty, every way to stop
SETTINGS = [EVERY_SETTING[place::5] for place in range(5)]


def request(prompt: str, **parameters: Any) -> GenerationRequest:
    return GenerationRequest(prompt, GenerationParameters(max_new_tokens=LENGTH, **parameters))


def all_texts(result: GenerationResult) -> list[tuple[int, ...]]:
    return [one.token_ids for one in (result, *result.alternatives)]


def best(oracle: Oracle, prompt: str, count: int, **arguments: Any) -> list[tuple[int, ...]]:
    """The ids of the oracle's ``count`` texts, each to its ``</s>``."""
    rows = oracle.model.generate(
        **oracle.tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=LENGTH,
        do_sample=False,
        num_return_sequences=count,
        suppress_tokens=oracle.padding or None,
        use_cache=False,
        **arguments,
    )
    ids = [row[1:].tolist() for row in rows]
    return [tuple(one[: one.index(EOS) + 1] if EOS in one else one) for one in ids]


@pytest.mark.parametrize(
    "several",
    [SETTINGS[0], *(pytest.param(some, marks=pytest.mark.long) for some in SETTINGS[1:])],
    ids=list("01234"),
)
def test_every_setting_alone_and_mixed_in_one_batch(
    pair: tuple[Model, Oracle], several: list[dict[str, Any]]
) -> None:
    """All of them run beside each other, and beside greedy ones; none is alone in its batch."""
    model, oracle = pair
    wanted = [(PROMPTS[i % len(PROMPTS)], each) for i, each in enumerate(several)]
    requests = [
        request(prompt, num_return_sequences=each["num_beams"] // 2, **each)
        for prompt, each in wanted
    ]
    greedy = [request(prompt) for prompt in PROMPTS]
    results = model.generate([*requests, *greedy])
    for (prompt, each), result in zip(wanted, results):
        assert all_texts(result) == best(oracle, prompt, int(each["num_beams"]) // 2, **each), each
    for prompt, result in zip(PROMPTS, results[len(requests) :]):
        assert all_texts(result) == best(oracle, prompt, 1)
    (alone,) = model.generate(requests[-1:])
    assert_same(model.backend, [alone], [results[len(requests) - 1]])


def test_log_probabilities_are_the_models_own(pair: tuple[Model, Oracle]) -> None:
    model, oracle = pair
    (result,) = model.generate([request(PROMPTS[0], num_beams=4, num_return_sequences=4)])
    for one in (result, *result.alternatives):
        expected = oracle.log_probs(PROMPTS[0], one.token_ids)
        assert one.log_probs == pytest.approx(expected, abs=1e-4)


def test_the_end_is_not_chosen_before_min_new_tokens(pair: tuple[Model, Oracle]) -> None:
    model, oracle = pair
    (result,) = model.generate([request(PROMPTS[1], num_beams=4, min_new_tokens=7)])
    assert all_texts(result) == best(oracle, PROMPTS[1], 1, num_beams=4, min_new_tokens=7)
    assert len(result.token_ids) >= 7


def test_penalties_and_bad_words(pair: tuple[Model, Oracle]) -> None:
    """Each alone and all together, beside each other; a beam's history is its parent's."""
    model, oracle = pair
    (plain,) = model.generate([request(PROMPTS[0], num_beams=4)])
    word = model.tokenizer.decode(plain.token_ids[1:2])
    all_of_them: dict[str, Any] = {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "no_repeat_ngram_size": 2,
        "bad_words_list": (word, plain.token_ids[:2]) if word else (plain.token_ids[:2],),
    }
    wanted = [{name: value} for name, value in all_of_them.items()] + [all_of_them]
    requests = [
        request(PROMPTS[0], num_beams=4, num_return_sequences=4, **values) for values in wanted
    ]
    for one, result in zip(requests, model.generate(requests)):
        words = bad_word_ids(one.parameters.bad_words_list, model.tokenizer)
        arguments = generate_arguments(one.parameters, words)
        del arguments["max_new_tokens"]
        assert all_texts(result) == best(oracle, PROMPTS[0], 4, num_beams=4, **arguments)


def test_a_beam_request_waits_for_its_rows_and_is_not_passed_over(demo: Path) -> None:
    with_four_rows = init_inference(str(demo), backend="onnxruntime", max_rows=4)
    requests = [request("Count from 3 to 9.", num_beams=1 + i % 4) for i in range(24)]
    together = with_four_rows.generate(requests)
    assert together == [with_four_rows.generate([one])[0] for one in requests]
    with_four_rows.close()


def test_sampled_beams_depend_on_their_seed_alone(model: Model) -> None:
    drawn = [
        request("a b c", num_beams=3, num_return_sequences=2, do_sample=True, seed=seed)
        for seed in (1, 2, 1, 3)
    ]
    first = model.generate(drawn)
    assert first[0] == first[2]
    assert len({result.token_ids for result in first}) > 1
    assert model.generate([drawn[0], request("Write 7 in words.")])[0] == first[0]


def test_stop_sequences_end_beams(model: Model) -> None:
    (result,) = model.generate([request(PROMPTS[2], num_beams=4, stop_sequences=["golden"])])
    assert result.text == "apple, "
    assert result.finish_reason == "stop_sequence"


# The search by itself


def search(**parameters: Any) -> BeamSearch:
    p = GenerationParameters(**parameters)
    return BeamSearch(p, Continuation(p, ByteTokenizer()))


def test_fewer_possible_tokens_than_beams() -> None:
    """As where an answer must be one of a few: beams that have no token of their own die."""
    beams = search(num_beams=4, num_return_sequences=4, max_new_tokens=3)
    scores = np.full((4, 10), -np.inf, np.float32)
    scores[:, 5], scores[:, 6] = np.log([0.75, 0.25])
    while beams.advance(scores, scores) is not None:
        pass
    assert [text.token_ids for text in beams.best[:2]] == [[5, 5, 5], [5, 5, 6]]
    assert len(beams.best) == 4


def test_no_possible_token_at_all() -> None:
    beams = search(num_beams=2, max_new_tokens=3)
    scores = np.full((2, 10), -np.inf, np.float32)
    assert beams.advance(scores, scores) is None
    assert beams.best == []


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_the_largest_values_in_their_order(values: list[int], count: int) -> None:
    places = largest(np.array(values, np.float32), count).tolist()
    assert places == sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def test_drawing_without_replacement_is_in_proportion() -> None:
    """Of each step's draws by noise the first has the softmax's probabilities, and the second
    those of what the first one left."""
    probabilities = np.array([0.5, 0.3, 0.15, 0.04, 0.0099, 0.0001])
    log_probs = np.log(probabilities).astype(np.float32)
    counted = np.zeros((6, 6), np.int64)
    for seed in range(DRAWS // 1000):
        row = RowSampling(GenerationParameters(do_sample=True, num_beams=2, seed=seed))
        for step in range(10):
            totals = log_probs + gumbel(row, step, (100, 6))
            first, second = totals.argsort(-1)[:, :-3:-1].T
            np.add.at(counted, (first, second), 1)
    assert counted.sum() == DRAWS
    of_pairs = np.outer(probabilities / (1 - probabilities), probabilities)
    np.fill_diagonal(of_pairs, 0.0)
    assert_counts_follow(counted.sum(1), probabilities)
    assert_counts_follow(counted.ravel(), of_pairs.ravel())
