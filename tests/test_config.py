"""Configuration: strings as DJL hands them over, three sources, errors and warnings."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from handler.config import DJL_OWNED, PROPERTIES, Configuration, read_configuration
from handler.errors import LoadError


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("tensor_parallel_degree", "4", 4),
        ("tensor_parallel_degree", "max", "max"),
        ("tensor_parallel_degree", "MAX", "max"),
        ("tensor_parallel_degree", 2, 2),
        ("max_rows", "8", 8),
        ("request_timeout", "2.5", 2.5),
        ("trust_remote_code", "True", True),
        ("trust_remote_code", "false", False),
        ("log_prompts", True, True),
        ("dtype", "float16", "fp16"),
        ("dtype", "BF16", "bf16"),
        ("response_schema", "LMI", "lmi"),
        ("device_id", "-1", -1),
        ("threads", "", None),
    ],
)
def test_strings_become_values(name: str, written: Any, value: Any) -> None:
    configuration = read_configuration(properties={name: written})
    assert getattr(configuration, name) == value
    assert read_configuration(properties={f"option.{name}": written}) == configuration


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("tensor_parallel_degree", "four", "an integer of at least 1, or \"max\", got 'four'"),
        ("tensor_parallel_degree", "0", "an integer of at least 1"),
        ("max_rows", "1.5", "an integer of at least 1"),
        ("max_rows", "-1", "an integer of at least 1"),
        ("request_timeout", "0", "seconds above 0"),
        ("request_timeout", "nan", "seconds above 0"),
        ("request_timeout", "inf", "seconds above 0"),
        ("trust_remote_code", "perhaps", "true or false, got 'perhaps'"),
        ("dtype", "fp8", "one of auto, fp32, fp16, bf16, int8, int4, got 'fp8'"),
        ("quantize", "fp16", "int8 or int4"),
        ("backend", "vllm", "one of auto, fastertransformer"),
        ("response_schema", "openai", "one of outputs, lmi, tgi"),
        ("prompt_template", "Summarize:", "a text that contains {input}"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, written: str, words: str) -> None:
    with pytest.raises(LoadError) as caught:
        read_configuration(properties={name: written})
    assert words in str(caught.value)
    assert f"option.{name}" in str(caught.value)


def test_the_command_line_wins_over_properties_and_they_over_the_environment() -> None:
    sources: dict[str, Any] = {
        "command_line": {"max_rows": "1"},
        "properties": {"option.max_rows": "2", "threads": "2"},
        "environment": {"OPTION_MAX_ROWS": "3", "OPTION_THREADS": "3", "OPTION_MAX_QUEUE": "3"},
    }
    configuration = read_configuration(**sources)
    assert (configuration.max_rows, configuration.threads, configuration.max_queue) == (1, 2, 3)


def test_environment_variables_that_djl_and_its_containers_know() -> None:
    configuration = read_configuration(
        environment={"HF_MODEL_ID": "google/flan-t5-xl", "TENSOR_PARALLEL_DEGREE": "max"}
    )
    assert configuration.model_id == "google/flan-t5-xl"
    assert configuration.tensor_parallel_degree == "max"


def test_aliases() -> None:
    assert read_configuration(properties={"max_rolling_batch_size": "8"}).max_rows == 8
    assert read_configuration(properties={"quantize": "int8"}).dtype == "int8"


def test_two_names_of_one_property_that_differ() -> None:
    with pytest.raises(LoadError, match="mean the same property and differ"):
        read_configuration(properties={"dtype": "bf16", "quantize": "int8"})


@pytest.mark.parametrize(
    ("written", "meant"),
    [("option.max_row", "max_rows"), ("tensor_parallel_degre", "tensor_parallel_degree")],
)
def test_a_misspelt_property_is_a_warning_with_the_nearest_name(
    written: str, meant: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_configuration(properties={written: "3"}) == Configuration()
    assert f"did you mean {meant}?" in caplog.text


@pytest.mark.parametrize("name", sorted(DJL_OWNED))
def test_what_djl_owns_is_let_through(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_configuration(properties={name: "3"}) == Configuration()
    assert caplog.text == ""


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_example_of_the_table_is_accepted(name: str) -> None:
    read_configuration(properties={name: PROPERTIES[name].metadata["example"]})


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Configuration().max_rows = 3  # type: ignore[misc]
