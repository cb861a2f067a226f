"""OpenAI's completions schema: what a request means, and the answer field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from handler.continuation import TopToken
from handler.errors import RequestError
from handler.generation import GenerationRequest, GenerationResult, TokenEvent
from handler.parameter_limits import ParameterLimits
from handler.parameters import GenerationParameters
from handler.schemas import SCHEMAS
from handler.schemas.completions import CompletionRequest
from handler.schemas.protocol import Deployment
from handler.tokenizer import ByteTokenizer

COMPLETIONS = SCHEMAS["completions"]
TOKENIZER = ByteTokenizer()
A, B = TOKENIZER.encode_plain("ab")
EOS = TOKENIZER.eos_token_id
RESULT = GenerationResult("ab", (A, B, EOS), (-0.5, -0.25, -0.25), "eos_token", input_tokens=4)


def parsed(prompt: Any = "x", **fields: Any) -> CompletionRequest:
    request = COMPLETIONS.parse({"prompt": prompt, **fields}, Deployment())
    assert isinstance(request, CompletionRequest)
    return request


def parameters_of(**fields: Any) -> GenerationParameters:
    return parsed(**fields).parameters


def answer(*results: GenerationResult, prompt: Any = "x", **fields: Any) -> Any:
    return COMPLETIONS.answer(parsed(prompt, **fields), results or [RESULT], TOKENIZER)


# Requests


def test_defaults_are_openais() -> None:
    p = parameters_of()
    assert (p.max_new_tokens, p.temperature, p.samples) == (16, 1.0, True)
    limits = ParameterLimits(max_output_tokens=5)
    request = COMPLETIONS.parse({"prompt": "x"}, Deployment(limits))
    assert request.parameters.max_new_tokens == 5


@pytest.mark.parametrize(
    ("fields", "told"),
    [({}, False), ({"stream": True}, False), ({"logprobs": 0}, True), ({"logprobs": 2}, True)],
    ids=str,
)
def test_log_probs_are_computed_for_answers_that_tell_them(
    fields: dict[str, Any], told: bool
) -> None:
    (request,) = parsed(**fields).prompts
    assert isinstance(request, GenerationRequest)
    assert request.log_probs == told


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"max_tokens": 7}, {"max_new_tokens": 7}),
        ({"temperature": 0}, {"samples": False}),
        ({"top_p": 0.5}, {"samples": True, "top_p": 0.5}),
        ({"top_p": 0}, {"samples": False}),
        ({"stop": "a"}, {"stop_sequences": ("a",)}),
        ({"stop": ["a", "b"]}, {"stop_sequences": ("a", "b")}),
        ({"seed": 5}, {"seed": 5}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"presence_penalty": 0.5, "frequency_penalty": -1}, {"presence_penalty": 0.5}),
        ({"logprobs": 3}, {"top_n_tokens": 3}),
        ({"n": 2}, {"num_return_sequences": 2}),
        ({"n": 2, "best_of": 3}, {"num_return_sequences": 3}),
        ({"stream": True}, {"stream": True}),
        ({"top_k": 5, "repetition_penalty": 1.5}, {"top_k": 5, "repetition_penalty": 1.5}),
        ({"num_beams": 4}, {"samples": False, "num_beams": 4}),
        ({"num_beams": 4, "temperature": 2}, {"samples": True, "temperature": 2.0}),
        ({"echo": False, "suffix": "", "logit_bias": {}, "user": "me"}, {"samples": True}),
        (
            dict.fromkeys(["echo", "suffix", "logit_bias", "n", "stop", "logprobs"]),
            {"stream": False},
        ),
    ],
    ids=str,
)
def test_fields_are_read(fields: dict[str, Any], values: dict[str, Any]) -> None:
    p = parameters_of(**fields)
    assert {name: getattr(p, name) for name in values} == values


def test_prompts_go_into_the_template() -> None:
    deployment = Deployment(prompt_template="Sort: {input}")
    request = COMPLETIONS.parse({"prompt": ["a", "{b}"]}, deployment)
    assert [prompt.input for prompt in request.prompts] == ["Sort: a", "Sort: {b}"]


# Answers


def test_an_answer() -> None:
    body = answer(model="some")
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "some",
        "choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
    }
    assert answer()["model"] == "model"


@pytest.mark.parametrize(
    ("reason", "told"), [("eos_token", "stop"), ("stop_sequence", "stop"), ("length", "length")]
)
def test_why_an_answer_ended(reason: str, told: str) -> None:
    body = answer(replace(RESULT, finish_reason=reason))
    assert body["choices"][0]["finish_reason"] == told


def test_choices_of_several_prompts_follow_each_other() -> None:
    both = replace(RESULT, alternatives=(replace(RESULT, text="c"),))
    body = answer(both, both, prompt=["x", "y"], n=2)
    told = [(choice["index"], choice["text"]) for choice in body["choices"]]
    assert told == [(0, "ab"), (1, "c"), (2, "ab"), (3, "c")]
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}


def test_best_of_keeps_the_likeliest_by_token() -> None:
    others = tuple(
        replace(RESULT, text=text, log_probs=(log_prob,) * 3)
        for text, log_prob in (("worst", -9.0), ("best", -0.1))
    )
    body = answer(replace(RESULT, alternatives=others), n=2, best_of=3)
    assert [choice["text"] for choice in body["choices"]] == ["best", "ab"]
    assert body["usage"]["completion_tokens"] == 9


def test_logprobs() -> None:
    assert answer(logprobs=0)["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "</s>"],
        "token_logprobs": [-0.5, -0.25, -0.25],
        "top_logprobs": None,
        "text_offset": [0, 1, 2],
    }


def test_logprobs_of_the_likeliest() -> None:
    tops = (
        (TopToken(B, -0.25), TopToken(A, -0.5)),
        (TopToken(A, -3.0),),  # the chosen one is told in any case
        (TopToken(EOS, -0.25),),
    )
    logprobs = answer(replace(RESULT, top_tokens=tops), logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [
        {"a": -0.5, "b": -0.25},
        {"b": -0.25, "a": -3.0},
        {"</s>": -0.25},
    ]


# Streams

EVENTS = [TokenEvent("a", A, -0.5), TokenEvent("b", B, -0.25), TokenEvent("", EOS, -0.25, RESULT)]


def stream(**fields: Any) -> list[Any]:
    writer = COMPLETIONS.stream(parsed(stream=True, **fields), TOKENIZER, "application/json")
    assert writer.media_type == "text/event-stream"
    written = b"".join(map(writer.token, EVENTS)).decode()
    *events, done, end = written.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream() -> None:
    events = stream(model="some")
    assert len({event.pop("id") for event in events}) == 1
    assert len({event.pop("created") for event in events}) == 1
    told = [(event["choices"][0]["text"], event["choices"][0]["finish_reason"]) for event in events]
    assert told == [("a", None), ("b", None), ("", "stop")]
    choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
    assert events[0] == {"object": "text_completion", "model": "some", "choices": [choice]}


def test_usage_at_the_end_of_a_stream() -> None:
    *events, last = stream(stream_options={"include_usage": True})
    assert [event["usage"] for event in events] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_logprobs_of_a_stream_join_to_those_of_the_whole_answer() -> None:
    each = [event["choices"][0]["logprobs"] for event in stream(logprobs=0)]
    whole = answer(logprobs=0)["choices"][0]["logprobs"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for logprobs in each for value in logprobs[name]] == whole[name]


# Errors


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        (400, "invalid_request_error", None),
        (424, "server_error", "engine_failed"),
        (503, "server_error", "overloaded"),
        (504, "server_error", "timeout"),
        (507, "server_error", "out_of_memory"),
    ],
)
def test_errors(code: int, kind: str, told: str | None) -> None:
    error = RequestError("parameter 'n' must be at least 1", code)
    body = {"message": str(error), "type": kind, "param": "n", "code": told}
    assert COMPLETIONS.error(error) == {"error": body}
    writer = COMPLETIONS.stream(parsed(stream=True), TOKENIZER, "")
    assert writer.error(error) == b"data: " + json.dumps({"error": body}).encode() + b"\n\n"


def test_an_error_names_the_clients_own_field() -> None:
    error = COMPLETIONS.error(RequestError("inputs[1]: the input has 5000 tokens"))["error"]
    assert error["message"] == "prompt[1]: the input has 5000 tokens"
