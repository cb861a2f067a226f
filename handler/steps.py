"""What a user's own model.py does with a request before it is answered, and with its answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from handler.errors import RequestError
from handler.schemas.records import to_json

Step = Callable[[dict[str, Any]], dict[str, Any]]


def unchanged(content: dict[str, Any]) -> dict[str, Any]:
    return content


@dataclass(frozen=True)
class Steps:
    """before: a request's JSON object -> the one that is answered. after: likewise of an answer.

    A RequestError that a step raises is the client's answer; anything else is a 424. What is no
    JSON object is let through, to be refused as ever; streams and errors have no step after.
    """

    before: Step = unchanged
    after: Step = unchanged

    def request(self, body: bytes) -> bytes:
        """The body to answer. Raises what ``before`` raises, RequestError for what it returns."""
        if self.before is unchanged:
            return body
        try:
            content = json.loads(body)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # lines would pass by the steps
                raise RequestError(
                    "the body is several JSON texts, which this model.py does not take; send one"
                ) from error
            return body
        except (ValueError, RecursionError):
            return body
        if not isinstance(content, dict):
            return body
        return _written("before", self.before(content))

    def answer(self, body: bytes) -> bytes:
        """The body that the client gets; raises as ``request`` does."""
        if self.after is unchanged:
            return body
        content = json.loads(body)
        return _written("after", self.after(content)) if isinstance(content, dict) else body


NO_STEPS = Steps()


def _written(step: str, content: object) -> bytes:
    if not isinstance(content, dict):
        raise RequestError(
            f"{step} of model.py returned no dict, but {type(content).__name__}", 424
        )
    try:
        return to_json(content).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"what {step} of model.py returned is no JSON: {error}", 424) from error
