"""The schemas of requests with ``inputs``: outputs (the article's), LMI's and TGI's.

Field names are those of djl_python's output_formatter (LMI), and of text-generation-inference's
OpenAPI document and huggingface_hub's classes (TGI). Beside these every ``details`` has
``input_tokens``, ``truncated``, ``cumulative_log_prob``, ``input_cached`` and ``timing``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional

from handler.continuation import TopToken
from handler.errors import RequestError
from handler.generation import GenerationRequest, GenerationResult, ScoreRequest, TokenEvent
from handler.schemas.inputs import parse_inputs
from handler.schemas.protocol import Deployment, ParsedRequest, StreamWriter
from handler.schemas.records import (
    EVENT_STREAM,
    JSON_LINES,
    accepts,
    check_finite,
    is_special,
    json_line,
    lmi_error,
    log_probs_of,
    server_sent_event,
    text_alone,
    token_texts,
    vocabulary_token,
)
from handler.tokenizer import Tokenizer

_TGI_ERROR_TYPES = {400: "validation", 503: "overloaded", 504: "incomplete_generation"}

Json = dict[str, Any]
# id, text, log-probability, whether it is a special token -> how the schema writes it
WriteToken = Callable[[int, str, Optional[float], bool], Json]


def _full_text(request: ParsedRequest, text: str, result: GenerationResult) -> str:
    return text + result.text if request.parameters.return_full_text else result.text


def _seed(prompt: GenerationRequest | ScoreRequest, result: GenerationResult) -> int | None:
    """The prompt's, else what the engine drew for it."""
    return result.seed if prompt.parameters.seed is None else prompt.parameters.seed


def _common_details(result: GenerationResult) -> Json:
    return {
        "finish_reason": result.finish_reason,
        "generated_tokens": len(result.token_ids),
        "input_tokens": result.input_tokens,
        "truncated": result.truncated,
        "cumulative_log_prob": sum(result.log_probs) if result.log_probs else None,
        "input_cached": result.input_cached,
        "timing": {
            "waited_ms": round(1e3 * result.timing.waited, 3),
            "generated_ms": round(1e3 * result.timing.generated, 3),
        },
    }


def _tgi_error(error: RequestError) -> Json:
    """Clients raise an exception of their own by ``error_type``."""
    return {**lmi_error(error), "error_type": _TGI_ERROR_TYPES.get(error.code, "generation")}


class _InputsSchema:
    """The request, and the stream: LMI's JSON lines unless TGI's events are accepted."""

    def parse(self, body: Mapping[str, Any], deployment: Deployment) -> ParsedRequest:
        return parse_inputs(body, deployment)

    def stream(self, request: ParsedRequest, tokenizer: Tokenizer, accept: str) -> StreamWriter:
        if accepts(accept, EVENT_STREAM):
            return TgiEvents(request, tokenizer)
        return LmiLines(request, tokenizer)

    def worded(self, error: RequestError) -> RequestError:
        return error

    def error(self, error: RequestError) -> Json:
        return lmi_error(error)


class Outputs(_InputsSchema):
    """``{"outputs": [...]}``, the texts of the first input first."""

    def answer(
        self, request: ParsedRequest, results: Sequence[GenerationResult], tokenizer: Tokenizer
    ) -> Json:
        each = [
            (text, sequence)
            for text, result in zip(request.inputs, results)
            for sequence in (result, *result.alternatives)
        ]
        body: Json = {"outputs": [_full_text(request, text, result) for text, result in each]}
        if request.parameters.wants_details:
            body["details"] = [self._details(result, tokenizer) for _, result in each]
        return body

    def _details(self, result: GenerationResult, tokenizer: Tokenizer) -> Json:
        """Tokens as the vocabulary writes them."""
        check_finite(result)

        def token(token_id: int, log_prob: float | None) -> Json:
            return vocabulary_token(token_id, log_prob, tokenizer)

        details = _common_details(result)
        details["tokens"] = list(map(token, result.token_ids, log_probs_of(result)))
        if result.top_tokens:
            details["top_tokens"] = [
                [token(top.token_id, top.log_prob) for top in tops] for tops in result.top_tokens
            ]
        return details


class _GeneratedText(_InputsSchema):
    """``{"generated_text", "details"}`` for an input; further sequences are in its details."""

    def answer(
        self, request: ParsedRequest, results: Sequence[GenerationResult], tokenizer: Tokenizer
    ) -> Any:
        items = [
            self._item(request, text, _seed(prompt, result), result, tokenizer)
            for text, prompt, result in zip(request.inputs, request.prompts, results)
        ]
        return items if request.is_list or self._always_a_list else items[0]

    _always_a_list = False

    def _item(
        self,
        request: ParsedRequest,
        text: str,
        seed: int | None,
        result: GenerationResult,
        tokenizer: Tokenizer,
    ) -> Json:
        item: Json = {"generated_text": _full_text(request, text, result)}
        if request.parameters.wants_details or result.alternatives:
            details = self._details(text, seed, result, tokenizer)
            if result.alternatives:
                details["best_of_sequences"] = [
                    {
                        "generated_text": _full_text(request, text, other),
                        **self._details(text, None, other, tokenizer),
                    }
                    for other in result.alternatives
                ]
            item["details"] = details
        return item

    def _details(
        self, text: str, seed: int | None, result: GenerationResult, tokenizer: Tokenizer
    ) -> Json:
        """seed: the prompt's; None for its further sequences, whose seeds follow from it."""
        raise NotImplementedError


