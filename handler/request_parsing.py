"""Bytes of one client's request -> what is asked for, or an error for that request only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.errors import RequestError, nearest, shown
from handler.generation import GenerationRequest, checked_text
from handler.parameters import GenerationParameters, ParameterLimits, parse_parameters

# What the article's payloads carry beside these has no meaning here: batches form by themselves.
_IGNORED = frozenset({"batch_size", "padding"})
_FIELDS = ("inputs", "parameters", "stream", *sorted(_IGNORED))


@dataclass(frozen=True)
class ParsedRequest:
    """One client's request: its prompts as it sent them, and how to continue each of them."""

    inputs: tuple[str, ...]
    is_list: bool
    parameters: GenerationParameters

    def generation_requests(self, prompt_template: str) -> list[GenerationRequest]:
        """The prompts as the model reads them."""
        return [
            GenerationRequest(prompt_template.replace("{input}", text), self.parameters)
            for text in self.inputs
        ]


def parse_request(content: bytes, limits: ParameterLimits) -> ParsedRequest:
    """Read a body of JSON. Raises RequestError: what was wrong, the value seen, what is allowed."""
    body = _parse_json(content)
    if not isinstance(body, dict):
        raise RequestError(
            f'the body must be a JSON object like {{"inputs": "..."}}, got {shown(body)}'
        )
    for name in body:
        if name not in _FIELDS:
            hint = nearest(name, _FIELDS)
            advice = f"did you mean {hint!r}?" if hint else "allowed are " + ", ".join(_FIELDS)
            raise RequestError(f"unknown field {shown(name)}; {advice}")
    inputs = body.get("inputs")
    return ParsedRequest(
        inputs=_parse_inputs(inputs),
        is_list=isinstance(inputs, list),
        parameters=parse_parameters(_raw_parameters(body), limits),
    )


def _parse_json(content: bytes) -> Any:
    if not content.strip():
        raise RequestError(
            'the body is empty, expected JSON like {"inputs": "..."} with Content-Type: '
            "application/json (plain curl -d sends a form)"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}"
        ) from None
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


def _parse_inputs(inputs: Any) -> tuple[str, ...]:
    if inputs is None:
        raise RequestError("the field 'inputs' is missing, expected a string or a list of strings")
    if isinstance(inputs, str):
        return (checked_text(inputs, "inputs"),)
    if not isinstance(inputs, list):
        raise RequestError(
            f"the field 'inputs' must be a string or a list of strings, got {shown(inputs)}"
        )
    if not inputs:
        raise RequestError("the field 'inputs' is an empty list, expected at least one string")
    return tuple(checked_text(text, f"inputs[{i}]") for i, text in enumerate(inputs))


def _raw_parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters``, with a ``stream`` beside ``inputs`` taken in."""
    parameters = body.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise RequestError(f"the field 'parameters' must be an object, got {shown(parameters)}")
    beside = body.get("stream")
    if beside is None:
        return parameters
    if parameters.get("stream") not in (None, beside):
        raise RequestError(
            f"'stream' beside 'inputs' is {shown(beside)}, in 'parameters' "
            f"{shown(parameters['stream'])}; send one of them"
        )
    return {**parameters, "stream": beside}
