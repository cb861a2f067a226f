"""Prompts and words as rectangular lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from handler.engines.token_lists import padded, word_list
from handler.parameter_checks import sequences

WORDS = st.lists(st.lists(st.integers(0, 40_000), min_size=1, max_size=5), min_size=1, max_size=6)


@given(WORDS)
def test_a_word_list_is_read_back_as_it_was(words: list[list[int]]) -> None:
    """By what reads those of clients."""
    assert sequences(word_list(words)) == tuple(map(tuple, words))


@given(WORDS)
def test_padding_is_on_the_right_and_masked(prompts: list[list[int]]) -> None:
    ids, mask = padded(prompts, -1)
    assert len({*map(len, ids), *map(len, mask)}) == 1
    for prompt, row, kept in zip(prompts, ids, mask):
        assert [i for i, k in zip(row, kept) if k] == prompt
        assert set(row[len(prompt) :]) <= {-1}


def test_the_form_that_fastertransformer_documents() -> None:
    assert word_list([[1, 2], [3]]) == [[1, 2, 3], [2, 3, -1]]
