"""What a line of the input asks, and what its line of the output is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.answering import Wanted
from handler.errors import RequestError, nearest, shown
from handler.parameters import with_defaults
from handler.request_lines import parse_line
from handler.request_parsing import UnreadRequest, parse_body
from handler.responses import Reply
from handler.schemas.records import as_line, json_line


@dataclass(frozen=True)
class LineForm:
    """How lines are read and answered.

    parameters: for every line; what a line has itself comes before. input_field: None where a line
    is a request, or a string that is its ``inputs``; else the field of any object that is answered,
    in output_field beside its others.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    input_field: str | None = None
    output_field: str = "output"

    @property
    def wanted(self) -> Wanted:
        return Wanted() if self.input_field is None else Wanted(route="outputs")

    def request(self, line: bytes) -> UnreadRequest:
        return UnreadRequest(line, self._of_request if self.input_field is None else self._of_field)

    def answer(self, line: bytes, reply: Reply) -> bytes:
        """The line of the output."""
        if self.input_field is None:
            return as_line(reply.body.decode())
        record = parse_body(line)
        texts = json.loads(reply.body)["outputs"]
        is_one = isinstance(record[self.input_field], str) and len(texts) == 1
        return json_line({**record, self.output_field: texts[0] if is_one else texts})

    def _of_request(self, line: bytes) -> dict[str, Any]:
        fields = parse_line(line)
        own = fields.get("parameters")
        if not self.parameters or not isinstance(own, (dict, type(None))):
            return fields
        return {**fields, "parameters": with_defaults(own or {}, self.parameters)}

    def _of_field(self, line: bytes) -> dict[str, Any]:
        assert self.input_field is not None
        record = parse_body(line)
        if self.input_field not in record:
            hint = nearest(self.input_field, record)
            raise RequestError(
                f"the field {shown(self.input_field)} is missing"
                + (f"; did you mean {hint!r}?" if hint else "")
            )
        if self.output_field in record:
            raise RequestError(
                f"the field {shown(self.output_field)} is there already; name another one with "
                "--output-field"
            )
        return {"inputs": record[self.input_field], "parameters": dict(self.parameters)}
