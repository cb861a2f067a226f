"""The step engine on several ranks: rank 0, whose every call the others make, too."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from handler.engines.torch_ranks.ranks import RankLost, Ranks
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.kv_cache import EncodedPrompt

_T = TypeVar("_T")


class SharedPrompt:
    """An encoded prompt, of which each rank has its heads under this number."""

    def __init__(self, own: EncodedPrompt, number: int) -> None:
        self.own, self.number = own, number

    @property
    def nbytes(self) -> int:
        """On each rank."""
        return self.own.nbytes


class TensorParallelEngine:
    """See StepEngine. What fails on one rank leaves the others behind: then all are lost."""

    def __init__(self, engine: TorchT5StepEngine, ranks: Ranks) -> None:
        self.tokenizer = engine.tokenizer
        self.decoder_start_token_id = engine.decoder_start_token_id
        self.quality_warning = engine.quality_warning
        self.max_rows = engine.max_rows
        self.max_input_tokens = engine.max_input_tokens
        self.max_output_tokens = engine.max_output_tokens
        self.encode_tokens = engine.encode_tokens
        self.sampler = engine.sampler
        self.runs_ahead = engine.runs_ahead
        self._engine = engine
        self._ranks = ranks
        self._next_number = 0
        self._forgotten: deque[int] = deque()

    def when_lost(self, action: Callable[[str], None]) -> None:
        """Call this, once and from any thread, with what happened, should a rank be lost."""
        self._ranks.when_lost(action)

    def share(self, answer: object) -> None:
        """Give the other ranks what was answered; from any thread. See handler/following.py."""
        self._ranks.send("share", answer)

    def encode(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[SharedPrompt] | None]:
        first = self._next_number
        self._next_number += len(prompts)
        self._send("encode", prompts, first)
        parts = self._engine.encode(prompts)
        encoded = None
        while encoded is None:
            self._send("encode_part")
            encoded = self._own(lambda: next(parts))
            if encoded is None:
                yield None
        yield [self._shared(own, number) for number, own in enumerate(encoded, first)]

    def attach(self, handle: SharedPrompt, row: int) -> None:
        self._send("attach", handle.number, row)
        self._own(lambda: self._engine.attach(handle.own, row))

    def decode(
        self, n: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Any:
        self._send("decode", n, tokens, positions)
        return self._own(lambda: decode_on_all(self._engine, n, tokens, positions))

    def move(self, src: int, dst: int) -> None:
        self._send("move", src, dst)
        self._own(lambda: self._engine.move(src, dst))

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        self._send("reorder", rows, parents)
        self._own(lambda: self._engine.reorder(rows, parents))

    def wait(self) -> None:
        self._engine.wait()

    def close(self) -> None:
        self._ranks.say_goodbye()
        self._engine.close()  # NCCL waits for the CUDA graphs that hold its calls
        self._ranks.close()

    def _shared(self, own: EncodedPrompt, number: int) -> SharedPrompt:
        shared = SharedPrompt(own, number)
        # whoever drops it last, in whatever thread: the others are told before the next command
        weakref.finalize(shared, self._forgotten.append, number).atexit = False
        return shared

    def _send(self, command: str, *arguments: Any) -> None:
        if self._forgotten:
            count = len(self._forgotten)
            self._ranks.send("forget", [self._forgotten.popleft() for _ in range(count)])
        self._ranks.send(command, *arguments)

    def _own(self, call: Callable[[], _T]) -> _T:
        """Rank 0's part of what was sent."""
        try:
            return call()
        except BaseException as error:
            raise RankLost(self._ranks.blame(error)) from error


def decode_on_all(
    engine: TorchT5StepEngine,
    n: int,
    tokens: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> Any:
    """This rank's part of a step; tokens that only rank 0's device knows come to the others'."""
    if (tokens < 0).any():
        dist.broadcast(engine.chosen, 0)
    return engine.decode(n, tokens, positions)
