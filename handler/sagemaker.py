"""SageMaker's runtime API around an answer: what boto3's ``sagemaker-runtime`` reads.

Event streams: https://docs.aws.amazon.com/AmazonS3/latest/API/RESTSelectObjectAppendix.html
"""

from __future__ import annotations

import json
import struct
from binascii import crc32

from handler.responses import Reply

AWS_EVENT_STREAM = "application/vnd.amazon.eventstream"
# SageMaker's headers for what a response with an event stream as its body is in truth
ACCEPT, CONTENT_TYPE = "x-amzn-sagemaker-accept", "x-amzn-sagemaker-content-type"

_MODEL_ERROR = 424
_STRING = 7  # a header's type


def model_error(answer: Reply) -> Reply:
    """What SageMaker makes of a container's error: a ModelError that quotes it."""
    whose = "client" if answer.status < 500 else "server"
    text = answer.body.decode()
    body = {
        "ErrorCode": "CLIENT_ERROR_FROM_MODEL" if whose == "client" else "SERVER_ERROR_FROM_MODEL",
        "LogStreamArn": "",
        "Message": f'Received {whose} error ({answer.status}) from primary with message "{text}".',
        "OriginalMessage": text,
        "OriginalStatusCode": answer.status,
    }
    headers = {"content-type": "application/json", "x-amzn-errortype": "ModelError"}
    return Reply(json.dumps(body).encode(), _MODEL_ERROR, headers, answer.error)


def payload_part(payload: bytes) -> bytes:
    """A piece of an answer as a message of an event stream.

    total length, headers' length, CRC of these two; headers; payload; CRC of it all.
    """
    headers = b"".join(
        _header(name, value)
        for name, value in (
            (":message-type", "event"),
            (":event-type", "PayloadPart"),
            (":content-type", "application/octet-stream"),
        )
    )
    prelude = struct.pack("!II", 12 + len(headers) + len(payload) + 4, len(headers))
    prelude += struct.pack("!I", crc32(prelude))
    message = prelude + headers + payload
    return message + struct.pack("!I", crc32(message))


def _header(name: str, value: str) -> bytes:
    return struct.pack(
        f"!B{len(name)}sBH{len(value)}s",
        len(name),
        name.encode(),
        _STRING,
        len(value),
        value.encode(),
    )
