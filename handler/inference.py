"""The model as callers have it: texts in, texts out, from any thread."""

from __future__ import annotations

import operator
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from typing import Any, TypeVar

from handler.errors import RequestError, shown
from handler.generation import (
    Generation,
    GenerationRequest,
    GenerationResult,
    ScoreRequest,
    SharedEncoding,
    TokenEvent,
    checked_text,
)
from handler.guided import Guides
from handler.parameter_limits import ParameterLimits, check_limits
from handler.parameters import (
    MAX_SEED,
    GenerationParameters,
    parameters_in_use,
    parse_parameters,
)
from handler.runner import Runner

_T = TypeVar("_T")

# What a stream has besides those of its runner.
SUPPORTED_PARAMETERS = frozenset({"stream"})

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the draws of a request have seeds that differ
_SHORT_TEXT = 32_768  # characters that are tokenized whatever the limit
_CHARACTERS_OF_A_TOKEN = 16  # more than any tokenizer puts into its average token
_LONGEST_TEXT = 500_000  # characters that are tokenized to find out that they make few tokens
_UNSURE_AT_A_CUT = 16  # tokens that may differ from those of the whole text


class Model:
    """A loaded model. Made by ``init_inference``; every method may be called from any thread.

    quality_warning: what is known to spoil its answers, a dtype too small for them, or None.
    As one rank of several it is for the thread alone that loaded it.
    """

    def __init__(
        self, runner: Runner, *, backend: str, max_input_tokens: int, max_output_tokens: int
    ) -> None:
        self.backend = backend
        self.quality_warning = runner.quality_warning
        self.tokenizer = runner.tokenizer
        self.limits = ParameterLimits(max_input_tokens, max_output_tokens, runner.max_rows)
        self._runner = runner
        self._guides = Guides(runner.tokenizer)
        # A model that nobody holds any more frees its engine when all it took is answered.
        weakref.finalize(self, runner.drain).atexit = False

    @property
    def waiting(self) -> int:
        """Prompts that wait for a row."""
        return self._runner.waiting

    @property
    def running(self) -> int:
        """Prompts that are being answered."""
        return self._runner.running

    @property
    def healthy(self) -> bool:
        """Whether requests are answered: not closed, and its engine's thread alive."""
        return self._runner.healthy

    @property
    def pads_prompts(self) -> bool:
        """Whether a batch of prompts takes as long as if all were as long as the longest."""
        return self._runner.pads_prompts

    @property
    def encoder_cache_use(self) -> tuple[int, int]:
        """Prompts that were found in the cache of encoded prompts, and those that were not."""
        return self._runner.encoder_cache_use

    def pipeline_generate(self, inputs: list[str], **parameters: Any) -> list[str]:
        """Answer texts with one set of parameters, as FasterTransformer's method of this name.

        Of several texts of an input the best. Raises RequestError.
        """
        if isinstance(inputs, str):
            raise RequestError(f"inputs must be a list of strings, got {shown(inputs)}")
        parsed = parse_parameters(parameters, self.limits)
        requests = [GenerationRequest(text, parsed, log_probs=False) for text in inputs]
        texts = [result.text for result in self.generate(requests)]
        return list(map(operator.add, inputs, texts)) if parsed.return_full_text else texts

    def generate(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        """Answer requests, each with its own parameters, in their order. Raises RequestError."""
        futures = self.submit(requests)
        self.run_submitted()
        try:
            return [future.result() for future in futures]
        finally:  # when one fails, the others need not go on
            for future in futures:
                future.cancel()

    def stream_generate(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        """The answer token by token; the last event carries the result.

        Closing the iterator cancels the request. Raises RequestError.
        """
        events: queue.SimpleQueue[TokenEvent | None] = queue.SimpleQueue()
        future = self.submit_stream(request, events.put)
        stream = _stream(events, future)
        # A generator that was never begun runs none of its code when it is closed.
        weakref.finalize(stream, future.cancel)
        return stream

    def submit_stream(
        self, request: GenerationRequest, on_event: Callable[[TokenEvent | None], None]
    ) -> Future[GenerationResult]:
        """Queue a request without waiting; cancelling the future frees its row.

        on_event: called by the engine's thread with each token, and with None at the end, which
        is all that comes where the generation fails; the future tells why. Raises RequestError.
        """
        p = request.parameters
        if p.num_beams > 1:
            raise RequestError(
                f"a stream needs num_beams 1 (beams change their beginnings), got {p.num_beams}"
            )
        if p.num_return_sequences > 1:
            raise RequestError(
                f"a stream has one text, got num_return_sequences {p.num_return_sequences}"
            )
        (generation,) = self._generations(request, on_event=on_event)
        generation.future.add_done_callback(lambda _: on_event(None))
        self._runner.submit([generation])
        self.run_submitted()
        return generation.future

    def score(self, requests: list[ScoreRequest]) -> list[list[GenerationResult]]:
        """For each request and each of its targets, in their order: the target's tokens with their
        log-probabilities. Raises RequestError."""
        futures = self.submit(requests)
        self.run_submitted()
        try:
            results = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        return [[result, *result.alternatives] for result in results]

    def submit(
        self, requests: Sequence[GenerationRequest | ScoreRequest]
    ) -> list[Future[GenerationResult]]:
        """Queue requests without waiting; cancelling a future frees its rows at the next step.

        What a ScoreRequest's further targets came to are its result's alternatives.
        ``run_submitted`` must follow, once for all that was submitted. Raises RequestError, and
        then none was queued; one that is to blame is named by its index.
        """
        self._runner.check_room(sum(map(_texts_of, requests)))  # before all of them are made
        generations = []
        for index, request in enumerate(requests):
            try:
                generations.append(self._generations(request))
            except RequestError as error:
                raise (error if len(requests) == 1 else error.at(f"inputs[{index}]")) from None
        self._runner.submit([one for several in generations for one in several])
        return [
            _joined([g.future for g in several], ranked=isinstance(request, GenerationRequest))
            for request, several in zip(requests, generations)
        ]

    def new_seed(self) -> int | None:
        """For a request that gives none; None where the engine draws one for several of them."""
        return None if self._runner.draws_seeds else self._runner.new_seed()

    def run_submitted(self) -> None:
        """See Runner."""
        self._runner.run_submitted()

    def when_ended(self, action: Callable[[str], None]) -> None:
        """Call this with the reason, from any thread, should the engine be unable to go on; what
        was asked of it has been answered so then."""
        self._runner.when_ended(action)

    @property
    def answers_are_shared(self) -> bool:
        """See Runner."""
        return self._runner.answers_are_shared

    def on_all_ranks(self, answer: Callable[[], _T]) -> _T:
        """See Runner."""
        return self._runner.on_all_ranks(answer)

    def close(self) -> None:
        """Finish what runs, refuse what waits, free the engine."""
        self._runner.close()

    def _generations(
        self,
        request: GenerationRequest | ScoreRequest,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> list[Generation]:
        """One for each text that is wanted; beams are several texts of one generation."""
        request = self._within_limits(request)
        self._check_supported(request, streams=on_event is not None)
        text = checked_text(request.input, "the input")
        ids, is_whole = _encoded(text, self.limits.max_input_tokens, self.tokenizer.encode)
        kept = self._truncated(ids, is_whole, request.parameters.truncate)
        if isinstance(request, ScoreRequest):
            wanted = [self._target(request, i) for i in range(len(request.targets))]
        else:
            wanted = [(one, ()) for one in self._single_draws(request)]
        encoding = SharedEncoding(len(wanted)) if len(wanted) > 1 else None
        return [
            Generation(
                one,
                kept,
                self.tokenizer,
                truncated=len(kept) < len(ids),
                forced=forced,
                encoding=encoding,
                guide=self._guides.of(one.parameters),
                on_event=on_event,
            )
            for one, forced in wanted
        ]

    def _single_draws(self, request: GenerationRequest) -> list[GenerationRequest]:
        """Where several texts are drawn, a request for each, with a seed of its own, and with the
        log-probabilities by which they are ranked."""
        p = request.parameters
        if p.num_return_sequences == 1 or p.num_beams > 1:
            return [request]
        seed = self._runner.new_seed() if p.seed is None else p.seed
        return [
            GenerationRequest(
                request.input,
                replace(p, num_return_sequences=1, seed=(seed + i * _SEED_STRIDE) % (MAX_SEED + 1)),
            )
            for i in range(p.num_return_sequences)
        ]

    def _within_limits(
        self, request: GenerationRequest | ScoreRequest
    ) -> GenerationRequest | ScoreRequest:
        """The request, where it left max_new_tokens alone with as many as are allowed."""
        most, p = self.limits.max_output_tokens, request.parameters
        if most < p.max_new_tokens == GenerationParameters.max_new_tokens:
            return replace(request, parameters=replace(p, max_new_tokens=most))
        return request

    def _check_supported(self, request: GenerationRequest | ScoreRequest, streams: bool) -> None:
        parameters = request.parameters
        check_limits(parameters, self.limits)
        if isinstance(request, ScoreRequest) and not self._runner.scores:
            raise RequestError(
                f"backend {self.backend} scores no given texts; set option.backend=onnxruntime or "
                "transformers"
            )
        honoured = self._runner.supported_parameters
        if streams:
            honoured |= SUPPORTED_PARAMETERS
        if parameters.num_beams == 1:  # several draws are several generations
            honoured |= {"num_return_sequences"}
        for name in parameters_in_use(parameters):
            if name not in honoured:
                raise RequestError(
                    f"parameter {name!r} is not supported by backend {self.backend}; leave it out "
                    "or choose a backend that has it (option.backend)"
                )

    def _target(
        self, request: ScoreRequest, index: int
    ) -> tuple[GenerationRequest, tuple[int, ...]]:
        """The target as tokens, ``</s>`` included, and the parameters of reading just these."""
        place = f"{request.field}[{index}]"
        text = checked_text(request.targets[index], place)
        limit, encode = self.limits.max_output_tokens, self.tokenizer.encode_target
        ids, is_whole = _encoded(text, limit, encode)
        if not is_whole or len(ids) > limit:
            raise RequestError(
                f"{place} has {'' if is_whole else 'more than '}{len(ids)} tokens, allowed are "
                f"{limit} (option.max_output_tokens)"
            )
        if self.tokenizer.unk_token_id in ids or self.tokenizer.eos_token_id in ids[:-1]:
            raise RequestError(f"{place}: this model's vocabulary cannot write {shown(text)}")
        parameters = GenerationParameters(
            max_new_tokens=len(ids),
            ignore_eos_token=True,
            top_n_tokens=request.parameters.top_n_tokens,
        )
        return GenerationRequest(request.input, parameters), tuple(ids)

    def _truncated(self, ids: list[int], is_whole: bool, truncate: bool | int) -> list[int]:
        """``ids`` cut to the limit where the request allows it, its closing token kept."""
        limit = self.limits.max_input_tokens
        if truncate is not True and truncate is not False:
            limit = truncate
        if len(ids) <= limit:
            return ids
        if truncate is False:
            raise RequestError(
                f"the input has {'' if is_whole else 'more than '}{len(ids)} tokens, allowed are "
                f"{limit} (option.max_input_tokens); shorten it or send the parameter truncate"
            )
        return [*ids[: limit - 1], ids[-1]]


def _encoded(text: str, limit: int, encode: Callable[[str], list[int]]) -> tuple[list[int], bool]:
    """The text's ids; of one far longer than ``limit`` only the beginning's, and False.

    Tokenizing all of a body of megabytes takes gigabytes of memory, only to refuse it.
    """
    length = max(_SHORT_TEXT, _CHARACTERS_OF_A_TOKEN * limit)
    while length < len(text):
        end = text.rfind(" ", 0, length)
        ids = encode(text[: end if end > 0 else length])
        if len(ids) > limit + _UNSURE_AT_A_CUT:
            return ids, False
        if length > _LONGEST_TEXT:  # blanks, or others of which tokenizers make nothing
            raise RequestError(
                f"the input has {len(text)} characters, of which the first {length} make only "
                f"{len(ids)} tokens; leave out what is no text"
            )
        length *= 2
    return encode(text), True


def _stream(
    events: queue.SimpleQueue[TokenEvent | None], future: Future[GenerationResult]
) -> Iterator[TokenEvent]:
    try:
        while True:
            event = events.get()
            if event is None:  # ended without a last token: failed or cancelled
                future.result()
                return
            yield event
            if event.result is not None:
                return
    finally:
        future.cancel()


def _joined(
    futures: Sequence[Future[GenerationResult]], *, ranked: bool
) -> Future[GenerationResult]:
    """One future: the first one's result, the others' as its alternatives; the first error.

    ranked: the likeliest by token first, else in their order.
    """
    if len(futures) == 1:
        return futures[0]
    whole: Future[GenerationResult] = Future()
    left = len(futures)
    lock = threading.Lock()

    def one_is_done(future: Future[GenerationResult]) -> None:
        nonlocal left
        with lock:
            left -= 1
        try:
            if future.cancelled():
                whole.cancel()
            elif future.exception() is not None:
                whole.set_exception(future.exception())
            elif left == 0 and not any(f.cancelled() for f in futures):
                results = [f.result() for f in futures]
                if ranked:
                    results.sort(key=_mean_log_prob, reverse=True)
                first, *others = results
                whole.set_result(replace(first, alternatives=tuple(others)))
        except InvalidStateError:  # cancelled meanwhile, or failed
            pass

    def cancel_all(_: Future[GenerationResult]) -> None:
        for future in futures:
            future.cancel()

    whole.add_done_callback(cancel_all)
    for future in futures:
        future.add_done_callback(one_is_done)
    return whole


def _mean_log_prob(result: GenerationResult) -> float:
    return sum(result.log_probs) / max(1, len(result.log_probs))


def _texts_of(request: GenerationRequest | ScoreRequest) -> int:
    """How many generations it becomes."""
    if isinstance(request, ScoreRequest):
        return len(request.targets)
    return request.parameters.num_return_sequences if request.parameters.num_beams == 1 else 1
