"""The schemas outputs, lmi and tgi: whole answers and streams, field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from handler.continuation import TopToken
from handler.errors import RequestError
from handler.generation import GenerationResult, TokenEvent
from handler.schemas import SCHEMAS
from handler.schemas.protocol import Deployment, ParsedRequest
from handler.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SEVEN, EOS = TOKENIZER.encode_plain("7")[0], TOKENIZER.eos_token_id
RESULT = GenerationResult(
    text="7",
    token_ids=(SEVEN, EOS),
    log_probs=(-0.25, -0.5),
    finish_reason="eos_token",
    input_tokens=4,
)
OTHER = replace(RESULT, text="77", token_ids=(SEVEN, SEVEN), finish_reason="length")
BOTH = replace(RESULT, alternatives=(OTHER,))
WITH_TOPS = replace(RESULT, top_tokens=((TopToken(SEVEN, -0.25),), (TopToken(EOS, -0.5),)))

COMMON = {
    "finish_reason": "eos_token",
    "generated_tokens": 2,
    "input_tokens": 4,
    "truncated": False,
    "cumulative_log_prob": -0.75,
    "input_cached": False,
    "timing": {"waited_ms": 0.0, "generated_ms": 0.0},
}
OUR_TOKENS = [
    {"id": SEVEN, "text": "7", "log_prob": -0.25},
    {"id": EOS, "text": "</s>", "log_prob": -0.5},
]
LMI_TOKENS = [
    {"id": SEVEN, "text": "7", "log_prob": -0.25},
    {"id": EOS, "text": "", "log_prob": -0.5, "special_token": True},
]
TGI_TOKENS = [
    {"id": SEVEN, "text": "7", "logprob": -0.25, "special": False},
    {"id": EOS, "text": "", "logprob": -0.5, "special": True},
]
OUTPUTS_DETAILS = {**COMMON, "tokens": OUR_TOKENS}
LMI_DETAILS = {**COMMON, "inputs": "a", "tokens": LMI_TOKENS}
TGI_DETAILS = {**COMMON, "seed": None, "prefill": [], "tokens": TGI_TOKENS}
TGI_STREAM_DETAILS = {**COMMON, "seed": None, "input_length": 4}


def parsed(schema: str, inputs: Any, **parameters: Any) -> ParsedRequest:
    return SCHEMAS[schema].parse({"inputs": inputs, "parameters": parameters}, Deployment())


def answer(schema: str, inputs: Any, result: GenerationResult = RESULT, **parameters: Any) -> Any:
    request = parsed(schema, inputs, **parameters)
    return SCHEMAS[schema].answer(request, [result] * len(request.inputs), TOKENIZER)


@pytest.mark.parametrize(
    ("schema", "inputs", "details", "body"),
    [
        ("outputs", "a", False, {"outputs": ["7"]}),
        ("outputs", ["a", "b"], False, {"outputs": ["7", "7"]}),
        ("outputs", "a", True, {"outputs": ["7"], "details": [OUTPUTS_DETAILS]}),
        ("lmi", "a", False, {"generated_text": "7"}),
        ("lmi", "a", True, {"generated_text": "7", "details": LMI_DETAILS}),
        ("lmi", ["a"], False, [{"generated_text": "7"}]),
        ("lmi", ["a", "b"], False, [{"generated_text": "7"}] * 2),
        ("tgi", "a", False, [{"generated_text": "7"}]),
        ("tgi", "a", True, [{"generated_text": "7", "details": TGI_DETAILS}]),
        ("tgi", ["a", "b"], False, [{"generated_text": "7"}] * 2),
        ("generate", "a", True, {"generated_text": "7", "details": TGI_DETAILS}),
    ],
)
def test_answers(schema: str, inputs: Any, details: bool, body: Any) -> None:
    assert answer(schema, inputs, details=details) == body


def test_the_texts_of_several_sequences_of_a_prompt_follow_each_other() -> None:
    assert answer("outputs", ["a", "b"], BOTH) == {"outputs": ["7", "77", "7", "77"]}
    (first, second) = answer("outputs", "a", BOTH, details=True)["details"]
    assert first == OUTPUTS_DETAILS
    assert second["finish_reason"] == "length"


DETAILED: list[dict[str, Any]] = [
    {"details": True},
    {"return_log_probs": True},
    {"top_n_tokens": 1},
]


@pytest.mark.parametrize("asked", [*DETAILED, {"stream": True}], ids=str)
@pytest.mark.parametrize("schema", ["outputs", "lmi", "tgi", "generate"])
def test_log_probs_are_computed_for_answers_that_tell_them(
    schema: str, asked: dict[str, Any]
) -> None:
    assert not parsed(schema, "a").prompts[0].log_probs
    assert parsed(schema, "a", **asked).prompts[0].log_probs


@pytest.mark.parametrize("asked", DETAILED, ids=str)
@pytest.mark.parametrize("schema", ["outputs", "lmi", "generate"])
def test_what_asks_for_details(schema: str, asked: dict[str, Any]) -> None:
    assert "details" not in answer(schema, "a", WITH_TOPS)
    assert answer(schema, "a", WITH_TOPS, **asked) == answer(schema, "a", WITH_TOPS, details=True)


@pytest.mark.parametrize("schema", ["lmi", "generate"])
def test_further_sequences_are_in_the_details_asked_for_or_not(schema: str) -> None:
    body = answer(schema, "a", BOTH)
    assert body == answer(schema, "a", BOTH, details=True)
    (other,) = body["details"].pop("best_of_sequences")
    assert other.pop("generated_text") == "77"
    assert set(other) == set(body["details"])
    assert other["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("schema", "tops"),
    [
        ("outputs", [[OUR_TOKENS[0]], [OUR_TOKENS[1]]]),
        ("lmi", [[LMI_TOKENS[0]], [{**LMI_TOKENS[1], "text": "</s>"}]]),
        ("generate", [[TGI_TOKENS[0]], [{**TGI_TOKENS[1], "text": "</s>"}]]),
    ],
)
def test_the_likeliest_tokens_of_every_step(schema: str, tops: Any) -> None:
    details = answer(schema, "a", WITH_TOPS, details=True)["details"]
    assert (details[0] if schema == "outputs" else details)["top_tokens"] == tops


def test_token_texts_join_to_the_text() -> None:
    ids = tuple(TOKENIZER.encode("näh 東京"))
    result = replace(RESULT, text="näh 東京", token_ids=ids, log_probs=(-0.5,) * len(ids))
    tokens = answer("lmi", "a", result, details=True)["details"]["tokens"]
    assert "".join(token["text"] for token in tokens) == "näh 東京"


def test_the_full_text_begins_with_the_input_as_it_was_sent() -> None:
    request = SCHEMAS["lmi"].parse(
        {"inputs": "a", "template": "b {input}", "parameters": {"return_full_text": True}},
        Deployment(),
    )
    assert [prompt.input for prompt in request.prompts] == ["b a"]
    body = SCHEMAS["lmi"].answer(request, [RESULT], TOKENIZER)
    assert body == {"generated_text": "a7"}


def test_tgis_grammar_of_type_regex_is_the_parameter_regex() -> None:
    request = parsed("generate", "a", grammar={"type": "regex", "value": "[0-9]+"})
    assert request.parameters.regex == "[0-9]+"
    assert parsed("generate", "a", grammar=None).parameters.regex is None


def test_a_drawn_seed_is_told() -> None:
    request = parsed("generate", "a", temperature=1.0, details=True)
    body = SCHEMAS["generate"].answer(request, [RESULT], TOKENIZER)
    assert body["details"]["seed"] == request.prompts[0].parameters.seed is not None
    assert answer("generate", "a", temperature=1.0, seed=5, details=True)["details"]["seed"] == 5


def test_every_prompt_has_a_seed_of_its_own() -> None:
    seeds = {p.parameters.seed for p in parsed("outputs", ["a"] * 9, temperature=1.0).prompts}
    assert len(seeds) == 9
    seeds = {p.parameters.seed for p in parsed("outputs", ["a"] * 9, top_k=5, seed=3).prompts}
    assert seeds == {3}


@pytest.mark.parametrize("schema", ["outputs", "lmi", "tgi"])
def test_log_probs_that_json_cannot_tell_are_an_error(schema: str) -> None:
    for log_prob in (float("nan"), float("-inf")):
        result = replace(RESULT, log_probs=(-0.5, log_prob))
        with pytest.raises(RequestError, match=r"option\.dtype") as caught:
            answer(schema, "a", result, details=True)
        assert caught.value.code == 424


# Streams

EVENTS = [TokenEvent("7", SEVEN, -0.25), TokenEvent("", EOS, -0.5, RESULT)]


def records(schema: str, accept: str = "", **parameters: Any) -> tuple[str, list[Any]]:
    """The media type and the records of a stream of EVENTS."""
    request = parsed(schema, "a", stream=True, **parameters)
    writer = SCHEMAS[schema].stream(request, TOKENIZER, accept)
    pieces = [writer.token(event).decode() for event in EVENTS]
    if writer.media_type == "text/event-stream":
        assert all(p.startswith("data: ") and p.endswith("}\n\n") for p in pieces)
        return writer.media_type, [json.loads(p[len("data: ") :]) for p in pieces]
    assert all(p.endswith("}\n") and p.count("\n") == 1 for p in pieces)
    return writer.media_type, [json.loads(p) for p in pieces]


@pytest.mark.parametrize(
    ("schema", "accept", "media_type"),
    [
        ("outputs", "", "application/jsonlines"),
        ("outputs", "*/*", "application/jsonlines"),
        ("lmi", "application/json", "application/jsonlines"),
        ("outputs", "application/json, Text/Event-Stream;q=0.9", "text/event-stream"),
        ("lmi", "text/event-stream", "text/event-stream"),
        ("tgi", "", "text/event-stream"),
        ("generate", "*/*", "text/event-stream"),
        ("tgi", "application/jsonlines", "application/jsonlines"),
    ],
)
def test_the_client_may_choose_the_form(schema: str, accept: str, media_type: str) -> None:
    assert records(schema, accept)[0] == media_type


def test_lmis_json_lines() -> None:
    _, (first, last) = records("lmi")
    assert first == {"token": LMI_TOKENS[0]}
    assert last == {"token": LMI_TOKENS[1], "generated_text": "7"}
    _, (first, last) = records("lmi", details=True, return_full_text=True)
    assert first == {"token": LMI_TOKENS[0]}
    details = {**COMMON, "inputs": "a"}
    assert last == {"token": LMI_TOKENS[1], "generated_text": "a7", "details": details}


def test_tgis_events() -> None:
    nothing = {"generated_text": None, "details": None}
    _, (first, last) = records("tgi")
    assert first == {"index": 1, "token": TGI_TOKENS[0], **nothing}
    assert last == {"index": 2, "token": TGI_TOKENS[1], "generated_text": "7", "details": None}
    _, (_, last) = records("tgi", details=True)
    assert last["details"] == TGI_STREAM_DETAILS


def test_the_likeliest_tokens_of_a_streams_step() -> None:
    for schema, tokens in (("lmi", LMI_TOKENS), ("tgi", TGI_TOKENS)):
        request = parsed(schema, "a", stream=True)
        writer = SCHEMAS[schema].stream(request, TOKENIZER, "application/jsonlines")
        event = replace(EVENTS[0], top_tokens=(TopToken(SEVEN, -0.25),))
        assert json.loads(writer.token(event))["top_tokens"] == [
            tokens[0] if schema == "lmi" else LMI_TOKENS[0]
        ]


@pytest.mark.parametrize(
    ("schema", "piece"),
    [
        ("lmi", b'{"code": 504, "error": "late"}\n'),
        (
            "tgi",
            b'data: {"code": 504, "error": "late", "error_type": "incomplete_generation"}\n\n',
        ),
    ],
)
def test_an_error_is_a_record_of_the_stream(schema: str, piece: bytes) -> None:
    writer = SCHEMAS[schema].stream(parsed(schema, "a", stream=True), TOKENIZER, "")
    assert writer.error(RequestError("late", 504)) == piece


@pytest.mark.parametrize(
    ("schema", "name"), [("outputs", "log_prob"), ("lmi", "log_prob"), ("tgi", "logprob")]
)
def test_log_probs_that_the_engine_does_not_tell_are_null(schema: str, name: str) -> None:
    body = answer(schema, "a", replace(RESULT, log_probs=()), details=True)
    (item,) = body if schema == "tgi" else [body]
    (details,) = item["details"] if schema == "outputs" else [item["details"]]
    assert details["cumulative_log_prob"] is None
    assert [token[name] for token in details["tokens"]] == [None, None]
