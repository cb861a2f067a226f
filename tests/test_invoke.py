"""invoke: boto3 against our server as it stands in for an endpoint; streams torn anywhere."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from botocore.exceptions import EventStreamError
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as st
from sagemaker_double import error

from handler.cli import main
from handler.deployment.invoke import Asker, StreamReader, texts
from handler.errors import LoadError, RequestError

PROMPT = "Count from 3 to 9."


@pytest.fixture
def ask(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line but for the request. There are no credentials, and no region."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    return ["invoke", "any", "--endpoint-url", str(server.base_url)]


@pytest.fixture
def text(server: httpx.Client) -> str:
    answer: list[str] = server.post("/invocations", json={"inputs": PROMPT}).json()["outputs"]
    return answer[0]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_a_text(ask: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed([*ask, PROMPT], capsys) == text + "\n"


def test_a_request_in_json_is_answered_in_json(
    ask: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = json.dumps({"inputs": [PROMPT, "Write 7 in words."]})
    answer = json.loads(printed([*ask, "--json", request], capsys))
    assert answer == {"outputs": [text, "seven"]}


def test_a_request_in_a_file(
    ask: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"inputs": PROMPT}))
    assert json.loads(printed([*ask, "--file", str(file)], capsys)) == {"outputs": [text]}
    stdin = SimpleNamespace(buffer=io.BytesIO(file.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert json.loads(printed([*ask, "--file", "-"], capsys)) == {"outputs": [text]}
    assert "--file /none/x cannot be read: No such file" in error([*ask, "--file", "/none/x"])


def test_a_stream_is_printed_as_it_comes(
    ask: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert printed([*ask, "--stream", PROMPT], capsys) == text + "\n"
    flushes: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: flushes.append("".join(map(str, a))))
    main([*ask, "--stream", "--json", json.dumps({"inputs": PROMPT})])
    assert len(flushes) > 5
    assert "".join(flushes) == text


def test_what_is_no_stream_is_printed_whole(
    ask: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    request = json.dumps({"inputs": PROMPT, "stream": False})
    assert json.loads(printed([*ask, "--stream", "--json", request], capsys)) == {"outputs": [text]}


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_the_containers_own_error(ask: list[str], stream: list[str]) -> None:
    request = json.dumps({"inputs": PROMPT, "parameters": {"top_p": 2}})
    said = error([*ask, *stream, "--json", request])
    assert said.startswith(
        "error: endpoint any answered 400: parameter 'top_p' must be a number from 0 to 1"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json", "{"], "the request is not JSON: "),
        ([" "], "TEXT must not be empty or blank"),
        (["x", "--endpoint-url", "nowhere"], "--endpoint-url: Invalid endpoint: nowhere"),
        (["x", "--endpoint-url", "http://127.0.0.1:9"], "(or --endpoint-url) right"),
    ],
)
def test_an_error_is_one_line(ask: list[str], arguments: list[str], words: str) -> None:
    assert words in error([*ask, *arguments])


@pytest.mark.parametrize("arguments", [[], ["x", "--json", "{}"]], ids=["none", "two"])
def test_exactly_one_request(ask: list[str], arguments: list[str]) -> None:
    assert "invoke takes one of TEXT, --json and --file" in error([*ask, *arguments])


# What SageMaker itself answers


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> Asker:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return Asker("t5", "us-east-1")


@pytest.mark.parametrize(
    ("code", "message", "extra", "kind", "words"),
    [
        (
            "ModelError",
            'Received client error (503) from primary with message "{...}".',
            {"OriginalStatusCode": 503, "OriginalMessage": '{"code": 503, "error": "queue full"}'},
            RequestError,
            "endpoint t5 answered 503: queue full",
        ),
        (
            "ModelError",
            "Received server error (0) from primary: Your invocation timed out",
            {},
            RequestError,
            "endpoint t5 answered 424: Received server error (0) from primary: Your invocation",
        ),
        (
            "ValidationError",
            "Endpoint t5 of account 123456789012 not found.",
            {},
            LoadError,
            "there is no endpoint t5 in this region",
        ),
        (
            "AccessDeniedException",
            "User u is not authorized to perform: sagemaker:InvokeEndpoint",
            {},
            LoadError,
            "endpoint t5: User u is not authorized to perform: sagemaker:InvokeEndpoint",
        ),
        ("ThrottlingException", "Rate exceeded", {}, LoadError, "Rate exceeded"),
    ],
)
def test_what_sagemaker_refuses(
    asker: Asker, code: str, message: str, extra: dict[str, Any], kind: type, words: str
) -> None:
    with Stubber(asker._client) as stubber:
        stubber.add_client_error("invoke_endpoint", code, message, modeled_fields=extra)
        with pytest.raises(kind) as caught:
            asker.answer(b"{}")
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_stream_that_breaks_off(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    def events() -> Any:
        yield {"PayloadPart": {"Bytes": b'{"token": {"text": "on'}}
        yield {"PayloadPart": {"Bytes": b'e"}}\n'}}
        broken = {"Error": {"Code": "ModelStreamErrorException", "Message": "connection closed"}}
        raise EventStreamError(broken, "InvokeEndpointWithResponseStream")

    client = SimpleNamespace(invoke_endpoint_with_response_stream=lambda **_: {"Body": events()})
    monkeypatch.setattr(asker, "_client", client)
    stream = asker.stream(b"{}")
    assert next(stream) == "one"
    with pytest.raises(RequestError, match="the stream of t5 broke off: connection closed"):
        next(stream)


# Pieces


def read(pieces: list[bytes]) -> str:
    reader = StreamReader()
    read = [text for piece in pieces for text in reader.read(piece)]
    return "".join([*read, *reader.end()])


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=6),
    st.integers(1, 20),
    st.sampled_from(["lines", "events", "openai"]),
)
def test_wherever_a_stream_is_torn(tokens: list[str], size: int, form: str) -> None:
    def line(text: str) -> str:
        if form == "openai":
            return "data: " + json.dumps({"choices": [{"text": text}]}) + "\n\n"
        record = json.dumps({"token": {"id": 1, "text": text}}, ensure_ascii=False)
        return f"{record}\n" if form == "lines" else f"data: {record}\n\n"

    written = "".join(map(line, tokens)).encode() + b"data: [DONE]\n\n" * (form == "openai")
    pieces = [written[start : start + size] for start in range(0, len(written), size)]
    assert read(pieces) == "".join(tokens)


def test_the_last_line_needs_no_end() -> None:
    assert read([b'{"token": {"text": "a"}}\n{"token": {"text": "b"}}']) == "ab"


def test_special_tokens_are_not_text() -> None:
    assert read([b'{"token": {"text": "</s>", "special": true}, "generated_text": "x"}\n']) == ""


def test_an_error_in_the_middle_of_a_stream() -> None:
    reader = StreamReader()
    assert list(reader.read(b'{"token": {"text": "a"}}\n')) == ["a"]
    with pytest.raises(RequestError, match="deadline passed") as caught:
        list(reader.read(b'{"error": "deadline passed", "code": 504}\n'))
    assert caught.value.code == 504


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"outputs": ["a", "b"]}', ["a", "b"]),
        ('{"generated_text": "a"}', ["a"]),
        ('[{"generated_text": "a"}, {"generated_text": "b"}]', ["a", "b"]),
        ('{"other": 1}', ['{"other": 1}']),
        ("plain", ["plain"]),
    ],
)
def test_texts_of_every_schema(answer: str, expected: list[str]) -> None:
    assert texts(answer.encode()) == expected
