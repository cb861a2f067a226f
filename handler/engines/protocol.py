"""What an engine must be for the code above it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from handler.generation import Generation
from handler.sampling import Chosen, RowSampling
from handler.tokenizer import Tokenizer


class Engine(Protocol):
    """What both kinds have. An engine is called by one thread only.

    quality_warning: what is known to spoil its answers, or None.
    """

    tokenizer: Tokenizer
    max_rows: int

    @property
    def quality_warning(self) -> str | None: ...

    def close(self) -> None: ...


class BatchEngine(Engine, Protocol):
    """Runs whole generations, a batch at a time.

    supported_parameters: names of the parameters it honours; a request that uses another one is
    refused before it gets here. scores: it honours ``Generation.forced``. draws_seeds: it draws one
    for all requests of a batch that sample and give none, and tells it as ``Generation.seed``.
    """

    supported_parameters: frozenset[str]
    scores: bool
    draws_seeds: bool

    def batch_key(self, generation: Generation) -> Hashable | None:
        """Generations of equal keys may run in one batch; one whose key is None runs alone."""
        ...

    def generate(self, batch: Sequence[Generation]) -> None:
        """Run a batch of equal keys to its end: ``append`` to each until it says it is done.

        A generation that is ``done`` meanwhile (cancelled) needs no more tokens. An exception
        fails the whole batch.
        """
        ...


class Sampler(Protocol):
    """Chooses tokens where an engine's logits are, in the host's memory or on a device."""

    def choose(
        self,
        logits: Any,
        rows: Sequence[RowSampling],
        steps: Sequence[int],
        eos_token_id: int,
        tokens_in_use: int | None = None,
    ) -> Callable[[], Chosen]:
        """Begin to choose what handler/sampling.py's ``choose_tokens`` says.

        What this returns waits for it and tells it, to the rows, too. It is called before the next
        ``choose``.
        """
        ...

    def on_host(self, logits: Any) -> npt.NDArray[np.float32]:
        """The same logits, for what is computed on the host alone."""
        ...


class StepEngine(Engine, Protocol):
    """Runs single decoding steps of a dense batch of rows.

    The rows that run are always 0..n-1. Limits are fixed at load and caches allocated once.
    encode_tokens: prompts are given to ``encode`` together up to this many tokens; a longer prompt
    comes alone. sampler: for the logits of ``decode``. runs_ahead: whether ``decode`` may return
    before its logits are there, so that a step can begin while the host is busy with the last one.
    """

    decoder_start_token_id: int
    max_input_tokens: int
    max_output_tokens: int
    encode_tokens: int
    sampler: Sampler
    runs_ahead: bool

    def encode(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[Any] | None]:
        """Run the encoder and make the cross-attention keys and values of each prompt.

        Yields None after each part of the work (rows decode in between), at the end the handles,
        one a prompt. A handle may be kept and attached to several rows; ``handle.nbytes`` is what
        keeping it takes.
        """
        ...

    def attach(self, handle: Any, row: int) -> None:
        """Let a row decode against a handle, from position 0."""
        ...

    def decode(
        self, n: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Any:
        """Tokens [n, q] of rows 0..n-1, the first at positions [n] -> logits [n, q, vocabulary].

        q is 1 for a decoding step; more tokens score a given continuation. Then, in an engine that
        runs ahead, a token of -1 - i is the i-th that ``sampler`` chose last. The vocabulary is the
        model's: ids from the tokenizer's size on are padding, of which none may be chosen. The
        caller may overwrite the result, which is good until the next call.
        """
        ...

    def move(self, src: int, dst: int) -> None:
        """Row dst becomes what row src is."""
        ...

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Each row goes on from the tokens of its parent, a row with the same handle."""
        ...

    def wait(self) -> None:
        """Until all that was asked for is computed."""
        ...
