"""What goes down and what comes up: requests, results, and one generation's state in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from handler.bad_words import bad_word_ids
from handler.continuation import Continuation, TopToken
from handler.errors import RequestError, shown
from handler.guided import Guide
from handler.parameters import GenerationParameters

if TYPE_CHECKING:
    from handler.tokenizer import Tokenizer


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
    """One prompt and how to continue it.

    log_probs: whether the result must tell its tokens' log-probabilities. A step is cheaper without
    them; where they come by themselves the result tells them all the same.
    """

    input: str
    parameters: GenerationParameters = GenerationParameters()
    log_probs: bool = True


@dataclass(frozen=True)
class ScoreRequest:
    """One prompt and the answers whose probability is asked for.

    Of the parameters ``truncate`` and ``top_n_tokens`` count. field: what errors call the targets.
    """

    input: str
    targets: tuple[str, ...]
    parameters: GenerationParameters = GenerationParameters()
    field: str = "targets"


@dataclass(frozen=True)
class Timing:
    """Seconds: from the request's arrival to its row, and from there to its last token."""

    waited: float = 0.0
    generated: float = 0.0


@dataclass(frozen=True)
class GenerationResult:
    """One answer.

    token_ids: every token chosen, a closing ``</s>`` and those of a stop sequence included.
    log_probs: the model's own log-probability of each of them, before temperature and filters.
    Either is empty where the engine does not tell them, log_probs where the request can do without.
    finish_reason: ``eos_token`` | ``length`` | ``stop_sequence``.
    input_tokens: how many tokens the encoder read; truncated: whether that was not the whole input.
    top_tokens: of each step the likeliest tokens, where the request asked for them.
    alternatives: the other texts of this prompt, the best first, where several were asked for.
    input_cached: whether the encoder had read this input already, for another request.
    seed: what its sampling began with, where that is known. timing: how long it took. Neither is
    compared.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    input_tokens: int
    truncated: bool = False
    top_tokens: tuple[tuple[TopToken, ...], ...] = ()
    alternatives: tuple[GenerationResult, ...] = ()
    input_cached: bool = field(default=False, compare=False)
    seed: int | None = field(default=None, compare=False)
    timing: Timing = field(default=Timing(), compare=False)


@dataclass(frozen=True)
class TokenEvent:
    """One step of a stream. ``text`` may be empty: a token that only begins a character or word.

    The last event carries the whole ``result``. None: what the engine does not tell, and a
    log-probability that the request can do without.
    ``top_tokens`` as in GenerationResult.
    """

    text: str
    token_id: int | None
    log_prob: float | None
    result: GenerationResult | None = None
    top_tokens: tuple[TopToken, ...] = ()


@dataclass(eq=False)
class SharedEncoding:
    """The encoder's handle of a prompt for the generations that share it.

    users: those that have no row yet; the last one lets the handle go.
    """

    users: int
    handle: Any = None


class Generation:
    """One request on its way through an engine: its prompt, its texts so far, its future.

    The engine's thread alone calls ``append``, ``append_text``, ``finish`` and ``started``; anyone
    may cancel ``future``. forced: tokens that are to be scored, in place of a choice; guide: the
    form that its texts must have. seed: the request's, else what the engine drew for it. log_probs:
    as the request has it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        *,
        truncated: bool = False,
        forced: Sequence[int] = (),
        encoding: SharedEncoding | None = None,
        guide: Guide | None = None,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> None:
        self.parameters = request.parameters
        self.seed = request.parameters.seed
        self.log_probs = request.log_probs
        self.prompt = request.input
        self.bad_words = bad_word_ids(self.parameters.bad_words_list, tokenizer)
        self.prompt_ids = list(prompt_ids)
        self.forced = forced
        self.encoding = encoding
        self.guide = guide
        self.input_cached = False
        self.future: Future[GenerationResult] = Future()
        self.continuation = Continuation(
            request.parameters, tokenizer, streams=on_event is not None
        )
        self._truncated = truncated
        self._on_event = on_event
        self._arrived = perf_counter()
        self._started = self._arrived

    @property
    def rows(self) -> int:
        """Rows that it takes at the same time."""
        return self.parameters.num_beams

    @property
    def token_ids(self) -> list[int]:
        return self.continuation.token_ids

    @property
    def done(self) -> bool:
        """Nothing more to generate: finished, failed, or nobody waits for it any more."""
        return self.future.done()

    def started(self, *, cached: bool = False) -> None:
        """It has its rows now; cached: the encoder had read its prompt already."""
        self._started = perf_counter()
        self.input_cached = cached

    def append(
        self, token_id: int, log_prob: float | None, top_tokens: tuple[TopToken, ...] = ()
    ) -> bool:
        """Take the next token of its one text; True when it was the last one.

        A log-probability of NaN or -inf fails the generation: there was no token to choose. None
        is one that is not told.
        """
        if log_prob is not None and math.isnan(log_prob):
            self.fail(not_a_number())
            return True
        if log_prob == -math.inf:
            self.fail(nothing_left(len(self.token_ids)))
            return True
        self.continuation.append(token_id, log_prob, top_tokens)
        return self._went_on(token_id, log_prob, top_tokens)

    def append_text(self, text: str, *, last: bool) -> bool:
        """Take text from an engine that tells no tokens; True when it was the end."""
        self.continuation.append_text(text, last=last)
        return self._went_on(None, None)

    def _went_on(
        self,
        token_id: int | None,
        log_prob: float | None,
        top_tokens: tuple[TopToken, ...] = (),
    ) -> bool:
        """Tell who listens; True, and resolved, when this was the end."""
        continuation = self.continuation
        if continuation.finish_reason is None:
            if self._on_event is not None:
                text = continuation.unsent()
                self._on_event(TokenEvent(text, token_id, log_prob, None, top_tokens))
            return False
        result = self._result(continuation)
        if self._on_event is not None:
            rest = continuation.rest(result.text)
            self._on_event(TokenEvent(rest, token_id, log_prob, result, top_tokens))
        self._resolve(result)
        return True

    def finish(self, texts: Sequence[Continuation]) -> None:
        """End with several texts, the best first."""
        first, *others = map(self._result, texts)
        self._resolve(replace(first, alternatives=tuple(others)))

    def fail(self, error: BaseException) -> None:
        """End with an error; without effect when already ended."""
        try:
            self.future.set_exception(error)
        except InvalidStateError:
            pass

    def _result(self, continuation: Continuation) -> GenerationResult:
        text = continuation.text()
        assert continuation.finish_reason is not None
        return GenerationResult(
            text=text,
            token_ids=tuple(continuation.token_ids),
            log_probs=tuple(continuation.log_probs),
            finish_reason=continuation.finish_reason,
            input_tokens=len(self.prompt_ids),
            truncated=self._truncated,
            top_tokens=tuple(continuation.top_tokens),
            input_cached=self.input_cached,
            seed=self.seed,
            timing=Timing(self._started - self._arrived, perf_counter() - self._started),
        )

    def _resolve(self, result: GenerationResult) -> None:
        try:
            self.future.set_result(result)
        except InvalidStateError:  # cancelled meanwhile
            pass


def not_a_number() -> RequestError:
    return RequestError(
        "the model computed numbers that are none for this input; set option.dtype to bf16 or "
        "fp32, or check its weights",
        424,
    )


def too_few_texts(wanted: int, found: int) -> RequestError:
    return RequestError(
        f"parameter 'num_return_sequences' asks for {wanted} texts, of the form asked for there "
        f"are only {found}"
    )


def nothing_left(count: int) -> RequestError:
    return RequestError(
        f"the parameters forbid every token after {count}: relax bad_words_list, "
        "no_repeat_ngram_size, min_new_tokens or the text's form, or ask for fewer max_new_tokens"
    )
