"""What goes back: results and errors -> the body a client expects -> djl's Output."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from handler.errors import RequestError, one_line
from handler.generation import GenerationResult
from handler.request_parsing import ParsedRequest
from handler.tokenizer import Tokenizer

if TYPE_CHECKING:
    from djl_python.outputs import Output

_JSON = "application/json"
# Seconds after which a client that met a full queue may try again.
_RETRY_AFTER = "1"


@dataclass(frozen=True)
class Reply:
    """An HTTP answer, whoever sends it."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": _JSON})


def reply(
    request: ParsedRequest,
    results: Sequence[GenerationResult],
    schema: str,
    tokenizer: Tokenizer,
) -> Reply:
    """Answer ``request`` in ``schema``: outputs | lmi | tgi. Texts keep the order of the inputs.

    Raises RequestError for results that JSON cannot tell.
    """
    p = request.parameters
    texts = [
        prompt + result.text if p.return_full_text else result.text
        for prompt, result in zip(request.inputs, results)
    ]
    details = (
        [_details(result, tokenizer) for result in results]
        if p.details or p.return_log_probs
        else None
    )
    body: Any
    if schema == "outputs":
        body = {"outputs": texts} if details is None else {"outputs": texts, "details": details}
    else:
        body = [{"generated_text": text} for text in texts]
        for item, detail in zip(body, details or ()):
            item["details"] = detail
        if schema == "lmi" and not request.is_list:
            body = body[0]
    return Reply(_json(body))


def error_reply(error: Exception) -> Reply:
    """The answer to a request that failed. An error that is not a RequestError is a 424."""
    code = error.code if isinstance(error, RequestError) else 424
    message = one_line(str(error)) or type(error).__name__
    headers = {"content-type": _JSON}
    if code == 503:
        headers["retry-after"] = _RETRY_AFTER
    return Reply(_json({"code": code, "error": message}), code, headers)


def to_output(answer: Reply) -> Output:
    """For DJL's sync mode: one request, its own status."""
    from djl_python.outputs import Output

    output = Output(answer.status, "OK" if answer.status == 200 else _error_text(answer))
    _add_headers(output, answer)
    output.add(answer.body)
    return output


def to_batch_output(answers: Sequence[Reply]) -> Output:
    """For DJL's dynamic batch: one status for all, so an error is told in that item's body."""
    from djl_python.outputs import Output

    output = Output()
    output.add_property("content-type", _JSON)
    for index, answer in enumerate(answers):
        output.add(answer.body, key="data", batch_index=index)
    return output


def to_async_output(answer: Reply) -> Output:
    """For DJL's async mode: a binary map; of an error Java keeps what is in ``error`` only."""
    from djl_python.outputs import Output

    output = Output()
    _add_headers(output, answer)
    if answer.status == 200:
        content = {"data": answer.body.decode(), "last": True}
    else:
        content = {"error": _error_text(answer), "code": answer.status, "last": True}
    output.add(Output.binary_encode(content))
    return output


def _details(result: GenerationResult, tokenizer: Tokenizer) -> dict[str, Any]:
    if not all(map(math.isfinite, result.log_probs)):  # JSON has no word for them
        raise RequestError(
            "the model computed log-probabilities that are no numbers; set option.dtype to bf16 or "
            "fp32, or check its weights",
            424,
        )
    # null where the engine does not tell them
    log_probs = result.log_probs or [None] * len(result.token_ids)
    tokens = [
        {"id": token_id, "text": tokenizer.token(token_id), "log_prob": log_prob}
        for token_id, log_prob in zip(result.token_ids, log_probs)
    ]
    return {
        "finish_reason": result.finish_reason,
        "generated_tokens": len(result.token_ids),
        "input_tokens": result.input_tokens,
        "truncated": result.truncated,
        "cumulative_log_prob": sum(result.log_probs) if result.log_probs else None,
        "tokens": tokens,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _error_text(answer: Reply) -> str:
    return str(json.loads(answer.body)["error"])


def _add_headers(output: Output, answer: Reply) -> None:
    for name, value in answer.headers.items():
        output.add_property(name, value)
