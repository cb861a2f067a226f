"""SageMaker's event streams, read by botocore's decoder; its errors."""

from __future__ import annotations

import json

from botocore.eventstream import EventStreamBuffer
from hypothesis import given
from hypothesis import strategies as st

from handler.responses import Reply
from handler.sagemaker import model_error, payload_part


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 50))
def test_messages_come_through_wherever_they_are_torn(payloads: list[bytes], size: int) -> None:
    """botocore checks lengths and both checksums."""
    written = b"".join(map(payload_part, payloads))
    buffer = EventStreamBuffer()
    found = []
    for start in range(0, len(written), size):
        buffer.add_data(written[start : start + size])
        found += list(buffer)
    assert [message.payload for message in found] == payloads
    for message in found:
        assert message.headers == {
            ":message-type": "event",
            ":event-type": "PayloadPart",
            ":content-type": "application/octet-stream",
        }


def test_an_error_is_quoted() -> None:
    answer = model_error(Reply(b'{"error": "full"}', 503, error="full"))
    assert answer.status == 424
    assert answer.headers["x-amzn-errortype"] == "ModelError"
    body = json.loads(answer.body)
    assert body["OriginalStatusCode"] == 503
    assert body["OriginalMessage"] == '{"error": "full"}'
    assert body["Message"].startswith("Received server error (503) from primary with message ")
