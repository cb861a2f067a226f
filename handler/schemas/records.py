"""What schemas share: JSON on the wire, and tokens as texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from handler.errors import RequestError
from handler.generation import GenerationResult, TokenEvent
from handler.tokenizer import Tokenizer

JSON, JSON_LINES, EVENT_STREAM = "application/json", "application/jsonlines", "text/event-stream"

# Line ends to Python's splitlines and to the clients that are built on it.
_LINE_ENDS = str.maketrans({c: f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"})


def accepts(accept: str, media_type: str) -> bool:
    """Whether an Accept header names ``media_type`` itself; ``*/*`` names none."""
    return any(part.split(";")[0].strip().lower() == media_type for part in accept.split(","))


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def json_line(value: Any) -> bytes:
    """One line of a JSON-lines stream."""
    return as_line(to_json(value))


def as_line(json_text: str) -> bytes:
    """JSON that ``to_json`` wrote, as one line."""
    return f"{json_text.translate(_LINE_ENDS)}\n".encode()


def server_sent_event(value: Any) -> bytes:
    """One event of an SSE stream."""
    return f"data: {to_json(value).translate(_LINE_ENDS)}\n\n".encode()


def lmi_error(error: RequestError) -> dict[str, Any]:
    return {"code": error.code, "error": str(error)}


def check_finite(told: GenerationResult | TokenEvent) -> None:
    """Raises RequestError for log-probabilities that JSON has no word for."""
    log_probs = told.log_probs if isinstance(told, GenerationResult) else (told.log_prob,)
    if not all(log_prob is None or math.isfinite(log_prob) for log_prob in log_probs):
        raise RequestError(
            "the model computed log-probabilities that are no numbers; set option.dtype to bf16 or "
            "fp32, or check its weights",
            424,
        )


def log_probs_of(result: GenerationResult) -> Sequence[float | None]:
    """One a token, null where the engine does not tell them."""
    return result.log_probs or [None] * len(result.token_ids)


def vocabulary_token(token_id: int, log_prob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token as the schema outputs tells it: its text is what the vocabulary writes."""
    return {"id": token_id, "text": tokenizer.token(token_id), "log_prob": log_prob}


def token_texts(token_ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Each token's share of the text: joined they are what ``token_ids`` decode to.

    A special token's is empty, and that of one which only begins a character.
    """
    detokenizer = tokenizer.detokenizer()
    for token_id in token_ids:
        yield "" if token_id == tokenizer.eos_token_id else detokenizer.add(token_id)


def text_alone(token_id: int, tokenizer: Tokenizer) -> str:
    """A token that no text surrounds: as the vocabulary writes it, with spaces for its ``▁``."""
    return tokenizer.token(token_id).replace("▁", " ")


def is_special(token_id: int | None, tokenizer: Tokenizer) -> bool:
    """Whether a token, like ``</s>``, is left out of every text."""
    if token_id is None:
        return False
    name = tokenizer.token(token_id)
    is_named = len(name) > 2 and name.startswith("<") and name.endswith(">")
    return is_named and not tokenizer.decode([token_id])
