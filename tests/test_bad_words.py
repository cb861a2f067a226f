"""Bad words as strings and as ids -> sequences of ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from handler.bad_words import bad_word_ids
from handler.errors import RequestError
from handler.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@pytest.fixture(scope="module", params=["tokenizer.json", "spiece.model"])
def tokenizer(
    request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / request.param).symlink_to(demo / request.param)
    return load_tokenizer(folder, 640)


def written(tokenizer: Tokenizer, *words: Any) -> list[str]:
    sequences = bad_word_ids(words, tokenizer)
    return [" ".join(map(tokenizer.token, ids)) for ids in sequences]


def test_a_string_is_forbidden_after_a_space_and_within_a_word(tokenizer: Tokenizer) -> None:
    assert written(tokenizer, "cat") == ["▁cat", "c at"]
    assert written(tokenizer, "cat, apple") == ["▁cat , ▁apple", "c at , ▁apple"]


def test_a_string_that_begins_with_a_space_is_a_words_beginning(tokenizer: Tokenizer) -> None:
    assert written(tokenizer, " cat") == ["▁cat"]


def test_ids_are_forbidden_as_they_are(tokenizer: Tokenizer) -> None:
    assert bad_word_ids([(5, 6), (7,)], tokenizer) == ((5, 6), (7,))


def test_each_sequence_comes_once(tokenizer: Tokenizer) -> None:
    (cat,) = tokenizer.encode_plain("cat")
    assert written(tokenizer, "cat", (cat,), "cat") == ["▁cat", "c at"]


def test_bytes_are_the_same_everywhere() -> None:
    assert bad_word_ids(["a€"], ByteTokenizer()) == ((100, 229, 133, 175),)


@pytest.mark.parametrize("word", [" ", (640,), (3, 10_000_000)], ids=repr)
def test_what_the_vocabulary_cannot_write_is_refused(tokenizer: Tokenizer, word: Any) -> None:
    with pytest.raises(RequestError, match="'bad_words_list' must hold words of this model's"):
        bad_word_ids(["cat", word], tokenizer)


@pytest.mark.parametrize("word", ["</s>", (1,)], ids=repr)
def test_the_end_of_the_text_is_refused_and_says_what_to_send(
    tokenizer: Tokenizer, word: Any
) -> None:
    with pytest.raises(RequestError, match=r"not hold the end of the text.*ignore_eos_token"):
        bad_word_ids([word], tokenizer)
    assert bad_word_ids([(5, 1)], tokenizer) == ((5, 1),)
