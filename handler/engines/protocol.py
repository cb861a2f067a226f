"""What an engine must be for the code above it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from handler.generation import Generation
from handler.parameters import GenerationParameters
from handler.tokenizer import Tokenizer


class BatchEngine(Protocol):
    """Runs whole generations, a batch at a time. Called by one thread only.

    supported_parameters: names of the parameters it honours; a request that uses another one is
    refused before it gets here.
    """

    name: str
    tokenizer: Tokenizer
    max_rows: int
    supported_parameters: frozenset[str]

    def batch_key(self, parameters: GenerationParameters) -> Hashable | None:
        """Requests with equal keys may run in one batch; one whose key is None runs alone."""
        ...

    def generate(self, batch: Sequence[Generation]) -> None:
        """Run a batch of equal keys to its end: ``append`` to each until it says it is done.

        A generation that is ``done`` meanwhile (cancelled) needs no more tokens. An exception
        fails the whole batch.
        """
        ...

    def close(self) -> None: ...
