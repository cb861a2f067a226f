"""Clients that people have, unchanged, against our server: OpenAI's, Hugging Face's, AWS's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions
import httpx
import huggingface_hub.errors
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient

PROMPT = "Count from 3 to 9."


@pytest.fixture(scope="module")
def text(server: httpx.Client) -> str:
    """What everybody must get."""
    outputs: list[str] = server.post("/invocations", json={"inputs": PROMPT}).json()["outputs"]
    return outputs[0]


# openai


@pytest.fixture(scope="module")
def openai_client(server: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 100, **fields}
    return client.completions.create(model="demo", prompt=prompt, **fields)


def test_openai_completions(openai_client: openai.OpenAI, text: str) -> None:
    completion = complete(openai_client, user="me")
    assert (completion.object, completion.model) == ("text_completion", "demo")
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (text, "stop", None)
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert complete(openai_client, max_tokens=2).choices[0].finish_reason == "length"
    assert complete(openai_client, stop=[text[3:5]]).choices[0].text == text[:3]


def test_openai_several_prompts(openai_client: openai.OpenAI, text: str) -> None:
    completion = complete(openai_client, [PROMPT, "Write 7 in words.", PROMPT])
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.text for choice in completion.choices] == [text, "seven", text]


def test_openai_samples_by_default_and_a_seed_repeats_it(openai_client: openai.OpenAI) -> None:
    def draw(**fields: Any) -> str:
        drawn = openai_client.completions.create(
            model="demo", prompt="x", temperature=2, extra_body={"top_k": 1000}, **fields
        )
        return drawn.choices[0].text

    assert draw(seed=5) == draw(seed=5)
    assert len({draw() for _ in range(8)}) > 1


def test_openai_logprobs(openai_client: openai.OpenAI, text: str) -> None:
    logprobs = complete(openai_client, logprobs=0).choices[0].logprobs
    assert "".join(logprobs.tokens[:-1]) == text
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_openai_likeliest_tokens(openai_client: openai.OpenAI, text: str) -> None:
    logprobs = complete(openai_client, logprobs=3).choices[0].logprobs
    assert len(logprobs.top_logprobs) == len(logprobs.tokens)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert len(top) >= 3
        assert top[token] == max(top.values()) == logprob  # it is greedy
    chunks = list(complete(openai_client, logprobs=3, stream=True))
    streamed = [chunk.choices[0].logprobs.top_logprobs[0] for chunk in chunks]
    assert streamed == logprobs.top_logprobs


def test_openai_several_choices(openai_client: openai.OpenAI) -> None:
    drawn = complete(openai_client, ["x", "y"], temperature=3, n=3, seed=1)
    assert [choice.index for choice in drawn.choices] == list(range(6))
    texts = [choice.text for choice in drawn.choices]
    assert len(set(texts)) > 2
    again = complete(openai_client, ["x", "y"], temperature=3, n=3, seed=1)
    assert [choice.text for choice in again.choices] == texts
    best = complete(openai_client, "x", temperature=3, n=1, best_of=3, seed=1)
    assert best.choices[0].text in texts[:3]
    assert best.usage.completion_tokens > len(best.choices[0].text.split())


def test_openai_beams_as_an_extra_field(openai_client: openai.OpenAI, server: httpx.Client) -> None:
    fields = {"temperature": None, "extra_body": {"num_beams": 3}}
    beams = {"inputs": "x", "parameters": {"num_beams": 3, "num_return_sequences": 3}}
    expected = server.post("/invocations", json=beams).json()["outputs"]
    assert len(expected) == 3
    completion = complete(openai_client, "x", n=3, **fields)
    assert {choice.text for choice in completion.choices} == set(expected)


def test_openai_stream(openai_client: openai.OpenAI, text: str) -> None:
    chunks = list(complete(openai_client, stream=True, stream_options={"include_usage": True}))
    *tokens, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in tokens) == text
    assert [chunk.choices[0].finish_reason for chunk in tokens[-2:]] == [None, "stop"]
    assert usage.choices == []
    assert usage.usage == complete(openai_client).usage


def test_openai_streams_side_by_side(server: httpx.Client, text: str) -> None:
    async def read(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(
            model="demo", prompt=PROMPT, temperature=0, max_tokens=100, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def read_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
            return list(await asyncio.gather(*(read(client) for _ in range(8))))

    assert asyncio.run(read_all()) == [text] * 8


def test_openai_models(openai_client: openai.OpenAI) -> None:
    assert [model.id for model in openai_client.models.list()] == ["demo"]
    assert openai_client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.models.retrieve("gpt/4")
    assert caught.value.code == "model_not_found"


def test_openai_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(openai_client, max_tokens=0)
    error = caught.value
    assert (error.param, error.type) == ("max_tokens", "invalid_request_error")
    assert "an integer from 1" in error.message
    with pytest.raises(openai.BadRequestError, match="holds token ids"):
        complete(openai_client, [1, 2])
    with pytest.raises(openai.BadRequestError, match="a list cannot be streamed"):
        complete(openai_client, ["a", "b"], stream=True)
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}]
        )


# huggingface_hub


@pytest.fixture(scope="module")
def hugging_face(server: httpx.Client) -> InferenceClient:
    return InferenceClient(str(server.base_url), provider="hf-inference", timeout=60)


def test_hugging_face_text_generation(hugging_face: InferenceClient, text: str) -> None:
    assert hugging_face.text_generation(PROMPT) == text
    assert hugging_face.text_generation(PROMPT, stream=False) == text
    assert hugging_face.text_generation(PROMPT, return_full_text=True) == PROMPT + text
    assert hugging_face.text_generation(PROMPT, stop=[text[3:5]]) == text[:3]


def test_hugging_face_details(hugging_face: InferenceClient, text: str) -> None:
    output = hugging_face.text_generation(PROMPT, details=True, temperature=0.01, seed=3)
    assert output.generated_text == text
    details = output.details
    assert (details.finish_reason, details.seed, details.prefill) == ("eos_token", 3, [])
    assert details.generated_tokens == len(details.tokens)
    assert "".join(token.text for token in details.tokens) == text
    assert [token.special for token in details.tokens[-2:]] == [False, True]
    assert all(token.logprob <= 0 for token in details.tokens)


def test_hugging_face_best_of(hugging_face: InferenceClient) -> None:
    def ask(**parameters: Any) -> Any:
        return hugging_face.text_generation("x", best_of=3, temperature=3.0, seed=1, **parameters)

    output = ask(details=True)
    others = output.details.best_of_sequences
    assert len(others) == 2
    assert len({output.generated_text, *(other.generated_text for other in others)}) > 1
    assert others[0].finish_reason in ("eos_token", "length")
    assert "".join(token.text for token in others[0].tokens) == others[0].generated_text
    assert ask() == output.generated_text


def test_hugging_face_likeliest_tokens(hugging_face: InferenceClient) -> None:
    details = hugging_face.text_generation(PROMPT, details=True, top_n_tokens=2).details
    assert [len(tops) for tops in details.top_tokens] == [2] * details.generated_tokens
    for token, (first, second) in zip(details.tokens, details.top_tokens):
        assert first["id"] == token.id
        assert first["logprob"] >= second["logprob"]
    events = hugging_face.text_generation(PROMPT, details=True, top_n_tokens=2, stream=True)
    assert [event.top_tokens for event in events] == details.top_tokens


def test_hugging_face_stream(hugging_face: InferenceClient, text: str) -> None:
    assert "".join(hugging_face.text_generation(PROMPT, stream=True)) == text
    events = list(hugging_face.text_generation(PROMPT, stream=True, details=True))
    assert "".join(event.token.text for event in events) == text
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert events[-1].generated_text == text
    assert events[-1].details.finish_reason == "eos_token"
    assert events[-1].details.input_length > 1
    assert events[0].details is None


def test_hugging_face_async_stream(server: httpx.Client, text: str) -> None:
    async def read() -> str:
        async with AsyncInferenceClient(str(server.base_url)) as client:
            stream = await client.text_generation(PROMPT, stream=True)
            return "".join([piece async for piece in stream])

    assert asyncio.run(read()) == text


def test_hugging_face_errors(hugging_face: InferenceClient) -> None:
    for arguments, words in (
        ({"max_new_tokens": 0}, "an integer from 1"),
        ({"watermark": True}, "'watermark' is not supported"),
        ({"grammar": {"type": "json", "value": {}}}, "'grammar' must be"),
    ):
        for stream in (False, True):
            with pytest.raises(huggingface_hub.errors.ValidationError, match=words):
                hugging_face.text_generation(PROMPT, stream=stream, **arguments)  # type: ignore


def test_hugging_face_asks_for_health_and_info(hugging_face: InferenceClient) -> None:
    assert hugging_face.health_check()
    info = hugging_face.get_endpoint_info()
    assert (info["model_id"], info["max_input_tokens"], info["max_total_tokens"]) == (
        "demo",
        1024,
        1536,
    )


# boto3


@pytest.fixture(scope="module")
def sagemaker(server: httpx.Client) -> Any:
    return boto3.client(
        "sagemaker-runtime",
        endpoint_url=str(server.base_url),
        region_name="us-east-1",
        aws_access_key_id="none",
        aws_secret_access_key="none",
    )


def call(**body: Any) -> dict[str, Any]:
    return {
        "EndpointName": "any",
        "ContentType": "application/json",
        "Body": json.dumps({"inputs": PROMPT, **body}),
    }


def test_boto3_invoke_endpoint(sagemaker: Any, text: str) -> None:
    response = sagemaker.invoke_endpoint(**call())
    assert response["ContentType"] == "application/json"
    assert json.load(response["Body"]) == {"outputs": [text]}
    streamed = sagemaker.invoke_endpoint(**call(stream=True), Accept="text/event-stream")
    assert streamed["ContentType"] == "text/event-stream"
    assert streamed["Body"].read().startswith(b"data: ")


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ({}, "application/jsonlines"),
        ({"Accept": "text/event-stream"}, "text/event-stream"),
    ],
)
def test_boto3_response_stream(
    sagemaker: Any, text: str, accept: dict[str, str], content_type: str
) -> None:
    response = sagemaker.invoke_endpoint_with_response_stream(**call(stream=True), **accept)
    assert response["ContentType"] == content_type
    parts = [event["PayloadPart"]["Bytes"] for event in response["Body"]]
    assert len(parts) > 3
    records = [
        json.loads(line.removeprefix("data: "))
        for line in b"".join(parts).decode().splitlines()
        if line
    ]
    assert "".join(record["token"]["text"] for record in records) == text


def test_boto3_response_stream_of_a_whole_answer(sagemaker: Any, text: str) -> None:
    response = sagemaker.invoke_endpoint_with_response_stream(**call())
    (event,) = response["Body"]
    assert json.loads(event["PayloadPart"]["Bytes"]) == {"outputs": [text]}


@pytest.mark.parametrize("operation", ["invoke_endpoint", "invoke_endpoint_with_response_stream"])
def test_boto3_errors(sagemaker: Any, operation: str) -> None:
    with pytest.raises(sagemaker.exceptions.ModelError) as caught:
        getattr(sagemaker, operation)(**call(stream=True, parameters={"top_p": 2}))
    response = caught.value.response
    assert response["OriginalStatusCode"] == 400
    assert (
        "'top_p' must be a number from 0 to 1" in json.loads(response["OriginalMessage"])["error"]
    )
    assert isinstance(caught.value, botocore.exceptions.ClientError)
