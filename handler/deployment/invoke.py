"""Asks an endpoint, or a local server in its place; reads whole answers and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from handler.deployment.aws import (
    advice_without_answer,
    error_code,
    error_message,
    is_missing,
    new_session,
)
from handler.errors import LoadError, RequestError, one_line

# SageMaker gives a container 60 s for an answer, and as long for each piece of a stream.
_READ_SECONDS = 70
_LOCAL_REGION = "us-east-1"
_MODEL_ERROR = 424


class Asker:
    """One endpoint. endpoint_url: of a server that answers as SageMaker's runtime does.

    To a plain http:// address nothing is signed, so that it needs no credentials.
    """

    def __init__(self, name: str, region: str | None, endpoint_url: str | None = None) -> None:
        self._name = name
        session = new_session(region or _LOCAL_REGION)
        from botocore import UNSIGNED
        from botocore.config import Config

        # never twice: an endpoint that is too slow would generate the same text again
        config = Config(read_timeout=_READ_SECONDS, retries={"total_max_attempts": 1})
        if endpoint_url and endpoint_url.startswith("http://"):
            config = config.merge(Config(signature_version=UNSIGNED))
        try:
            self._client = session.client(
                "sagemaker-runtime", endpoint_url=endpoint_url, config=config
            )
        except ValueError as error:
            raise LoadError(f"--endpoint-url: {error}") from error

    def answer(self, body: bytes) -> bytes:
        """Raises RequestError with the container's status, LoadError where it was not reached."""
        try:
            answer = self._client.invoke_endpoint(**self._request(body))
            return bytes(answer["Body"].read())
        except Exception as error:
            raise self._told(error) from error

    def stream(self, body: bytes) -> Iterator[str]:
        """Pieces of text as they come; the whole body of an answer that is no stream.

        Raises as ``answer`` does, also in the middle.
        """
        reader = StreamReader()
        try:
            answer = self._client.invoke_endpoint_with_response_stream(**self._request(body))
            for event in answer["Body"]:
                yield from reader.read(event.get("PayloadPart", {}).get("Bytes", b""))
            yield from reader.end()
        except RequestError:
            raise
        except Exception as error:
            raise self._told(error) from error

    def _request(self, body: bytes) -> dict[str, Any]:
        return {"EndpointName": self._name, "ContentType": "application/json", "Body": body}

    def _told(self, error: Exception) -> Exception:
        from botocore.exceptions import ClientError, HTTPClientError

        code, message = error_code(error), error_message(error)
        response = getattr(error, "response", None) or {}
        if code == "ModelError":
            status = int(response.get("OriginalStatusCode") or _MODEL_ERROR)
            said = _reason(str(response.get("OriginalMessage") or message))
            return RequestError(f"endpoint {self._name} answered {status}: {said}", status)
        if code in ("ModelStreamErrorException", "ModelStreamError", "InternalStreamFailure"):
            return RequestError(f"the stream of {self._name} broke off: {message}", _MODEL_ERROR)
        if is_missing(error) or (code == "ValidationError" and "not found" in message):
            return LoadError(f"there is no endpoint {self._name} in this region: {message}")
        if isinstance(error, ClientError):
            return LoadError(f"endpoint {self._name}: {message} ({code})")
        if isinstance(error, HTTPClientError) or type(error).__module__.startswith("botocore"):
            return LoadError(f"endpoint {self._name}: {advice_without_answer(error)}")
        return error


class StreamReader:
    """JSON lines or server-sent events in pieces that end anywhere -> the texts of their tokens."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, piece: bytes) -> Iterator[str]:
        """Texts of the lines that the piece completes. Raises RequestError for one that is such."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            yield from _text_of_line(line)

    def end(self) -> Iterator[str]:
        yield from _text_of_line(self._rest)
        self._rest = b""


def _text_of_line(line: bytes) -> Iterator[str]:
    text = line.decode("utf-8", "replace").strip()
    if text.startswith("data:"):
        text = text[len("data:") :].strip()
    if not text or text == "[DONE]" or text.startswith((":", "event:", "id:", "retry:")):
        return
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        yield text
    elif "error" in record:
        code = record.get("code")
        raise RequestError(_reason(text), code if isinstance(code, int) else _MODEL_ERROR)
    elif isinstance(record.get("token"), dict):
        token = record["token"]
        yield "" if token.get("special") else str(token.get("text", ""))
    elif isinstance(record.get("choices"), list):  # OpenAI's
        yield "".join(str(choice.get("text", "")) for choice in record["choices"])
    else:
        yield text


def request_body(
    text: str | None, json_text: str | None, content: bytes | None, stream: bool
) -> bytes:
    """The body for exactly one of a prompt, a JSON text, a file's content. Raises RequestError.

    stream: asks for one, where the body is an object that does not say itself.
    """
    if text is not None:
        body: Any = {"inputs": text}
    else:
        raw = content if content is not None else (json_text or "").encode()
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request is not JSON: {error}") from error
    if stream and isinstance(body, dict):
        body.setdefault("stream", True)
    return json.dumps(body).encode()


def texts(answer: bytes) -> list[str]:
    """What was generated, in any of our schemas; the answer itself where it is another."""
    whole = answer.decode("utf-8", "replace")
    try:
        value = json.loads(whole)
    except ValueError:
        return [whole]
    if isinstance(value, dict) and isinstance(value.get("outputs"), list):
        return [str(each) for each in value["outputs"]]
    entries = value if isinstance(value, list) else [value]
    if all(isinstance(entry, dict) and "generated_text" in entry for entry in entries):
        return [str(entry["generated_text"]) for entry in entries]
    return [whole]


def _reason(text: str) -> str:
    """The error in a body as DJLServing and our handler write them, in one line."""
    try:
        body = json.loads(text)
        return one_line(str(body.get("error") or body.get("message") or text))
    except (ValueError, AttributeError, RecursionError):
        return one_line(text)
