"""What a schema must be, and what a request is once it was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from handler.errors import RequestError
from handler.generation import GenerationRequest, GenerationResult, ScoreRequest, TokenEvent
from handler.parameter_limits import ParameterLimits
from handler.parameters import GenerationParameters, random_seed
from handler.tokenizer import Tokenizer


@dataclass(frozen=True)
class Deployment:
    """What a request is read against.

    model_name: what answers call the model. new_seed: draws one for a request that gives none;
    None where the engine does.
    """

    limits: ParameterLimits = ParameterLimits()
    prompt_template: str = "{input}"
    model_name: str = "model"
    new_seed: Callable[[], int | None] = random_seed


@dataclass(frozen=True)
class ParsedRequest:
    """One client's request.

    inputs: its texts as it sent them; prompts: the same as the model reads them, in their order.
    """

    inputs: tuple[str, ...]
    is_list: bool
    parameters: GenerationParameters
    prompts: tuple[GenerationRequest | ScoreRequest, ...]


class StreamWriter(Protocol):
    """Writes one answer token by token. Each piece of bytes is whole records, in whole UTF-8."""

    media_type: str

    def token(self, event: TokenEvent) -> bytes:
        """The token's record; with the last one whatever ends the stream."""
        ...

    def error(self, error: RequestError) -> bytes:
        """The record that ends a stream which failed."""
        ...


class Schema(Protocol):
    """One form of requests and answers. It has no state: one object serves every request."""

    def parse(self, body: Mapping[str, Any], deployment: Deployment) -> ParsedRequest:
        """Raises RequestError: what was wrong, the value seen, what is allowed."""
        ...

    def answer(
        self, request: ParsedRequest, results: Sequence[GenerationResult], tokenizer: Tokenizer
    ) -> Any:
        """The JSON value of a whole answer, given a result for each of the request's prompts.

        Raises RequestError for results that JSON cannot tell.
        """
        ...

    def stream(self, request: ParsedRequest, tokenizer: Tokenizer, accept: str) -> StreamWriter:
        """What writes the answer to a request with one prompt as a stream.

        accept: the client's header of that name, which may choose among the schema's forms.
        """
        ...

    def worded(self, error: RequestError) -> RequestError:
        """The error with the schema's own names for what it speaks of."""
        ...

    def error(self, error: RequestError) -> dict[str, Any]:
        """The JSON value of an error."""
        ...
