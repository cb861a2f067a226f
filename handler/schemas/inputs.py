"""Requests with ``inputs``: the article's, LMI's and TGI's are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from handler.errors import RequestError, nearest, shown
from handler.generation import GenerationRequest, checked_text
from handler.parameters import PARAMETERS, GenerationParameters, parse_parameters
from handler.prompt_template import INPUT, TemplateError, filled, placeholders
from handler.schemas.protocol import Deployment, ParsedRequest

# What the article's payloads carry beside these has no meaning here: batches form by themselves.
_IGNORED = ("batch_size", "padding")
# Fields of requests that have a schema of their own; null asks for nothing.
_OF_OTHERS = ("choices", "targets")
FIELDS = ("inputs", "parameters", "stream", "template", "variables", *_IGNORED)


def parse_inputs(body: Mapping[str, Any], deployment: Deployment) -> ParsedRequest:
    """Raises RequestError: what was wrong, the value seen, what is allowed."""
    check_fields({k: v for k, v in body.items() if k not in _OF_OTHERS or v is not None}, FIELDS)
    inputs = body.get("inputs")
    parameters = parse_parameters(_with_regex(_raw_parameters(body)), deployment.limits)
    return request_of(
        inputs=_texts(inputs),
        is_list=isinstance(inputs, list),
        parameters=parameters,
        log_probs=parameters.wants_details or parameters.stream,
        template=_template(body.get("template"), deployment.prompt_template),
        variables=_variables(body.get("variables")),
        new_seed=deployment.new_seed,
    )


def check_fields(body: Mapping[str, Any], fields: Sequence[str]) -> None:
    """Raises RequestError for a field that is none of ``fields``."""
    for name in body:
        if name not in fields:
            hint = nearest(name, fields)
            advice = f"did you mean {hint!r}?" if hint else "allowed are " + ", ".join(fields)
            if "parameters" in fields and name in PARAMETERS:
                advice = "it is a parameter: put it into 'parameters'"
            raise RequestError(f"unknown field {shown(name)}; {advice}")


def request_of(
    inputs: tuple[str, ...],
    is_list: bool,
    parameters: GenerationParameters,
    log_probs: bool,
    template: str,
    variables: Mapping[str, str],
    new_seed: Callable[[], int | None],
) -> ParsedRequest:
    """log_probs: whether the answer tells them.

    Raises RequestError where the template and its variables do not fit, or for a list that is
    to be streamed."""
    if parameters.stream and is_list:
        raise RequestError(
            f"a list cannot be streamed, got one of {len(inputs)}; send one string, or 'stream' "
            "false"
        )
    prompts = tuple(
        GenerationRequest(text, _seeded(parameters, new_seed), log_probs)
        for text in filled(template, inputs, variables)
    )
    return ParsedRequest(inputs, is_list, parameters, prompts)


def _seeded(
    parameters: GenerationParameters, new_seed: Callable[[], int | None]
) -> GenerationParameters:
    """With the seed that is drawn where the client gave none, so that its answer can tell it."""
    if parameters.samples and parameters.seed is None:
        return replace(parameters, seed=new_seed())
    return parameters


def _texts(inputs: Any) -> tuple[str, ...]:
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


def _with_regex(parameters: dict[str, Any]) -> dict[str, Any]:
    """TGI's ``grammar`` of type regex as our parameter; of another type it is refused."""
    grammar = parameters.get("grammar")
    if grammar is None or grammar is False:
        return parameters
    if not isinstance(grammar, dict) or grammar.get("type") != "regex" or "value" not in grammar:
        raise RequestError(
            'parameter \'grammar\' must be {"type": "regex", "value": "..."}, got '
            f"{shown(grammar)}"
        )
    if parameters.get("regex") is not None:
        raise RequestError("parameters 'grammar' and 'regex' mean the same; send one of them")
    return {**parameters, "grammar": None, "regex": grammar["value"]}


def _template(template: Any, configured: str) -> str:
    if template is None:
        return configured
    if not isinstance(template, str):
        raise RequestError(f"the field 'template' must be a string, got {shown(template)}")
    try:
        placeholders(template)
    except TemplateError as error:
        raise RequestError(f"the field 'template' must {error}, got {shown(template)}") from None
    return template


def _variables(variables: Any) -> Mapping[str, str]:
    if variables is None:
        return {}
    if not isinstance(variables, dict):
        raise RequestError(f"the field 'variables' must be an object, got {shown(variables)}")
    for name, value in variables.items():
        if name == INPUT:
            raise RequestError("the variable 'input' is what 'inputs' holds; name it otherwise")
        if not isinstance(value, str):
            raise RequestError(f"the variable {shown(name)} must be a string, got {shown(value)}")
    return variables
