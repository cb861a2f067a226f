"""Schemas: what a request looks like, and what its answer does. Each is in one file, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.schemas.choices import CHOICES, TARGETS, GivenAnswers
from handler.schemas.completions import Completions
from handler.schemas.generated_text import Lmi, Outputs, Tgi, TgiGenerate
from handler.schemas.protocol import Schema

COMPLETIONS, TGI, TGI_GENERATE, ROOT = "completions", "tgi", "generate", "root"
GIVEN = "given"

SCHEMAS: dict[str, Schema] = {
    "outputs": Outputs(),
    "lmi": Lmi(),
    TGI: Tgi(),
    TGI_GENERATE: TgiGenerate(),
    COMPLETIONS: Completions(),
    GIVEN: GivenAnswers(),
}


def recognized(body: Mapping[str, Any], configured: str, route: str | None) -> Schema:
    """The schema of a request.

    A route may have its own. Else a body with ``prompt`` is OpenAI's, one with ``choices`` or
    ``targets`` has given answers that are scored, and any other is answered as
    configured (option.response_schema), except one at the root that says ``stream``, true or
    false, as TGI's clients do.
    """
    if route in SCHEMAS:
        return SCHEMAS[route]
    if "prompt" in body and "inputs" not in body:
        return SCHEMAS[COMPLETIONS]
    if body.get(CHOICES) is not None or body.get(TARGETS) is not None:
        return SCHEMAS[GIVEN]
    return SCHEMAS[TGI if route == ROOT and "stream" in body else configured]


def schema_before_reading(configured: str, route: str | None) -> Schema:
    """The schema in which a body that cannot be read is refused."""
    return recognized({}, configured, route)
