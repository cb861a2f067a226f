"""serving.properties of an archive: what is shipped or the folder's own, with what was told."""

from __future__ import annotations

import io
from pathlib import Path

import javaproperties
import pytest
from conftest import ROOT

from handler.errors import LoadError
from handler.packaging.images import find_image
from handler.packaging.serving_properties import TEMPLATE, serving_properties

LMI = find_image("lmi")


def read(text: str) -> dict[str, str]:
    return dict(javaproperties.loads(text))


def test_the_package_has_the_repositorys_file() -> None:
    assert TEMPLATE.read_bytes() == (ROOT / "serving.properties").read_bytes()


def test_without_options_it_is_the_shipped_one() -> None:
    assert serving_properties(LMI, []).text == TEMPLATE.read_text()


def test_an_option_takes_the_place_of_its_commented_default() -> None:
    made = serving_properties(LMI, [("dtype", "int8"), ("max_queue", "7")])
    assert (
        "Number format of the weights: auto, fp32, bf16, fp16, int8 or int4.\noption.dtype=int8"
        in (made.text)
    )
    assert "#option.max_queue" not in made.text
    assert made.configuration.dtype == "int8"
    assert made.configuration.max_queue == 7


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("option.dtype", "option.dtype"),
        ("max_rolling_batch_size", "option.max_rows"),
        ("batch_size", "batch_size"),
        ("maxworkers", "maxWorkers"),
        ("entrypoint", "option.entryPoint"),
        ("predict_timeout", "option.predict_timeout"),
    ],
)
def test_names_of_ours_and_of_djlserving(name: str, key: str) -> None:
    value = "fp32" if "dtype" in name else "1"
    properties = read(serving_properties(LMI, [(name, value)]).text)
    assert properties[key] == value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dtpye", "--option dtpye is no property .*did you mean dtype"),
        ("max_input_token", "did you mean max_input_tokens"),
        ("model_loading_timeuot", "did you mean model_loading_timeout"),
        ("colour", "docs/properties.md has all of them"),
        ("device_id", "is set by DJLServing itself"),
    ],
)
def test_names_that_nobody_knows(name: str, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        serving_properties(LMI, [(name, "1")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([("dtype", "fp99")], "option.dtype must be one of auto, fp32"),
        ([("max_queue", "0")], "option.max_queue must be an integer of at least 1"),
        ([("batch_size", "many")], "batch_size must be an integer"),
        ([("batch_size", "8")], "batch_size=8 and option.async_mode=true exclude each other"),
    ],
)
def test_values_that_are_not_allowed(options: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(LoadError, match=words):
        serving_properties(LMI, options)


def test_values_of_any_kind_are_read_back_by_java_rules() -> None:
    template = r" a\b: {input} = #1 é!"
    made = serving_properties(LMI, [("prompt_template", template), ("s3url", "s3://b/p=1/")])
    assert read(made.text)["option.prompt_template"] == template
    assert "\noption.s3url=s3://b/p=1/\n" in made.text


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_folders_own_file_keeps_its_bytes(tmp_path: Path, encoding: str) -> None:
    own = tmp_path / "serving.properties"
    own.write_bytes("# Grüße\noption.prompt_template=Übersetze: {input}\n".encode(encoding))
    assert serving_properties(LMI, [], own).content == own.read_bytes()
    changed = serving_properties(LMI, [("prompt_template", "Über 😀: {input}")], own).content
    assert changed.startswith("# Grüße\n".encode(encoding))
    assert dict(javaproperties.load(io.BytesIO(changed)))["option.prompt_template"] == (
        "Über 😀: {input}"
    )


def test_what_2023s_images_need() -> None:
    made = serving_properties(find_image("fastertransformer"), [("dtype", "bf16")])
    properties = read(made.text)
    assert properties["engine"] == "FasterTransformer"
    assert properties["option.async_mode"] == "false"
    assert properties["option.model_loading_timeout"] == "3600"


def test_the_folders_own_file_is_kept_and_options_win_over_it(tmp_path: Path) -> None:
    own = tmp_path / "serving.properties"
    own.write_text(
        "# mine\nengine=Python\noption.quantize=\\\n  int8\noption.entryPoint=mine.py\n"
        "option.of_somebody_else=1\n"
    )
    properties = read(serving_properties(LMI, [("dtype", "fp32")], own).text)
    assert properties == {
        "engine": "Python",
        "option.dtype": "fp32",
        "option.entryPoint": "mine.py",
        "option.of_somebody_else": "1",
    }
    assert serving_properties(LMI, [], own).text == own.read_text()


def test_a_misspelt_property_of_the_folders_own_file(tmp_path: Path) -> None:
    own = tmp_path / "serving.properties"
    own.write_text("option.max_inptu_tokens=5\n")
    with pytest.raises(LoadError, match="has no effect; did you mean "):
        serving_properties(LMI, [], own)


def test_properties_are_left_out_and_changed_by_any_of_their_names() -> None:
    made = serving_properties(LMI, [("merge_adapter", "here"), ("model_id", "org/name")])
    assert made.but(merge_adapter="adapter").configuration.merge_adapter == "adapter"
    without = made.without("model_id", "merge_adapter")
    assert without.configuration.model_id is None
    assert without.configuration.merge_adapter is None
