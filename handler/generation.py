"""What goes down and what comes up: requests, results, and one generation's state in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handler.errors import RequestError, shown
from handler.parameters import GenerationParameters

if TYPE_CHECKING:
    from handler.tokenizer import Tokenizer

EOS_TOKEN, LENGTH, STOP_SEQUENCE = "eos_token", "length", "stop_sequence"


def checked_text(text: Any, place: str) -> str:
    """A text that can be answered. Raises RequestError, naming its ``place``."""
    if not isinstance(text, str):
        raise RequestError(f"{place} must be a string, got {shown(text)}")
    if not text.strip():
        raise RequestError(f"{place} must not be empty or blank, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{place} holds half a surrogate pair at character {error.start}: "
            f"{shown(text[error.start])} is no character"
        ) from None
    return text


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    input: str
    parameters: GenerationParameters = GenerationParameters()


@dataclass(frozen=True)
class GenerationResult:
    """One answer.

    token_ids: every token chosen, a closing ``</s>`` and those of a stop sequence included.
    log_probs: the model's own log-probability of each of them, before temperature and filters.
    finish_reason: ``eos_token`` | ``length`` | ``stop_sequence``.
    input_tokens: how many tokens the encoder read; truncated: whether that was not the whole input.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    input_tokens: int
    truncated: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """One step of a stream. ``text`` may be empty: a token that only begins a character or word.

    The last event carries the whole ``result``.
    """

    text: str
    token_id: int
    log_prob: float
    result: GenerationResult | None = None


class Generation:
    """One request on its way through an engine: its prompt, its tokens so far, its future.

    The rules that end a generation (``</s>``, length, stop sequences) are here, once for every
    engine. ``append`` is called by the engine's thread alone; anyone may cancel ``future``.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        truncated: bool = False,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> None:
        self.parameters = request.parameters
        self.prompt_ids = list(prompt_ids)
        self.future: Future[GenerationResult] = Future()
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._truncated = truncated
        self._on_event = on_event
        stops = self.parameters.stop_sequences
        self._stop_texts = [stop for stop in stops if isinstance(stop, str)]
        self._stop_ids = [list(stop) for stop in stops if not isinstance(stop, str)]
        self._detokenizer = tokenizer.detokenizer() if self._stop_texts or on_event else None
        self._text = ""
        self._sent = 0

    @property
    def done(self) -> bool:
        """Nothing more to generate: finished, failed, or nobody waits for it any more."""
        return self.finish_reason is not None or self.future.done()

    def append(self, token_id: int, log_prob: float) -> bool:
        """Take the next token; True when it was the last one.

        A log-probability of NaN fails the generation.
        """
        if math.isnan(log_prob):
            self.fail(
                RequestError(
                    "the model computed numbers that are none for this input; set option.dtype to "
                    "bf16 or fp32, or check its weights",
                    424,
                )
            )
            return True
        self.token_ids.append(token_id)
        self.log_probs.append(log_prob)
        if self._detokenizer is not None and token_id != self._tokenizer.eos_token_id:
            self._text += self._detokenizer.add(token_id)
        reason = self._reason_to_stop(token_id)
        if reason is None:
            self._send(TokenEvent(self._unsent(), token_id, log_prob))
            return False
        result = self._result(reason)
        self.finish_reason = result.finish_reason
        self._send(TokenEvent(result.text[self._sent :], token_id, log_prob, result))
        _resolve(self.future, result)
        return True

    def fail(self, error: BaseException) -> None:
        """End with an error; without effect when already ended."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass

    def _reason_to_stop(self, token_id: int) -> str | None:
        if token_id == self._tokenizer.eos_token_id and not self.parameters.ignore_eos_token:
            return EOS_TOKEN
        if any(self.token_ids[-len(ids) :] == ids for ids in self._stop_ids):
            return STOP_SEQUENCE
        if any(stop in self._text for stop in self._stop_texts):
            return STOP_SEQUENCE
        return LENGTH if len(self.token_ids) >= self.parameters.max_new_tokens else None

    def _result(self, reason: str) -> GenerationResult:
        ids = self.token_ids
        for stop in self._stop_ids:
            if ids[-len(stop) :] == stop:
                ids = ids[: -len(stop)]
                break
        text = self._tokenizer.decode(ids)
        cuts = [at for at in map(text.find, self._stop_texts) if at >= 0]
        return GenerationResult(
            text=text[: min(cuts)] if cuts else text,
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            finish_reason=STOP_SEQUENCE if cuts else reason,
            input_tokens=len(self.prompt_ids),
            truncated=self._truncated,
        )

    def _unsent(self) -> str:
        """The text that can be sent now: what may become a stop sequence is held back."""
        if self._on_event is None:
            return ""
        end = len(self._text) - max((_overlap(self._text, s) for s in self._stop_texts), default=0)
        text, self._sent = self._text[self._sent : end], max(end, self._sent)
        return text

    def _send(self, event: TokenEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(stop), len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _resolve(future: Future[GenerationResult], result: GenerationResult) -> None:
    try:
        future.set_result(result)
    except InvalidStateError:  # cancelled meanwhile
        pass
