"""Penalties, n-grams, bad words and the least length: the scores that transformers leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers_scores import EOS, transformers_scores

from handler.parameters import GenerationParameters
from handler.sampling import RowSampling, process

VOCABULARY = 12
Words = list[list[int]]

tokens = st.integers(0, VOCABULARY - 1)
parameters = st.builds(
    GenerationParameters,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3, 20.0]),
    presence_penalty=st.sampled_from([0.0, -1.5, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 2.0]),
    no_repeat_ngram_size=st.integers(0, 5),
    min_new_tokens=st.sampled_from([0, 4, 40]),
    ignore_eos_token=st.booleans(),
)
words = st.lists(
    st.lists(tokens, min_size=1, max_size=4).filter(lambda word: word != [EOS]), max_size=6
)
histories = st.lists(tokens, max_size=60)


def row_after(p: GenerationParameters, generated: list[int], bad_words: Words) -> RowSampling:
    row = RowSampling(p, bad_words=bad_words)
    for token in generated:
        row.append(token)
    return row


def logits_of(rows: int, seed: int) -> Any:
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCABULARY)).astype(np.float32)


def assert_as_in_transformers(
    rows: list[RowSampling], cases: list[tuple[GenerationParameters, list[int], Words]], seed: int
) -> None:
    logits = logits_of(len(rows), seed)
    scores = logits.copy()
    changes = process(scores, rows, [len(generated) for _, generated, _ in cases], EOS)
    for row, (p, generated, bad_words) in enumerate(cases):
        expected = transformers_scores(logits[row], p, generated, bad_words)
        np.testing.assert_allclose(scores[row], expected.numpy(), rtol=1e-5, atol=1e-5)
    changes.undo(scores)
    np.testing.assert_array_equal(scores, logits)


@settings(deadline=None)
@given(
    cases=st.lists(st.tuples(parameters, histories, words), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_scores_of_mixed_rows_are_those_of_transformers(
    cases: list[tuple[GenerationParameters, list[int], Words]], seed: int
) -> None:
    assert_as_in_transformers([row_after(*case) for case in cases], cases, seed)


@pytest.mark.parametrize(
    ("values", "bad_words"),
    [
        ({"repetition_penalty": 1.3}, []),
        ({"presence_penalty": 0.7}, []),
        ({"frequency_penalty": 0.4}, []),
        ({"no_repeat_ngram_size": 1}, []),
        ({"no_repeat_ngram_size": 3}, []),
        ({"min_new_tokens": 30}, []),
        ({"ignore_eos_token": True}, []),
        ({}, [[5], [4, 6, 4], [6, 3], [0, 7]]),
    ],
    ids=str,
)
def test_each_alone_at_every_step_of_a_text(values: dict[str, Any], bad_words: Words) -> None:
    p = GenerationParameters(**values)
    text = np.random.default_rng(5).integers(2, 8, 40).tolist()
    row = RowSampling(p, bad_words=bad_words)
    changed = 0
    for step, token in enumerate(text):
        assert_as_in_transformers([row], [(p, text[:step], bad_words)], step)
        logits = logits_of(1, step)[0]
        scores = transformers_scores(logits, p, text[:step], bad_words).numpy()
        changed += (scores != logits).any()
        row.append(token)
    assert changed >= 9, "shows nothing on this text"


@settings(deadline=None)
@given(p=parameters, bad_words=words, text=histories, one=histories, other=histories)
def test_a_copy_goes_on_by_itself(
    p: GenerationParameters, bad_words: Words, text: list[int], one: list[int], other: list[int]
) -> None:
    first = row_after(p, text, bad_words)
    second = first.fork()
    for i in range(max(len(one), len(other))):  # by turns
        for row, further in ((first, one), (second, other)):
            for token in further[i : i + 1]:
                row.append(token)
    cases = [(p, text + one, bad_words), (p, text + other, bad_words)]
    assert_as_in_transformers([first, second], cases, 0)


def test_the_start_token_is_one_of_the_tokens_but_was_not_generated() -> None:
    p = GenerationParameters(repetition_penalty=2.0, presence_penalty=1.0)
    scores = np.full((1, 4), 8, np.float32)
    process(scores, [row_after(p, [3], [])], [1], EOS)
    assert scores.tolist() == [[4.0, 8.0, 8.0, 3.0]]
