"""Texts that must have a form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle

from handler.engines import Model, init_inference
from handler.errors import RequestError
from handler.generation import GenerationRequest
from handler.guided import Guides
from handler.parameters import GenerationParameters
from handler.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@pytest.fixture(
    scope="module",
    params=[
        *(("onnxruntime", v) for v in ("demo", "byt5", "flan-t5")),
        ("torch", "byt5"),
        ("transformers", "flan-t5"),
    ],
    ids="-".join,
)
def any_model(
    request: pytest.FixtureRequest, oracle_of: Callable[[str], Oracle]
) -> Iterator[Model]:
    backend, variant = request.param
    model = init_inference(str(oracle_of(variant).folder), backend=backend, threads=1)
    yield model
    model.close()


def texts(model: Model, prompt: str = "Write 7 in words.", **parameters: Any) -> list[str]:
    (result,) = model.generate([GenerationRequest(prompt, GenerationParameters(**parameters))])
    return [one.text for one in (result, *result.alternatives)]


WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 3.0, "num_return_sequences": 5, "seed": 1},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "do_sample": True, "seed": 2},
    {"repetition_penalty": 1.3, "top_k": 5, "do_sample": True, "seed": 3},
]


REGEXES = [
    r"[0-9]{3}",
    r"(seven|eight) ?",
    r"[a-z]+( [a-z]+){2}",
    r"a|b{2,3}c*",
    r"[^ab ]{1,9}",
]


@pytest.mark.parametrize(
    ("regex", "way"),
    [
        pytest.param(regex, way, marks=() if i == k or k == 0 else pytest.mark.long)
        for i, regex in enumerate(REGEXES)
        for k, way in enumerate(WAYS)
    ],
    ids=str,
)
def test_every_text_matches(any_model: Model, regex: str, way: dict[str, Any]) -> None:
    for text in texts(any_model, regex=regex, max_new_tokens=60, **way):
        complete = re.fullmatch(regex, text) or re.fullmatch(regex, text + " ")
        # an expression without an end may still be on its way at the last token
        assert complete or ("+" in regex and re.fullmatch(r"[a-z ]*", text)), text


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_one_of_the_choices(any_model: Model, way: dict[str, Any]) -> None:
    choices = ["yes", "yes and no", "no", "nothing at all", "7"]
    found = texts(any_model, choices=choices, max_new_tokens=40, **way)
    assert set(found) <= set(choices)
    if way.get("num_beams") == 4:
        assert len(set(found)) == 4


def test_the_model_still_chooses(model: Model) -> None:
    assert texts(model, regex="[a-z]+") == ["seven"]
    assert texts(model, choices=["eight", "seven", "nine"]) == ["seven"]
    assert texts(model, choices=["eight", "nine"])[0] in ("eight", "nine")


@pytest.mark.parametrize("regex", ["^(eight|seven)$", "^eight|seven$", "(eight|seven)$"])
def test_anchors_of_the_whole_text_change_nothing(model: Model, regex: str) -> None:
    assert texts(model, regex=regex) == ["seven"]


def test_fewer_texts_than_asked_for_are_no_answer(model: Model) -> None:
    with pytest.raises(RequestError, match="asks for 4 texts, of the form asked for there are"):
        texts(model, choices=["one", "two"], num_beams=4, num_return_sequences=4)


def test_a_choice_beside_free_texts(model: Model) -> None:
    """Rows of one batch, each with a form of its own or none."""
    forms: list[dict[str, Any]] = [{}, {"regex": "[0-9]+"}, {"choices": ["no"]}, {"regex": "[a-z]"}]
    requests = [
        GenerationRequest("Write 7 in words.", GenerationParameters(max_new_tokens=9, **form))
        for form in forms * 6
    ]
    together = model.generate(requests)
    assert together == [model.generate([one])[0] for one in requests]
    assert together[0].text == "seven"
    assert together[2].text == "no"


def test_the_end_of_a_text_is_its_last_allowed_token(model: Model) -> None:
    (result,) = model.generate(
        [GenerationRequest("x", GenerationParameters(regex="[0-9]{2}", max_new_tokens=20))]
    )
    assert (len(result.text), result.finish_reason) == (2, "eos_token")


def test_nothing_is_left_to_choose(model: Model) -> None:
    with pytest.raises(RequestError, match="the parameters forbid every token after 1"):
        texts(model, choices=["seven"], min_new_tokens=5)
    with pytest.raises(RequestError, match="the parameters forbid every token after 1"):
        texts(model, choices=["seven"], min_new_tokens=5, num_beams=2)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"regex": "a{"}, "must be a regular expression"),
        ({"regex": "(a"}, "must be a regular expression"),
        ({"regex": "[z-a]"}, "must be a regular expression"),
        ({"regex": r"a(?=b)"}, "without look-around"),
        ({"regex": r"(a)\1"}, "without look-around, back references"),
        ({"regex": "☃+"}, "cannot write what '☃+' asks for; among its characters there is no ☃"),
        ({"regex": '\\{"a": [0-9]\\}'}, 'there is no " { }'),
        ({"regex": ""}, "'regex' must be a string that is not empty"),
        ({"regex": "a)|(?:b"}, "must be a regular expression"),
        ({"regex": "(?x) a # b"}, "must be a regular expression"),
        ({"regex": r"\p{Greek}+"}, "cannot write what"),
        ({"regex": "a" * 2001}, "may have 2000 characters, got 2001"),
        ({"choices": ["☃"]}, "cannot write '☃'"),
        ({"choices": []}, "must be a list of 1 to 256 strings"),
        ({"choices": "yes"}, "must be a list of 1 to 256 strings"),
        ({"choices": ["a", ""]}, "must be a list of 1 to 256 strings"),
        ({"choices": ["a", "a "]}, "must be a list of different strings"),
        ({"choices": ["a"], "regex": "a"}, "'regex' and 'choices' are both there"),
    ],
)
def test_bad_ones(model: Model, parameters: dict[str, Any], words: str) -> None:
    if parameters.get("choices") == []:
        assert texts(model, choices=()) == ["seven"]  # nothing asked for
        return
    with pytest.raises(RequestError) as error:
        texts(model, **parameters)
    assert words.encode("ascii", "backslashreplace").decode() in str(error.value)


@pytest.mark.parametrize(
    "regex",
    [
        "([a-z]{1,999}){1,999}",
        "((((a{1,99}){1,99}){1,99}){1,99})",
        "(.*a.{200}b.*)",
        "(a*)*(a*)*(a*)*b",
        "(" * 999 + "a" + ")" * 999,
    ],
)
def test_a_monstrous_expression_is_answered_or_refused(model: Model, regex: str) -> None:
    """Its neighbour is answered in any case."""
    neighbour, monster = (
        GenerationRequest("Write 7 in words.", GenerationParameters(max_new_tokens=60, regex=form))
        for form in (None, regex)
    )
    (future,) = model.submit([neighbour])
    try:
        model.generate([monster])
    except RequestError:
        pass
    assert future.result().text == "seven"


def test_slashes_and_line_ends_are_characters() -> None:
    guide = Guides(ByteTokenizer()).of(GenerationParameters(regex="a/b\\/\n(/|\\\\)"))
    assert guide is not None
    for byte in b"a/b/\n\\":
        assert byte + 3 in guide.allowed().tolist()
        guide.append(byte + 3)
    assert guide.allowed().tolist() == [1]


@settings(max_examples=60)
@given(
    st.from_regex(r"[ab]{0,3}(\[ab\]|\(a\|b\)|a)(\*|\+|\?|\{1,4\})?[ab]{0,2}", fullmatch=True),
    st.data(),
)
def test_a_guide_allows_what_the_expression_does(regex: str, data: st.DataObject) -> None:
    """Byte by byte, against Python's own matcher."""
    tokenizer = ByteTokenizer()
    text = data.draw(st.from_regex(regex, fullmatch=True).filter(str.isascii))
    guide = Guides(tokenizer).of(GenerationParameters(regex=regex))
    assert guide is not None
    for i, token in enumerate(tokenizer.encode(text)):
        allowed = guide.allowed().tolist()
        assert token in allowed, (text, i)
        assert (tokenizer.eos_token_id in allowed) == bool(re.fullmatch(regex, text[:i]))
        guide.append(token)


def test_a_fork_goes_on_by_itself(demo: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(demo, 512)
    guide = Guides(tokenizer).of(GenerationParameters(choices=["yes", "no"]))
    assert guide is not None
    yes, no = (tokenizer.encode(word) for word in ("yes", "no"))
    other = guide.fork()
    guide.append(yes[0])
    other.append(no[0])
    assert guide.allowed().tolist() == yes[1:2]
    assert other.allowed().tolist() == no[1:2]
