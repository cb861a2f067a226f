"""What one row has generated so far, and what that means for its next token.

Kept up to date token by token: nothing here reads all tokens again at a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import numpy.typing as npt

from handler.parameters import GenerationParameters

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_ROOM = 32  # different tokens that the table has room for at first


class History:
    """The tokens of one row, the decoder's start token first."""

    def __init__(
        self,
        parameters: GenerationParameters,
        start_token: int,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        self._ids = [start_token]
        self._seen = _Seen(start_token)
        self._ngrams = _Ngrams(parameters.no_repeat_ngram_size)
        self._ngrams.append(self._ids)
        self._words = _BadWords(bad_words)

    def append(self, token: int) -> None:
        self._ids.append(token)
        self._seen.append(token)
        self._ngrams.append(self._ids)

    def fork(self) -> History:
        """A copy that goes on by itself."""
        other = copy(self)
        other._ids = self._ids.copy()
        other._seen = self._seen.fork()
        other._ngrams = self._ngrams.fork()
        return other

    def counts(self) -> tuple[Ids, Floats]:
        """Each different token and how often it was generated: the start token 0 times."""
        return self._seen.counts()

    def forbidden(self) -> list[int]:
        """Tokens that would repeat an n-gram or complete a bad word of several tokens."""
        return [*self._ngrams.completing(self._ids), *self._words.completing(self._ids)]

    @property
    def always_forbidden(self) -> Ids:
        """Bad words of one token."""
        return self._words.single


class _Seen:
    """Different tokens in the order in which they came, with their counts."""

    def __init__(self, start_token: int) -> None:
        self._places = {start_token: 0}
        self._tokens = np.full(_ROOM, start_token, np.int64)
        self._counts = np.zeros(_ROOM, np.float32)

    def append(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, self._tokens])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def counts(self) -> tuple[Ids, Floats]:
        known = len(self._places)
        return self._tokens[:known], self._counts[:known]

    def fork(self) -> _Seen:
        other = copy(self)
        other._places = self._places.copy()
        other._tokens = self._tokens.copy()
        other._counts = self._counts.copy()
        return other


class _Ngrams:
    """The n-grams so far, by their first n - 1 tokens; none where n is 0."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._followers: dict[tuple[int, ...], tuple[int, ...]] = {}

    def append(self, ids: list[int]) -> None:
        """Take the n-gram that ends ``ids``."""
        if 0 < self._size <= len(ids):
            beginning = tuple(ids[len(ids) - self._size : -1])
            self._followers[beginning] = (*self._followers.get(beginning, ()), ids[-1])

    def completing(self, ids: list[int]) -> tuple[int, ...]:
        if not 0 < self._size <= len(ids):
            return ()
        return self._followers.get(tuple(ids[len(ids) + 1 - self._size :]), ())

    def fork(self) -> _Ngrams:
        other = copy(self)
        other._followers = self._followers.copy()
        return other


class _BadWords:
    """Never changes: what is forbidden follows from the last tokens."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.single = np.array([word[0] for word in words if len(word) == 1], np.int64)
        # by the last token but one: of many words few need to be looked at
        self._longer: dict[int, list[tuple[list[int], int]]] = {}
        for *beginning, last in words:
            if beginning:
                self._longer.setdefault(beginning[-1], []).append((beginning, last))

    def completing(self, ids: list[int]) -> list[int]:
        return [
            last
            for beginning, last in self._longer.get(ids[-1], ())
            if ids[-len(beginning) :] == beginning
        ]
