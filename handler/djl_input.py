"""djl's Input -> the bodies of the requests that it holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djl_python.inputs import Input

# DJL's dynamic batch: batch_000.data, before 0.21 batch_0.data. Three digits are DJL's own limit,
# and keep small what is made of a client's form whose fields have such names.
_BATCH_KEY = re.compile(r"batch_(\d{1,3})\.")
_LARGEST_BATCH = 1000


def body_of(inputs: Input) -> bytes:
    """The body of a single request."""
    return bytes(inputs.get_as_bytes() or b"")


def header_of(inputs: Input, name: str) -> str:
    """A header of the client's: DJL hands them over as properties."""
    return str(inputs.get_property(name) or "")


def batched_bodies(inputs: Input) -> list[bytes] | None:
    """The bodies of DJL's dynamic batch, or None for a single request.

    Recognized by the content's keys alone: ``batch_size`` is a property, and a client's header of
    that name looks the same.
    """
    content: Any = inputs.get_content()
    keys = [content.key_at(i) for i in range(content.size())]
    matches = [_BATCH_KEY.match(key or "") for key in keys]
    indices = [int(match.group(1)) for match in matches if match]
    if not indices or len(indices) < len(keys):
        return None
    bodies: dict[int, bytes] = {}
    for position, index in enumerate(indices):
        if index not in bodies or keys[position].endswith(".data"):
            bodies[index] = bytes(content.value_at(position))
    size = max(max(indices) + 1, _told_batch_size(inputs))  # the last ones may have no content
    return [bodies.get(index, b"") for index in range(size)]


def _told_batch_size(inputs: Input) -> int:
    try:
        return min(int(inputs.get_property("batch_size")), _LARGEST_BATCH)
    except (TypeError, ValueError):
        return 0
