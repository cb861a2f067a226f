"""Texts that must have a form: of a regular expression, or one of given choices.

A Guide is one row's place in its text; it forbids every token that leads away from the form, before
the row's token is chosen. So it goes together with sampling, beams and penalties.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from handler.errors import RequestError, shown

if TYPE_CHECKING:
    from handler.parameters import GenerationParameters
    from handler.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]

_REGEXES_KEPT = 64
_LONGEST_REGEX = 2000
_LONGEST_REASON = 150
# Escaped characters, and those that would end or break an expression between slashes.
_IN_SLASHES = re.compile(r"\\.|/|\n|\r", re.DOTALL)
# Characters that stand for themselves, escaped or not
_LITERAL = re.compile(r"\\(\W)|\\\w|([^\\^$.|?*+()\[\]{}])")
_ANCHORS = re.compile(r"\A\^|(?<!\\)\$\Z")
_ESCAPES = {"/": r"\/", "\n": r"\n", "\r": r"\r"}


class Guide(Protocol):
    """One row's place in a text of some form."""

    def allowed(self) -> Ids:
        """The tokens that may come next, ``</s>`` where the text may end."""
        ...

    def append(self, token: int) -> None: ...

    def fork(self) -> Guide:
        """A copy that goes on by itself."""
        ...


