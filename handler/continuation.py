"""One text while it is generated: its tokens, and the rules that end it, once for every engine."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handler.parameters import GenerationParameters

if TYPE_CHECKING:
    from handler.tokenizer import Tokenizer

EOS_TOKEN, LENGTH, STOP_SEQUENCE = "eos_token", "length", "stop_sequence"


@dataclass(frozen=True)
class TopToken:
    """One of the likeliest tokens of a step."""

    token_id: int
    log_prob: float


class Continuation:
    """Tokens so far, and why they ended: ``</s>``, the length, a stop sequence.

    streams: whether ``unsent`` is asked for.
    """

    def __init__(
        self, parameters: GenerationParameters, tokenizer: Tokenizer, *, streams: bool = False
    ) -> None:
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_tokens: list[tuple[TopToken, ...]] = []
        self.finish_reason: str | None = None
        self._parameters = parameters
        self._tokenizer = tokenizer
        stops = parameters.stop_sequences
        self._stop_texts = sorted(stop for stop in stops if isinstance(stop, str))
        self._stop_ids = sorted(list(stop) for stop in stops if not isinstance(stop, str))
        self._detokenizer = tokenizer.detokenizer() if self._stop_texts or streams else None
        self._text = ""
        self._sent = 0
        self._has_tokens = True

    def append(
        self, token_id: int, log_prob: float | None, top_tokens: tuple[TopToken, ...] = ()
    ) -> str | None:
        """Take the next token; the reason why it was the last one, or None."""
        self.token_ids.append(token_id)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if top_tokens:
            self.top_tokens.append(top_tokens)
        new = ""
        if self._detokenizer is not None and token_id != self._tokenizer.eos_token_id:
            new = self._detokenizer.add(token_id)
            self._text += new
        self.finish_reason = self._reason_to_stop(len(new))
        return self.finish_reason

    def append_text(self, text: str, *, last: bool) -> str | None:
        """Take the next piece of text from an engine that tells no tokens.

        Whether ``</s>`` or the length ended it is then an estimate, from the text's own tokens.
        """
        self._has_tokens = False
        self._text += text
        if self._has_stop_text(len(text)):
            self.finish_reason = STOP_SEQUENCE
        elif last:
            tokens = len(self._tokenizer.encode_plain(self._text))
            most = self._parameters.max_new_tokens
            self.finish_reason = LENGTH if tokens >= most else EOS_TOKEN
        return self.finish_reason

    def fork(self) -> Continuation:
        """A copy that goes on by itself."""
        other = copy.copy(self)
        other.token_ids = self.token_ids.copy()
        other.log_probs = self.log_probs.copy()
        other.top_tokens = self.top_tokens.copy()
        other._detokenizer = self._detokenizer and self._detokenizer.fork()
        return other

    def text(self) -> str:
        """The whole text, cut before a stop sequence; finish_reason then says that it was one."""
        ids = self.token_ids
        cut = max((len(stop) for stop in self._stop_ids if ids[-len(stop) :] == stop), default=0)
        ids = ids[: len(ids) - cut]
        text = self._tokenizer.decode(ids) if self._has_tokens else self._text
        cuts = [at for at in map(text.find, self._stop_texts) if at >= 0]
        if not cuts:
            return text
        self.finish_reason = STOP_SEQUENCE
        return text[: min(cuts)]

    def unsent(self) -> str:
        """The text that can be sent now: what may become a stop sequence is held back."""
        end = len(self._text) - _overlap(self._text, self._stop_texts)
        begun = _overlap(self.token_ids, self._stop_ids)
        if begun:
            end = min(end, len(self._tokenizer.decode(self.token_ids[:-begun])))
        text, self._sent = self._text[self._sent : end], max(end, self._sent)
        return text

    def rest(self, text: str) -> str:
        """What of the whole ``text`` was not sent yet."""
        return text[self._sent :]

    def is_over(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of these tokens ends their text; those before it do not."""
        if self._ends_by_ids(token_ids) or len(token_ids) >= self._parameters.max_new_tokens:
            return True
        text = self._tokenizer.decode(token_ids) if self._stop_texts else ""
        return any(stop in text for stop in self._stop_texts)

    def _ends_by_ids(self, token_ids: Sequence[int]) -> str | None:
        if any(token_ids[-len(ids) :] == ids for ids in self._stop_ids):
            return STOP_SEQUENCE
        if token_ids[-1] == self._tokenizer.eos_token_id and not self._parameters.ignore_eos_token:
            return EOS_TOKEN
        return None

    def _reason_to_stop(self, new: int) -> str | None:
        reason = self._ends_by_ids(self.token_ids)
        if reason is not None:
            return reason
        if self._has_stop_text(new):
            return STOP_SEQUENCE
        return LENGTH if len(self.token_ids) >= self._parameters.max_new_tokens else None

    def _has_stop_text(self, new: int) -> bool:
        """Whether one lies in the text, of which the last ``new`` characters are new."""
        recent = (self._text[-(new + len(stop)) :] for stop in self._stop_texts)
        return new > 0 and any(stop in text for stop, text in zip(self._stop_texts, recent))


def _overlap(whole: Sequence[Any], stops: Sequence[Any]) -> int:
    """Length of the longest end of ``whole`` that begins one of ``stops``, which are sorted.

    All are texts, or all are lists.
    """
    for length in range(min(max(map(len, stops), default=0), len(whole)), 0, -1):
        end = whole[-length:]
        at = bisect_left(stops, end)
        if at < len(stops) and stops[at][:length] == end:
            return length
    return 0
