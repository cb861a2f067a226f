"""The parameter table: names, aliases, ranges, defaults, what they imply for each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import RequestError
from handler.parameter_limits import ParameterLimits
from handler.parameters import (
    PARAMETERS,
    GenerationParameters,
    parameters_in_use,
    parse_parameters,
)

ALIASES = {
    "max_seq_len": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "beam_width": "num_beams",
    "len_penalty": "length_penalty",
    "n": "num_return_sequences",
    "best_of": "num_return_sequences",
    "random_seed": "seed",
    "stop": "stop_sequences",
    "stop_words_list": "stop_sequences",
    "bad_words": "bad_words_list",
    "is_return_output_log_probs": "return_log_probs",
    "is_return_cum_log_probs": "return_log_probs",
    "guided_regex": "regex",
    "guided_choice": "choices",
}


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_means_its_parameter(alias: str, name: str) -> None:
    example = PARAMETERS[name].metadata["example"]
    others = {"do_sample": True} if name == "num_return_sequences" else {}
    assert parse_parameters({alias: example, **others}) == parse_parameters(
        {name: example, **others}
    )


def test_the_table_has_no_other_aliases() -> None:
    assert set(ALIASES) == {a for f in PARAMETERS.values() for a in f.metadata["aliases"]}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_example_of_the_table_is_accepted_and_is_no_default(name: str) -> None:
    example = PARAMETERS[name].metadata["example"]
    others = {"do_sample": True} if name == "num_return_sequences" else {}
    assert name in parameters_in_use(parse_parameters({name: example, **others}))


@pytest.mark.parametrize("name", PARAMETERS)
def test_null_is_absent(name: str) -> None:
    assert parse_parameters({name: None}) == GenerationParameters()


@pytest.mark.parametrize(
    ("sent", "samples"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 0}, False),
        ({"temperature": 1e-6}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"top_k": 1}, False),
        ({"top_k": 2}, True),
        ({"top_p": 0.0}, False),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9}, True),
        ({"do_sample": True}, True),
        ({"seed": 3}, False),
    ],
)
def test_what_makes_a_request_sample(sent: dict[str, Any], samples: bool) -> None:
    assert parse_parameters(sent).samples is samples


def test_a_whole_float_is_an_integer() -> None:
    assert parse_parameters({"max_new_tokens": 20.0}).max_new_tokens == 20


def test_equal_values_under_two_names_are_no_conflict() -> None:
    assert parse_parameters({"max_length": 9, "max_tokens": 9}).max_new_tokens == 9


def test_the_default_length_keeps_to_the_deployments_limit() -> None:
    assert parse_parameters({}, ParameterLimits(max_output_tokens=50)).max_new_tokens == 50


@pytest.mark.parametrize(
    ("sent", "parsed"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([], ()),
        ([[1, 2, 3, 0], [2, 3, -1, -1]], ((1, 2), (3,))),
        ([[[1, 2, 3], [3, -1, -1]]], ((1, 2, 3),)),
    ],
)
def test_stop_sequences_take_strings_and_fastertransformers_arrays(
    sent: Any, parsed: tuple[Any, ...]
) -> None:
    assert parse_parameters({"stop_words_list": sent}).stop_sequences == parsed


def test_values_made_in_python_are_checked_too() -> None:
    with pytest.raises(RequestError, match="'temperature' must be a number from 0"):
        GenerationParameters(temperature=float("nan"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*PARAMETERS, *ALIASES]) | st.text(), JSON_VALUES))
def test_anything_sent_is_either_understood_or_refused_in_one_line(sent: dict[str, Any]) -> None:
    refused = _refusal(sent)
    if refused is not None:
        assert refused.code == 400
        assert str(refused).isprintable()
        assert str(refused).isascii()


def _refusal(sent: dict[str, Any]) -> RequestError | None:
    try:
        hash(parse_parameters(sent))
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize("value", [("",), (5,), (None,), ((),), ((-1,),), ["a"] * 257])
def test_sequences_from_python_are_checked_like_those_of_json(value: Any) -> None:
    with pytest.raises(RequestError, match="'stop_sequences' must be "):
        GenerationParameters(stop_sequences=value)


def test_numbers_of_numpy_are_numbers() -> None:
    p = GenerationParameters(max_new_tokens=np.int64(5), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert (p.max_new_tokens, p.temperature) == (5, 0.5)
    assert type(p.max_new_tokens) is int


def test_a_name_of_megabytes_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="unknown parameter"):
        parse_parameters({"k" * 20_000_000: 1})


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_and_its_parameter_that_differ_are_refused(alias: str, name: str) -> None:
    example = PARAMETERS[name].metadata["example"]
    other = {bool: False, int: 7, float: 0.25, str: "b"}.get(type(example), ["b", "c"])
    with pytest.raises(RequestError, match=f"'{name}' and '{alias}' mean the same and differ"):
        parse_parameters({name: example, alias: other})


# Every parameter, against what it cannot be


def _refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        parse_parameters({name: value})
    assert f"'{name}'" in str(error.value)
    assert "must be" in str(error.value)


NUMBERS = [n for n in PARAMETERS if type(PARAMETERS[n].metadata["example"]) in (int, float)]
BOOLEANS = [n for n in PARAMETERS if PARAMETERS[n].metadata["example"] is True]


@pytest.mark.parametrize("value", [{}, {"a": 1}, [[[]]], [None], [1.5], [True]])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    _refused(name, value)


@pytest.mark.parametrize("value", ["", "5", "x", True, False, 1e400, -1e400, float("nan"), 10**400])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_in_range_is_refused(name: str, value: Any) -> None:
    if isinstance(value, bool) and name in BOOLEANS:
        return
    _refused(name, value)


LARGEST_INTEGER = 2**31 - 1
RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, LARGEST_INTEGER),
    "min_new_tokens": (0, LARGEST_INTEGER),
    "temperature": (0.0, 1e6),
    "top_k": (0, LARGEST_INTEGER),
    "top_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "num_beams": (1, LARGEST_INTEGER),
    "length_penalty": (-10.0, 10.0),
    "num_return_sequences": (1, LARGEST_INTEGER),
    "seed": (0, 2**64 - 1),
    "repetition_penalty": (1e-6, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "no_repeat_ngram_size": (0, LARGEST_INTEGER),
    "top_n_tokens": (0, 20),
}


def test_every_number_has_its_range_here() -> None:
    assert list(RANGES) == NUMBERS


@pytest.mark.parametrize(("name", "bounds"), RANGES.items())
def test_a_number_reaches_from_bound_to_bound(name: str, bounds: tuple[float, float]) -> None:
    check = PARAMETERS[name].metadata["check"]
    lowest, highest = bounds
    assert [check(lowest), check(highest)] == [lowest, highest]
    if isinstance(lowest, int):
        beyond = [lowest - 1, highest + 1]
    else:
        beyond = [math.nextafter(lowest, -math.inf), math.nextafter(highest, math.inf)]
    for value in beyond:
        _refused(name, value)


@pytest.mark.parametrize("value", [0, 1, "true", "", "x", 1.0])
@pytest.mark.parametrize("name", [n for n in BOOLEANS if n not in ("truncate", "early_stopping")])
def test_what_is_no_boolean_is_refused(name: str, value: Any) -> None:
    _refused(name, value)
