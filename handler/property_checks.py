"""Checks of single property values: each returns the value as it is used, or refuses it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from handler.prompt_template import TemplateError, placeholders


class Refused(ValueError):
    """How the sentence "option.x must be ..." goes on."""


def text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise Refused("a string")
    return value


def choice(*allowed: str) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        name = str(value).lower()
        if name not in allowed:
            raise Refused(f"one of {', '.join(allowed)}")
        return name

    return convert


def integer(lowest: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        refused = Refused(f"an integer of at least {lowest}")
        if isinstance(value, (bool, float)):
            raise refused
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise refused from None
        if number < lowest:
            raise refused
        return number

    return convert


def degree(value: Any) -> int | str:
    if isinstance(value, str) and value.lower() == "max":
        return "max"
    try:
        return integer(1)(value)
    except Refused:
        raise Refused('an integer of at least 1, or "max"') from None


def seconds(value: Any) -> float:
    refused = Refused("a number of seconds above 0")
    if isinstance(value, bool):
        raise refused
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise refused from None
    if not 0 < number < float("inf"):
        raise refused
    return number


def boolean(value: Any) -> bool:
    names = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return names[str(value).lower()]
    except KeyError:
        raise Refused("true or false") from None


def streaming(value: Any) -> bool:
    return str(value).lower() == "huggingface" or boolean(value)  # DJL's name of one of its ways


def template(value: Any) -> str:
    try:
        placeholders(text(value))
    except TemplateError:
        raise Refused("a text that contains {input} and doubles other braces ({{ for {)") from None
    return str(value)
