"""Prompts and words as the rectangular lists of ids that engines of whole batches take."""

from __future__ import annotations

from collections.abc import Sequence


def padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int
) -> tuple[list[list[int]], list[list[int]]]:
    """input_ids and attention_mask, [rows, longest prompt]; the padding is on the right."""
    longest = max(map(len, prompts))
    ids = [[*prompt, *[pad_token_id] * (longest - len(prompt))] for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    return ids, mask


def word_list(words: Sequence[Sequence[int]]) -> list[list[int]]:
    """FasterTransformer's form of words: [[ids of all words], [where each ends, then -1]]."""
    ids = [token_id for word in words for token_id in word]
    ends = [sum(map(len, words[: i + 1])) for i in range(len(words))]
    return [ids, ends + [-1] * (len(ids) - len(ends))]
