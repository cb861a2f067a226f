"""Prompts and words as the rectangular lists of ids that engines of whole batches take."""

from __future__ import annotations

from collections.abc import Sequence

from handler.errors import RequestError, shown
from handler.parameters import GenerationParameters
from handler.tokenizer import Tokenizer


def padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[list[list[int]], list[list[int]]]:
    """input_ids and attention_mask, [rows, longest prompt]; the padding is on the right."""
    longest = max(map(len, prompts))
    ids = [[*prompt, *[pad_token_id] * (longest - len(prompt))] for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    return ids, mask


def bad_words(p: GenerationParameters, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each of the request's bad words.

    Raises RequestError for one that the vocabulary cannot write.
    """
    words = []
    for word in p.bad_words_list:
        ids = tokenizer.encode_plain(word) if isinstance(word, str) else list(word)
        if not ids or max(ids) >= tokenizer.size:
            raise RequestError(
                f"parameter 'bad_words_list' must hold words of this model's {tokenizer.size} "
                f"tokens, got {shown(word)}"
            )
        words.append(ids)
    return words


def word_list(words: Sequence[Sequence[int]]) -> list[list[int]]:
    """FasterTransformer's form of words: [[ids of all words], [where each ends, then -1]]."""
    ids = [token_id for word in words for token_id in word]
    ends = [sum(map(len, words[: i + 1])) for i in range(len(words))]
    return [ids, ends + [-1] * (len(ids) - len(ends))]