class Lmi(_GeneratedText):
    """LMI's: one object, or a list of them for a list of inputs."""

    def _details(
        self, text: str, seed: int | None, result: GenerationResult, tokenizer: Tokenizer
    ) -> Json:
        details = {**_common_details(result), "inputs": text}
        return {**details, **_tokens(result, tokenizer, _lmi_token)}


class TgiGenerate(_GeneratedText):
    """TGI's own route ``/generate``: one object."""

    def stream(self, request: ParsedRequest, tokenizer: Tokenizer, accept: str) -> StreamWriter:
        if accepts(accept, JSON_LINES):
            return LmiLines(request, tokenizer)
        return TgiEvents(request, tokenizer)

    def error(self, error: RequestError) -> Json:
        return _tgi_error(error)

    def _details(
        self, text: str, seed: int | None, result: GenerationResult, tokenizer: Tokenizer
    ) -> Json:
        details = {**_common_details(result), "seed": seed, "prefill": []}
        return {**details, **_tokens(result, tokenizer, _tgi_token)}


class Tgi(TgiGenerate):
    """TGI's everywhere else: the same in a list."""

    _always_a_list = True


def _lmi_token(token_id: int | None, text: str, log_prob: float | None, special: bool) -> Json:
    token = {"id": token_id, "text": text, "log_prob": log_prob}
    return {**token, "special_token": True} if special else token


def _tgi_token(token_id: int | None, text: str, log_prob: float | None, special: bool) -> Json:
    return {"id": token_id, "text": text, "logprob": log_prob, "special": special}


def _tokens(result: GenerationResult, tokenizer: Tokenizer, token: WriteToken) -> Json:
    """``tokens``, whose texts join to the generated text, and ``top_tokens`` where there are."""
    check_finite(result)
    texts = token_texts(result.token_ids, tokenizer)
    tokens = [
        token(token_id, text, log_prob, is_special(token_id, tokenizer))
        for token_id, text, log_prob in zip(result.token_ids, texts, log_probs_of(result))
    ]
    if not result.top_tokens:
        return {"tokens": tokens}
    return {
        "tokens": tokens,
        "top_tokens": [list(_top(tops, tokenizer, token)) for tops in result.top_tokens],
    }


def _top(tops: Sequence[TopToken], tokenizer: Tokenizer, token: WriteToken) -> Iterator[Json]:
    for top in tops:
        special = is_special(top.token_id, tokenizer)
        yield token(top.token_id, text_alone(top.token_id, tokenizer), top.log_prob, special)


class LmiLines:
    """LMI's JSON lines: ``{"token": {...}}``, the last with ``generated_text`` and ``details``."""

    media_type = JSON_LINES

    def __init__(self, request: ParsedRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer

    def token(self, event: TokenEvent) -> bytes:
        check_finite(event)
        special = is_special(event.token_id, self._tokenizer)
        record: Json = {"token": _lmi_token(event.token_id, event.text, event.log_prob, special)}
        if event.top_tokens:
            record["top_tokens"] = list(_top(event.top_tokens, self._tokenizer, _lmi_token))
        if event.result is not None:
            (text,) = self._request.inputs
            record["generated_text"] = _full_text(self._request, text, event.result)
            if self._request.parameters.wants_details:
                record["details"] = {**_common_details(event.result), "inputs": text}
        return json_line(record)

    def error(self, error: RequestError) -> bytes:
        return json_line(lmi_error(error))


class TgiEvents:
    """TGI's server-sent events, as its ``/generate_stream`` sends them."""

    media_type = EVENT_STREAM

    def __init__(self, request: ParsedRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._index = 0

    def token(self, event: TokenEvent) -> bytes:
        check_finite(event)
        self._index += 1
        special = is_special(event.token_id, self._tokenizer)
        record: Json = {
            "index": self._index,
            "token": _tgi_token(event.token_id, event.text, event.log_prob, special),
            "generated_text": None,
            "details": None,
        }
        if event.top_tokens:
            record["top_tokens"] = list(_top(event.top_tokens, self._tokenizer, _tgi_token))
        if event.result is not None:
            (text,) = self._request.inputs
            record["generated_text"] = _full_text(self._request, text, event.result)
            if self._request.parameters.wants_details:
                record["details"] = self._details(event.result)
        return server_sent_event(record)

    def _details(self, result: GenerationResult) -> Json:
        (prompt,) = self._request.prompts
        return {
            **_common_details(result),
            "seed": _seed(prompt, result),
            "input_length": result.input_tokens,
        }

    def error(self, error: RequestError) -> bytes:
        return server_sent_event(_tgi_error(error))
