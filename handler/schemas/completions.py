"""OpenAI's completions: requests with ``prompt``. Defaults are OpenAI's: 16 tokens, sampled.

https://developers.openai.com/api/reference/resources/completions
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.continuation import TopToken
from handler.errors import RequestError, shown
from handler.generation import GenerationResult, TokenEvent, checked_text
from handler.parameter_checks import Refused, boolean, integer
from handler.parameters import parse_parameters
from handler.schemas.inputs import check_fields, request_of
from handler.schemas.protocol import Deployment, ParsedRequest, StreamWriter
from handler.schemas.records import (
    EVENT_STREAM,
    check_finite,
    is_special,
    log_probs_of,
    server_sent_event,
    text_alone,
    token_texts,
)
from handler.tokenizer import Tokenizer

_MAX_TOKENS = 16
_MOST_LOGPROBS = 5
_LOWEST_SEED = -(2**63)

# Passed on as they are: our table has the same names for them.
_SAME = ("max_tokens", "temperature", "top_p", "stop", "seed", "stream")
_SAME_PENALTIES = ("presence_penalty", "frequency_penalty")
# Parameters of ours that OpenAI has no word for; its clients send them as extra fields.
_OURS = (
    *("min_new_tokens", "top_k", "typical_p", "num_beams", "length_penalty", "early_stopping"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_list", "truncate"),
    *("ignore_eos_token", "regex", "guided_regex", "guided_choice"),
)
# Not supported, so they must ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",), "logit_bias": ({},)}
_OTHERS = ("prompt", "n", "best_of", "logprobs", "stream_options", "model", "user")
_FIELDS = (*_OTHERS, *_SAME, *_SAME_PENALTIES, *_OFF, *_OURS)

# What errors of the layers below call ours.
_THEIR_NAMES = {
    "num_return_sequences": "n",
    "max_new_tokens": "max_tokens",
    "top_n_tokens": "logprobs",
    "stop_sequences": "stop",
}
_ERROR_CODES = {424: "engine_failed", 503: "overloaded", 504: "timeout", 507: "out_of_memory"}

Json = dict[str, Any]


@dataclass(frozen=True)
class CompletionRequest(ParsedRequest):
    """What a completions request has besides. n: choices wanted for a prompt."""

    model: str = ""
    n: int = 1
    logprobs: int | None = None
    include_usage: bool = False


class Completions:
    """See Schema."""

    def parse(self, body: Mapping[str, Any], deployment: Deployment) -> CompletionRequest:
        check_fields(body, _FIELDS)
        for name, off in _OFF.items():
            if body.get(name) is not None and body[name] not in off:
                raise RequestError(f"parameter {name!r} is not supported; leave it out")
        prompt = body.get("prompt")
        n = _checked(body, "n", integer(1), 1)
        best_of = _checked(body, "best_of", integer(1), n)
        if best_of < n:
            raise RequestError(f"parameter 'best_of' must be at least n ({n}), got {best_of}")
        model, _ = _name(body, "model"), _name(body, "user")
        logprobs = _checked(body, "logprobs", integer(0, _MOST_LOGPROBS), None)
        raw = _raw_parameters(body, deployment)
        raw.update(n=best_of, top_n_tokens=logprobs)
        request = request_of(
            inputs=_texts(prompt),
            is_list=isinstance(prompt, list),
            parameters=parse_parameters(raw, deployment.limits),
            log_probs=logprobs is not None,
            template=deployment.prompt_template,
            variables={},
            new_seed=deployment.new_seed,
        )
        return CompletionRequest(
            **vars(request),
            model=model or deployment.model_name,
            n=n,
            logprobs=logprobs,
            include_usage=_includes_usage(body),
        )

    def answer(
        self, request: ParsedRequest, results: Sequence[GenerationResult], tokenizer: Tokenizer
    ) -> Json:
        assert isinstance(request, CompletionRequest)
        chosen = [result for each in results for result in _best(each, request.n)]
        choices = [
            {
                "index": index,
                "text": result.text,
                "logprobs": None if request.logprobs is None else _logprobs(result, tokenizer),
                "finish_reason": _finish_reason(result),
            }
            for index, result in enumerate(chosen)
        ]
        return {**_head(request), "choices": choices, "usage": _usage(results)}

    def stream(self, request: ParsedRequest, tokenizer: Tokenizer, accept: str) -> StreamWriter:
        """Always server-sent events: OpenAI's clients ask for them with ``stream`` alone."""
        assert isinstance(request, CompletionRequest)
        return _CompletionEvents(request, tokenizer)

    def worded(self, error: RequestError) -> RequestError:
        message = re.sub(r"^inputs\[", "prompt[", str(error))
        message = re.sub(
            r"^parameter '(\w+)'", lambda m: f"parameter '{_THEIR_NAMES.get(m[1], m[1])}'", message
        )
        return RequestError(message, error.code)

    def error(self, error: RequestError) -> Json:
        message = str(self.worded(error))
        named = re.match(
            r"(?:the field|parameter|unknown field|unknown parameter) '(\w+)'", message
        )
        kind = "invalid_request_error" if error.code == 400 else "server_error"
        param = named.group(1) if named else None
        return openai_error(message, kind, param, _ERROR_CODES.get(error.code))