class Guides:
    """Makes the guides of requests for one tokenizer; any thread may ask."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._library: _Library | None = None
        self._known: OrderedDict[str, Guide] = OrderedDict()

    def of(self, parameters: GenerationParameters) -> Guide | None:
        """None where the text is free. Raises RequestError for what cannot be written."""
        if parameters.choices:
            return ChoicesGuide(_trie(parameters.choices, self._tokenizer))
        if parameters.regex is not None:
            return self._of_regex(parameters.regex).fork()
        return None

    def _of_regex(self, regex: str) -> Guide:
        with self._lock:
            guide = self._known.get(regex)
            if guide is None:
                self._library = self._library or _Library(self._tokenizer)
                guide = self._known[regex] = self._library.guide(regex)
            self._known.move_to_end(regex)
            if len(self._known) > _REGEXES_KEPT:
                self._known.popitem(last=False)
            return guide


class RegexGuide:
    """By llguidance's matcher, which follows an expression's derivatives token by token."""

    def __init__(self, matcher: Any, tokens: int) -> None:
        self._matcher = matcher
        self._tokens = tokens

    def allowed(self) -> Ids:
        """None at all where the expression has become too large to follow."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            logger.info("a regex cannot be followed: %s", self.error)
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.unpackbits(mask, bitorder="little")[: self._tokens])

    @property
    def error(self) -> str:
        """What is wrong with the expression; \"\" where nothing is."""
        return " ".join(str(self._matcher.get_error()).partition("<state>")[0].split())

    def append(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def fork(self) -> RegexGuide:
        return RegexGuide(self._matcher.deep_copy(), self._tokens)


class _Library:
    """llguidance, on one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                f"parameter 'regex' needs the package llguidance on the server: {error}"
            ) from None
        self._matcher = llguidance.LLMatcher
        self._tokens = _TokenBytes(tokenizer)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self._tokens))
        # Tokenizers that write a space before a text's first word leave it out of the text.
        first = tokenizer.token(tokenizer.encode_plain("a")[0])
        self._before = " " if first.startswith("▁") else ""

    def guide(self, regex: str) -> RegexGuide:
        """Raises RequestError for an expression that is none, or that no text can match."""
        if len(regex) > _LONGEST_REGEX:
            raise RequestError(
                f"parameter 'regex' may have {_LONGEST_REGEX} characters, got {len(regex)}"
            )
        whole = _ANCHORS.sub("", regex)  # it matches the whole text with and without them
        between = _IN_SLASHES.sub(lambda m: _ESCAPES.get(m.group(), m.group()), whole)
        self._check(f"/{between}/", regex)
        form = f"/{self._before}(?:{between})/"
        if self._tokens.alphabet is not None:
            form += f" & /{self._tokens.alphabet}*/"
        guide = RegexGuide(self._matcher_of(form), len(self._tokens.tokens))
        if not set(guide.allowed().tolist()) - {self._tokens.eos_token_id}:
            raise RequestError(
                f"parameter 'regex': this model's vocabulary cannot write what {shown(regex)} asks "
                f"for{self._missing(whole)}"
            )
        return guide

    def _matcher_of(self, form: str) -> Any:
        grammar = f"start: TEXT\nTEXT: {form}\n"
        return self._matcher(self._tokenizer, grammar, log_level=0)

    def _check(self, form: str, regex: str) -> None:
        """By itself: what is no expression may become one between the parentheses around it."""
        error = RegexGuide(self._matcher_of(form), 0).error
        if error or "(?x" in regex:
            reason = error.rpartition("error:")[2].partition(" 1 |")[0].strip()
            raise RequestError(
                "parameter 'regex' must be a regular expression without look-around, back "
                f"references and comments, got {shown(regex)}: {reason[:_LONGEST_REASON]}"
            )

    def _missing(self, regex: str) -> str:
        literal = {escaped or plain for escaped, plain in _LITERAL.findall(regex)} - {""}
        lacking = sorted(literal - self._tokens.characters)
        return f"; among its characters there is no {' '.join(lacking)}" if lacking else ""


class _TokenBytes:
    """A tokenizer as llguidance wants it.

    alphabet: a class of all characters that have a token of their own, so that what begins to be
    written can be ended; None where the tokens are bytes.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_token_id
        texts = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        self.special_token_ids = [i for i, text in enumerate(texts) if not text]
        self.tokens = [text or b"\xff<%d>" % i for i, text in enumerate(texts)]
        self._ids = {text: i for i, text in reversed([*enumerate(texts)]) if text}
        self._longest = max(map(len, self._ids))
        self.characters = set(_characters(self._ids))
        spells_bytes = all(bytes([byte]) in self._ids for byte in range(128, 192))
        self.alphabet = None if spells_bytes else _class_of(self.characters)

    def __call__(self, text: str | bytes) -> list[int]:
        """The longest tokens first: any tokens do that spell the text, a leading space included,
        which a tokenizer may drop."""
        left = text.encode() if isinstance(text, str) else text
        found = []
        while left:
            lengths = range(min(self._longest, len(left)), 0, -1)
            length = next((n for n in lengths if left[:n] in self._ids), None)
            if length is not None:
                found.append(self._ids[left[:length]])
            left = left[length or 1 :]
        return found


def _characters(texts: dict[bytes, int]) -> Iterator[str]:
    for text in texts:
        try:
            character = text.decode()
        except UnicodeDecodeError:  # a part of one
            continue
        if len(character) == 1:
            yield character


def _class_of(characters: set[str]) -> str:
    """As a regular expression, in ranges."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges) + "]"


class ChoicesGuide:
    """By the tokens that a tokenizer writes for each choice."""

    def __init__(self, trie: _Trie, state: int = 0) -> None:
        self._trie = trie
        self._state = state

    def allowed(self) -> Ids:
        return np.array(sorted(self._trie[self._state]), np.int64)

    def append(self, token: int) -> None:
        self._state = self._trie[self._state].get(token, self._state)

    def fork(self) -> ChoicesGuide:
        return ChoicesGuide(self._trie, self._state)


_Trie = list[dict[int, int]]
"""Of each state, the beginning 0: token -> next state"""


@lru_cache(maxsize=64)  # a client's list has the same choices for all of its inputs
def _trie(choices: tuple[str, ...], tokenizer: Tokenizer) -> _Trie:
    trie: _Trie = [{}]
    for choice in choices:
        ids = tokenizer.encode_target(choice)
        if tokenizer.unk_token_id in ids or tokenizer.decode(ids).strip() != choice.strip():
            raise RequestError(
                f"parameter 'choices': this model's vocabulary cannot write {shown(choice)}, only "
                f"{shown(tokenizer.decode(ids))}"
            )
        state = 0
        for token in ids:
            if token not in trie[state]:
                trie.append({})
                trie[state][token] = len(trie) - 1
            state = trie[state][token]
    return trie
