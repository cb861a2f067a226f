"""The model as callers have it: texts in, texts out, from any thread."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from handler.errors import RequestError, shown
from handler.generation import (
    Generation,
    GenerationRequest,
    GenerationResult,
    TokenEvent,
    checked_text,
)
from handler.parameters import (
    ParameterLimits,
    check_limits,
    parameters_in_use,
    parse_parameters,
)
from handler.runner import Runner

_SHORT_TEXT = 32_768  # characters that are tokenized whatever the limit
_CHARACTERS_OF_A_TOKEN = 16  # more than any tokenizer puts into its average token
_UNSURE_AT_A_CUT = 16  # tokens that may differ from those of the whole text


class Model:
    """A loaded model. Made by ``init_inference``; every method may be called from any thread."""

    def __init__(
        self, runner: Runner, *, backend: str, max_input_tokens: int, max_output_tokens: int
    ) -> None:
        self.backend = backend
        self.tokenizer = runner.tokenizer
        self.limits = ParameterLimits(max_input_tokens, max_output_tokens, runner.max_rows)
        self._runner = runner

    @property
    def waiting(self) -> int:
        """Prompts that wait for a row."""
        return self._runner.waiting

    @property
    def running(self) -> int:
        """Prompts that are being answered."""
        return self._runner.running

    def pipeline_generate(self, inputs: list[str], **parameters: Any) -> list[str]:
        """Answer texts with one set of parameters, as FasterTransformer's method of this name.

        Raises RequestError.
        """
        if isinstance(inputs, str):
            raise RequestError(f"inputs must be a list of strings, got {shown(inputs)}")
        parsed = parse_parameters(parameters, self.limits)
        results = self.generate([GenerationRequest(text, parsed) for text in inputs])
        return [result.text for result in results]

    def generate(self, requests: list[GenerationRequest]) -> list[GenerationResult]:
        """Answer requests, each with its own parameters, in their order. Raises RequestError."""
        futures = self.submit(requests)
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
        if request.parameters.num_beams > 1:
            raise RequestError(
                "a stream needs num_beams 1 (beams change their beginnings), got "
                f"{request.parameters.num_beams}"
            )
        generation = self._generation(request, on_event=events.put)
        generation.future.add_done_callback(lambda _: events.put(None))
        self._runner.submit([generation])
        stream = _stream(events, generation.future)
        # A generator that was never begun runs none of its code when it is closed.
        weakref.finalize(stream, generation.future.cancel)
        return stream

    def submit(self, requests: Sequence[GenerationRequest]) -> list[Future[GenerationResult]]:
        """Queue requests without waiting; cancelling a future frees its row at the next step.

        Raises RequestError, and then none was queued; one that is to blame is named by its index.
        """
        self._runner.check_room(len(requests))
        generations = []
        for index, request in enumerate(requests):
            try:
                generations.append(self._generation(request))
            except RequestError as error:
                raise (error if len(requests) == 1 else error.at(f"inputs[{index}]")) from None
        self._runner.submit(generations)
        return [generation.future for generation in generations]

    def close(self) -> None:
        """Finish what runs, refuse what waits, free the engine."""
        self._runner.close()

    def _generation(
        self,
        request: GenerationRequest,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> Generation:
        parameters = request.parameters
        check_limits(parameters, self.limits)
        honoured = self._runner.supported_parameters | ({"stream"} if on_event else set())
        for name in parameters_in_use(parameters):
            if name not in honoured:
                raise RequestError(
                    f"parameter {name!r} is not supported by backend {self.backend}; leave it out "
                    "or choose a backend that has it (option.backend)"
                )
        ids, is_whole = self._encoded(checked_text(request.input, "the input"))
        kept = self._truncated(ids, is_whole, parameters.truncate)
        return Generation(
            request, kept, self.tokenizer, truncated=len(kept) < len(ids), on_event=on_event
        )

    def _encoded(self, text: str) -> tuple[list[int], bool]:
        """The text's ids; of one far too long only the beginning's, and False.

        Tokenizing all of a body of megabytes takes gigabytes of memory, only to refuse it.
        """
        limit = self.limits.max_input_tokens
        length = max(_SHORT_TEXT, _CHARACTERS_OF_A_TOKEN * limit)
        while length < len(text):
            end = text.rfind(" ", 0, length)
            ids = self.tokenizer.encode(text[: end if end > 0 else length])
            if len(ids) > limit + _UNSURE_AT_A_CUT:
                return ids, False
            length *= 2
        return self.tokenizer.encode(text), True

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
