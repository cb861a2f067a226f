"""Texts that must have a form: of a regular expression, or one of given choices.

An automaton says which tokens may come next; a Guide is one row's place in it. It forbids all other
tokens before the row's token is chosen, so it goes together with sampling, beams and penalties.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from handler.errors import RequestError, shown

if TYPE_CHECKING:
    from handler.parameters import GenerationParameters
    from handler.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]

# Building an automaton takes about 5 ms for each character that a text may have.
_LARGEST_REGEX = 256
_REGEXES_KEPT, _STATES_KEPT = 32, 64
_MISSING = re.compile(r"missing tokens corresponding to .*?: (\[.*?\])\.")


class Automaton(Protocol):
    """Which tokens may follow which. States are the automaton's own numbers."""

    start: int

    def allowed(self, state: int) -> Ids:
        """The tokens that may come now, ``</s>`` where the text may end."""
        ...

    def next(self, state: int, token: int) -> int: ...


class Guide:
    """One row's place in an automaton."""

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._state = automaton.start

    def allowed(self) -> Ids:
        return self._automaton.allowed(self._state)

    def append(self, token: int) -> None:
        self._state = self._automaton.next(self._state, token)

    def fork(self) -> Guide:
        """A copy that goes on by itself."""
        other = Guide(self._automaton)
        other._state = self._state
        return other


class Guides:
    """Makes the guides of requests for one tokenizer; any thread may ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._known: OrderedDict[str, RegexAutomaton] = OrderedDict()

    def of(self, parameters: GenerationParameters) -> Guide | None:
        """None where the text is free. Raises RequestError for what cannot be written."""
        if parameters.choices:
            return Guide(_trie(parameters.choices, self._tokenizer))
        if parameters.regex is not None:
            return Guide(self._automaton(parameters.regex))
        return None

    def _automaton(self, regex: str) -> RegexAutomaton:
        with self._lock:
            automaton = self._known.get(regex)
            if automaton is None:
                if self._vocabulary is None:
                    self._vocabulary = _vocabulary(self._tokenizer)
                automaton = self._known[regex] = RegexAutomaton(
                    regex, self._vocabulary, self._tokenizer
                )
            self._known.move_to_end(regex)
            if len(self._known) > _REGEXES_KEPT:
                self._known.popitem(last=False)
            return automaton


class RegexAutomaton:
    """Of a regular expression that the whole text must match, by outlines-core."""

    def __init__(self, regex: str, vocabulary: Any, tokenizer: Tokenizer) -> None:
        from outlines_core import Index

        if _size(regex) > _LARGEST_REGEX:
            raise RequestError(
                f"parameter 'regex' may describe at most {_LARGEST_REGEX} characters, repetitions "
                f"counted, got {shown(regex)} with {_size(regex)}; use * or + for long texts"
            )
        # Tokenizers that write a space before a text's first word leave it out of its text.
        space = " " if tokenizer.token(tokenizer.encode_plain("a")[0]).startswith("▁") else ""
        try:
            self._index = Index(f"{space}(?:{regex})", vocabulary)
        except ValueError as error:
            raise _refusal(regex, str(error)) from None
        self.start: int = self._index.get_initial_state()
        self._allowed: dict[int, Ids] = {}

    def allowed(self, state: int) -> Ids:
        found = self._allowed.get(state)
        if found is None:
            found = np.sort(np.array(self._index.get_allowed_tokens(state) or (), np.int64))
            if len(self._allowed) < _STATES_KEPT:
                self._allowed[state] = found
        return found

    def next(self, state: int, token: int) -> int:
        following = self._index.get_next_state(state, token)
        return state if following is None else int(following)  # after </s>


class _Trie:
    """Of sequences of tokens, each with its ``</s>``."""

    start = 0

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._following: list[dict[int, int]] = [{}]
        for sequence in sequences:
            state = self.start
            for token in sequence:
                if token not in self._following[state]:
                    self._following.append({})
                    self._following[state][token] = len(self._following) - 1
                state = self._following[state][token]

    def allowed(self, state: int) -> Ids:
        return np.array(sorted(self._following[state]), np.int64)

    def next(self, state: int, token: int) -> int:
        return self._following[state].get(token, state)


def _trie(choices: Sequence[str], tokenizer: Tokenizer) -> _Trie:
    sequences = []
    for choice in choices:
        ids = tokenizer.encode(choice)
        if tokenizer.decode(ids).strip() != choice.strip():
            raise RequestError(
                f"parameter 'choices': this model's vocabulary cannot write {shown(choice)}, only "
                f"{shown(tokenizer.decode(ids))}"
            )
        sequences.append(ids)
    return _Trie(sequences)


def _vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokens' bytes, as outlines-core wants them. Special tokens are in no text."""
    try:
        from outlines_core import Vocabulary
    except ImportError as error:
        raise RequestError(
            f"parameter 'regex' needs the package outlines-core on the server: {error}"
        ) from None
    ids: dict[bytes, list[int]] = {}
    for token_id in range(tokenizer.size):
        text = tokenizer.token_bytes(token_id)
        if text:
            ids.setdefault(text, []).append(token_id)
    return Vocabulary(tokenizer.eos_token_id, ids)


def _refusal(regex: str, reason: str) -> RequestError:
    missing = _MISSING.search(reason)
    if missing:
        return RequestError(
            f"parameter 'regex': this model's vocabulary cannot write what {shown(regex)} asks "
            f"for; it lacks one of {missing.group(1)}"
        )
    return RequestError(
        f"parameter 'regex' must be a regular expression without look-around, back references and "
        f"anchors (it matches the whole text), got {shown(regex)}: {reason}"
    )


def _size(regex: str) -> int:
    """Characters that the expression describes, each repetition counted; an estimate from above."""
    sizes, atom, i = [0], 0, 0
    while i < len(regex):
        c = regex[i]
        if c == "(":
            sizes.append(0)
        elif c == ")" and len(sizes) > 1:
            atom = sizes.pop()
            sizes[-1] += atom
        elif repeat := _REPEAT.match(regex, i):
            most = int(repeat.group(2) or repeat.group(1))
            sizes[-1] += atom * (most - 1)
            atom *= most
            i = repeat.end() - 1
        elif c not in "*+?|":
            i = _end_of_atom(regex, i) - 1
            atom = 1
            sizes[-1] += 1
        i += 1
    return sum(sizes)


_REPEAT = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")


def _end_of_atom(regex: str, i: int) -> int:
    if regex[i] == "\\":
        return i + 2
    if regex[i] != "[":
        return i + 1
    i += 2 if regex[i + 1 : i + 2] in ("]", "^") else 1
    while i < len(regex) and regex[i] != "]":
        i += 2 if regex[i] == "\\" else 1
    return i + 1
