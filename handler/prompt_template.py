"""Prompt templates: ``{input}`` and named variables, put in their places and nothing else.

``{{`` and ``}}`` stand for braces. What is put in is never read as a template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from handler.errors import RequestError

INPUT = "input"

_SPECIAL = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")
_BRACES = {"{{": "{", "}}": "}"}


class TemplateError(ValueError):
    """How the sentence "the template must ..." goes on."""


def placeholders(template: str) -> tuple[str, ...]:
    """The names in ``template``, each once, in their order.

    Raises TemplateError where it is none: a single brace, or no ``{input}``.
    """
    names: dict[str, None] = {}
    for match in _SPECIAL.finditer(template):
        if match.group() in ("{", "}"):
            raise TemplateError(
                f"double a brace that stands for itself, got a single one at character "
                f"{match.start()}"
            )
        if match.group(1):
            names[match.group(1)] = None
    if INPUT not in names:
        raise TemplateError("contain {input}")
    return tuple(names)


def filled(template: str, inputs: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Each input in its place in ``template``.

    Raises RequestError for a name without a value and for a variable that is not used.
    """
    names = placeholders(template)
    for name in names:
        if name != INPUT and name not in variables:
            raise RequestError(
                f"the template's {{{name}}} has no value; send it in 'variables', or double the "
                "braces"
            )
    for name in variables:
        if name not in names:
            places = ", ".join(f"{{{n}}}" for n in names)
            raise RequestError(f"the variable {name!r} is not used: the template has {places}")
    return [_fill(template, {**variables, INPUT: text}) for text in inputs]


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _SPECIAL.sub(
        lambda match: _BRACES.get(match.group()) or values[match.group(1)], template
    )
