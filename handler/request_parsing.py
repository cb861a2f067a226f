"""Bytes of one client's request -> a JSON object, or an error for that request only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from handler.errors import RequestError, shown


def parse_body(content: bytes) -> dict[str, Any]:
    """Read a JSON object. Raises RequestError: what was wrong, and where."""
    body = parse_json(content)
    if not isinstance(body, dict):
        raise RequestError(
            f'the body must be a JSON object like {{"inputs": "..."}}, got {shown(body)}'
        )
    return body


@dataclass(frozen=True)
class UnreadRequest:
    """A request as it came, and what reads it."""

    content: bytes
    parse: Callable[[bytes], dict[str, Any]] = parse_body

    def fields(self) -> dict[str, Any]:
        """Raises RequestError."""
        return self.parse(self.content)


def parse_json(content: bytes) -> Any:
    """Read a JSON value. Raises RequestError: what was wrong, and where."""
    if not content.strip():
        raise RequestError(
            'the body is empty, expected JSON like {"inputs": "..."} with Content-Type: '
            "application/json (plain curl -d sends a form)"
        )
    text = decoded(content)
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_object_without_duplicates,
        )
    except RequestError:
        raise
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except ValueError:  # an integer of more digits than Python agrees to read
        raise RequestError("the body holds a number of too many digits") from None


def decoded(content: bytes) -> str:
    """UTF-8 as text. Raises RequestError."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}"
        ) from None


def _refuse_constant(name: str) -> Any:
    raise RequestError(f"the body is not JSON: {name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RequestError(f"the number {shown(digits)} is too large, allowed is up to 1.8e308")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestError(f"the field {shown(key)} occurs twice, allowed is once")
        found[key] = value
    return found
