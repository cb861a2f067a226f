"""Words that must not be generated -> sequences of ids, with one meaning for every engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from handler.errors import RequestError, shown
from handler.parameter_checks import StopSequence

if TYPE_CHECKING:
    from handler.tokenizer import Tokenizer

# One stands before a word, so that a tokenizer does not write it as a text's first one: with the
# space that it puts there. More than one, since a tokenizer may join a character to the word.
_BEFORE = ("\u4e00", "0", ";", "~", "Q")


def bad_word_ids(
    words: Sequence[StopSequence], tokenizer: Tokenizer
) -> tuple[tuple[int, ...], ...]:
    """The sequences that ``words`` forbid, each once.

    A string forbids what the tokenizer writes for it after a space, and what it writes for it
    within a word; ids forbid themselves. Raises RequestError for a word that the vocabulary cannot
    write, and for the end of the text.
    """
    return _ids_of(tuple(w if isinstance(w, str) else tuple(w) for w in words), tokenizer)


@lru_cache(maxsize=64)  # a client's list has the same words for all of its inputs
def _ids_of(words: tuple[StopSequence, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        forms = _forms(word, tokenizer) if isinstance(word, str) else [tuple(word)]
        for ids in forms:
            lacking = not ids or max(ids) >= tokenizer.size
            if lacking or (isinstance(word, str) and tokenizer.unk_token_id in ids):
                raise RequestError(
                    f"parameter 'bad_words_list' must hold words of this model's "
                    f"{tokenizer.size} tokens, got {shown(word)}"
                )
            if ids == (tokenizer.eos_token_id,):
                raise RequestError(
                    "parameter 'bad_words_list' must not hold the end of the text alone, got "
                    f"{shown(word)}; send ignore_eos_token or min_new_tokens to go on beyond it"
                )
            sequences[ids] = None
    return tuple(sequences)


def _forms(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    first = tuple(tokenizer.encode_plain(word))
    return list({first: None, (_within(word, tokenizer) or first): None})


def _within(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """() where the tokenizer joins the word to whatever stands before it."""
    for character in _BEFORE:
        before = tokenizer.encode_plain(character)
        ids = tokenizer.encode_plain(character + word)
        if len(ids) > len(before) and ids[: len(before)] == before:
            return tuple(ids[len(before) :])
    return ()
