"""Templates: plain substitution, with errors that name what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import RequestError
from handler.prompt_template import TemplateError, filled, placeholders


@pytest.mark.parametrize(
    ("template", "variables", "prompt"),
    [
        ("{input}", {}, "TEXT"),
        ("Translate to {language}: {input}", {"language": "German"}, "Translate to German: TEXT"),
        ("{input} {input} {a}{a}", {"a": ""}, "TEXT TEXT "),
        ('{{"text": "{input}"}}', {}, '{"text": "TEXT"}'),
        ("{{{input}}}", {}, "{TEXT}"),
        ("{{input}} {input}", {}, "{input} TEXT"),
        ("{größe_2} {input}", {"größe_2": "b"}, "b TEXT"),
    ],
)
def test_names_are_filled_in(template: str, variables: dict[str, str], prompt: str) -> None:
    assert filled(template, ["TEXT"], variables) == [prompt]


@given(st.text(), st.text())
def test_what_is_filled_in_is_never_read(text: str, value: str) -> None:
    assert filled("[{a}|{input}]", [text], {"a": value}) == [f"[{value}|{text}]"]
    assert filled("{input}", ["{a} {{ }} {"], {}) == ["{a} {{ }} {"]


def test_every_input_has_its_own_prompt() -> None:
    assert filled("{a}: {input}", ["1", "2"], {"a": "x"}) == ["x: 1", "x: 2"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("x", "contain {input}"),
        ("{{input}}", "contain {input}"),
        ("{input} {", "a single one at character 8"),
        ("}{input}", "a single one at character 0"),
        ("{input} {0}", "a single one at character 8"),
        ("{input.__class__}", "a single one at character 0"),
        ("{input!r:>30}", "a single one at character 0"),
        ("{ input }", "a single one at character 0"),
    ],
)
def test_what_is_no_template(template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        placeholders(template)


def test_variables_and_names_must_fit() -> None:
    with pytest.raises(RequestError, match=r"the template's \{a\} has no value"):
        filled("{a} {input}", ["x"], {})
    with pytest.raises(RequestError, match=r"the variable 'b' is not used: the template has"):
        filled("{input}", ["x"], {"b": "y"})