def openai_error(
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> Json:
    """An error's body as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _texts(prompt: Any) -> tuple[str, ...]:
    if prompt is None:
        raise RequestError("the field 'prompt' is missing, expected a string or a list of strings")
    if isinstance(prompt, str):
        return (checked_text(prompt, "prompt"),)
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            f"the field 'prompt' must be a string or a list of strings, got {shown(prompt)}"
        )
    if all(isinstance(item, (int, list)) for item in prompt):
        raise RequestError(
            "the field 'prompt' holds token ids, which are another tokenizer's; send the text"
        )
    return tuple(checked_text(text, f"prompt[{i}]") for i, text in enumerate(prompt))


def _raw_parameters(body: Mapping[str, Any], deployment: Deployment) -> Json:
    """The request's parameters in the words of our table, with OpenAI's defaults."""
    named = (*_SAME, *_SAME_PENALTIES, *_OURS)
    raw: Json = {name: body[name] for name in named if body.get(name) is not None}
    raw.setdefault("max_tokens", min(_MAX_TOKENS, deployment.limits.max_output_tokens))
    raw["do_sample"] = "temperature" in raw or raw.get("num_beams", 1) == 1
    if raw.get("top_p") == 0 and type(raw["top_p"]) is not bool:
        raw.update(top_p=1.0, temperature=0)  # its best token only; our 0 is off
    seed = raw.get("seed")
    if type(seed) is int and _LOWEST_SEED <= seed < 0:
        raw["seed"] = seed % 2**64
    return raw


def _checked(body: Mapping[str, Any], name: str, check: Callable[[Any], Any], default: Any) -> Any:
    if body.get(name) is None:
        return default
    try:
        return check(body[name])
    except Refused as refused:
        raise RequestError(
            f"parameter {name!r} must be {refused}, got {shown(body[name])}"
        ) from None


def _name(body: Mapping[str, Any], field: str) -> str | None:
    value = body.get(field)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"the field {field!r} must be a string, got {shown(value)}")
    return checked_text(value, field) if value else value


def _includes_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RequestError(f"the field 'stream_options' must be an object, got {shown(options)}")
    if body.get("stream") is not True:
        raise RequestError("the field 'stream_options' is for a stream; leave it out")
    check_fields(options, ("include_usage", "include_obfuscation"))
    if _checked(options, "include_obfuscation", boolean, False):
        raise RequestError("parameter 'include_obfuscation' is not supported; leave it out")
    return bool(_checked(options, "include_usage", boolean, False))


def _best(result: GenerationResult, n: int) -> list[GenerationResult]:
    """The n sequences of the highest log-probability a token, where there are more."""
    every = [result, *result.alternatives]
    if len(every) > n:
        every.sort(key=lambda r: sum(r.log_probs) / max(1, len(r.log_probs)), reverse=True)
    return every[:n]


def _head(request: CompletionRequest) -> Json:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
    }


def _usage(results: Sequence[GenerationResult]) -> Json:
    """Tokens read and generated; those of candidates that best_of dropped, too."""
    prompt = sum(result.input_tokens for result in results)
    completion = sum(
        len(sequence.token_ids) for result in results for sequence in (result, *result.alternatives)
    )
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _finish_reason(result: GenerationResult) -> str:
    return "length" if result.finish_reason == "length" else "stop"


def _logprobs(result: GenerationResult, tokenizer: Tokenizer) -> Json:
    """Of every token, those of a stop sequence and ``</s>`` included."""
    check_finite(result)
    texts = list(token_texts(result.token_ids, tokenizer))
    tops = result.top_tokens or ((),) * len(texts)
    tokens = [
        _token(token_id, log_prob, text, top, tokenizer)
        for token_id, log_prob, text, top in zip(
            result.token_ids, log_probs_of(result), texts, tops
        )
    ]
    return _columns(tokens, _offsets(texts))


def _token(
    token_id: int | None,
    log_prob: float | None,
    text: str,
    tops: Sequence[TopToken],
    tokenizer: Tokenizer,
) -> tuple[str, float | None, dict[str, float | None] | None]:
    """Its text (a special token's name), its log-probability, and those of the likeliest, itself
    among them."""
    special = token_id is not None and is_special(token_id, tokenizer)
    name = text_alone(token_id, tokenizer) if token_id is not None and special else text
    others = {text_alone(t.token_id, tokenizer): t.log_prob for t in tops if t.token_id != token_id}
    return name, log_prob, {name: log_prob, **others} if tops else None


def _columns(
    tokens: Sequence[tuple[str, float | None, dict[str, float | None] | None]],
    offsets: Iterable[int],
) -> Json:
    tops = [top for _, _, top in tokens if top is not None]
    return {
        "tokens": [name for name, _, _ in tokens],
        "token_logprobs": [log_prob for _, log_prob, _ in tokens],
        "top_logprobs": tops or None,
        "text_offset": list(offsets),
    }


def _offsets(texts: Sequence[str]) -> Iterator[int]:
    """Characters of the text before each token."""
    offset = 0
    for text in texts:
        yield offset
        offset += len(text)


class _CompletionEvents:
    """See StreamWriter; ``data: [DONE]`` ends a stream."""

    media_type = EVENT_STREAM

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._head = _head(request)
        self._offset = 0

    def token(self, event: TokenEvent) -> bytes:
        check_finite(event)
        choice = {
            "index": 0,
            "text": event.text,
            "logprobs": None if self._request.logprobs is None else self._logprobs(event),
            "finish_reason": None if event.result is None else _finish_reason(event.result),
        }
        self._offset += len(event.text)
        written = self._event([choice], usage=None)
        if event.result is None:
            return written
        if self._request.include_usage:
            written += self._event([], usage=_usage([event.result]))
        return written + b"data: [DONE]\n\n"

    def _event(self, choices: list[Json], usage: Json | None) -> bytes:
        record = {**self._head, "choices": choices}
        return server_sent_event(
            {**record, "usage": usage} if self._request.include_usage else record
        )

    def _logprobs(self, event: TokenEvent) -> Json:
        token = _token(
            event.token_id, event.log_prob, event.text, event.top_tokens, self._tokenizer
        )
        return _columns([token], [self._offset])

    def error(self, error: RequestError) -> bytes:
        return server_sent_event(Completions().error(error))
