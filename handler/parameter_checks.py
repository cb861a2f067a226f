"""Checks of single parameter values: each returns the value as it is used, or refuses it."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Union

StopSequence = Union[str, "tuple[int, ...]"]

# Each is looked for at every step, on the engine's thread.
_MOST_SEQUENCES, _LONGEST_SEQUENCE = 256, 256


class Refused(ValueError):
    """What a check says of a value: how the sentence "parameter 'x' must be ..." goes on."""


def integer(lowest: int, highest: int = 2**31 - 1) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        # 20.0 is the integer 20 in JSON; true is not the integer 1
        whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not lowest <= value <= highest:
            raise Refused(f"an integer from {lowest} to {highest}")
        return int(value)

    return check


def number(lowest: float, highest: float, allowed: str) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real, too
            raise Refused(allowed)
        try:
            converted = float(value)
        except OverflowError:  # an int of hundreds of digits
            raise Refused(allowed) from None
        if not lowest <= converted <= highest:  # neither is NaN
            raise Refused(allowed)
        return converted

    return check


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Refused("true or false")
    return value


def early_stopping(value: Any) -> bool | str:
    if not isinstance(value, bool) and value != "never":
        raise Refused('true, false or "never"')
    return value  # type: ignore[no-any-return]


def truncate(value: Any) -> bool | int:
    if isinstance(value, bool):
        return value
    try:
        return integer(1)(value)
    except Refused:
        raise Refused("true, false or the most input tokens to keep (an integer >= 1)") from None


def text(value: Any) -> str:
    if not isinstance(value, str) or not _is_text(value):
        raise Refused("a string that is not empty")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """A list of different strings."""
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) <= _MOST_SEQUENCES
    if not is_list or not all(isinstance(one, str) and one.strip() for one in value):
        raise Refused(f"a list of 1 to {_MOST_SEQUENCES} strings that are not blank")
    if len({one.strip() for one in value}) < len(value) or not all(map(_is_text, value)):
        raise Refused("a list of different strings")
    return tuple(value)


def sequences(value: Any) -> tuple[StopSequence, ...]:
    """A string, strings, or FasterTransformer's pair of arrays [ids, end offsets padded with -1].

    A tuple is what this function returns: strings, and tuples of ids.
    """
    found = _sequences(value)
    if len(found) > _MOST_SEQUENCES or max(map(len, found), default=0) > _LONGEST_SEQUENCE:
        raise Refused(
            f"at most {_MOST_SEQUENCES} sequences, of {_LONGEST_SEQUENCE} characters or ids each"
        )
    return found


def _sequences(value: Any) -> tuple[StopSequence, ...]:
    if isinstance(value, tuple) and all(map(_is_sequence, value)):
        return value
    allowed = "a string, a list of strings, or FasterTransformer's [token ids, end offsets]"
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise Refused(allowed)
    if len(value) == 1 and isinstance(value[0], list):  # its batch axis
        value = value[0]
    if all(isinstance(item, str) for item in value):
        if not all(map(_is_text, value)):
            raise Refused(f"{allowed}; an empty string or half a surrogate pair is none")
        return tuple(value)
    try:
        return _word_list(value)
    except ValueError:
        raise Refused(allowed) from None


def _is_sequence(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(type(item) is int and item >= 0 for item in value)
    return isinstance(value, str) and _is_text(value)


def _is_text(value: str) -> bool:
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def _integers(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError("not an array of integers")
    return value


def _word_list(value: list[Any]) -> tuple[StopSequence, ...]:
    """Decode FasterTransformer's word list: [[1, 2, 3, 0], [2, 3, -1, -1]] is (1, 2) and (3,)."""
    ids, offsets = map(_integers, value)
    if len(ids) != len(offsets):
        raise ValueError("not a pair of equally long arrays")
    words: list[tuple[int, ...]] = []
    start = 0
    for end in (offset for offset in offsets if offset != -1):
        if not start < end <= len(ids) or min(ids[start:end]) < 0:
            raise ValueError("offsets do not rise")
        words.append(tuple(ids[start:end]))
        start = end
    return tuple(words)
