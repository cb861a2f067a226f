"""Prompts on their way to a row: through the encoder, or past it where it read them before."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from handler.encoder_cache import EncoderCache
from handler.generation import Generation, SharedEncoding

if TYPE_CHECKING:
    from handler.engines.protocol import StepEngine


class Ready(NamedTuple):
    """A generation that can have its rows."""

    generation: Generation
    handle: Any
    cached: bool


class PromptEncoder:
    """Runs an engine's encoder, on the engine's thread. One batch of prompts at a time."""

    def __init__(self, engine: StepEngine, cache: EncoderCache) -> None:
        self.generations: list[Generation] = []
        self._engine = engine
        self._cache = cache
        self._prompts: list[list[int]] = []
        self._shared: weakref.WeakSet[SharedEncoding] = weakref.WeakSet()
        self._parts: Iterator[Sequence[Any] | None] = iter(())

    def known(self, generation: Generation) -> Ready | None:
        """Without the encoder, where it has read this prompt."""
        shared = generation.encoding
        if shared is not None and shared.handle is not None:
            return self._ready(generation, shared.handle, True)
        handle = self._cache.get(generation.prompt_ids)
        return None if handle is None else self._ready(generation, handle, True)

    def begin(self, generations: list[Generation]) -> None:
        """Take the next batch; equal prompts are read once."""
        self.generations = generations
        self._prompts = [list(ids) for ids in {tuple(g.prompt_ids): None for g in generations}]
        self._parts = self._parts_of(self._prompts)

    def work(self) -> list[Ready]:
        """Do one part; after the last one all of the batch are ready.

        An error of the engine ends the batch; the caller fails ``generations`` and calls ``stop``.
        """
        if all(g.done for g in self.generations):
            self.stop()
            return []
        handles = next(self._parts)
        if handles is None:
            return []
        of_prompt = {tuple(ids): handle for ids, handle in zip(self._prompts, handles)}
        ready = []
        for generation in self.generations:
            if not generation.done:
                handle = of_prompt[tuple(generation.prompt_ids)]
                ready.append(self._ready(generation, handle, False))
        for ids, handle in of_prompt.items():
            self._cache.put(ids, handle)
        self.stop()
        return ready

    def stop(self) -> None:
        self.generations, self._prompts, self._parts = [], [], iter(())

    def _parts_of(self, prompts: list[list[int]]) -> Iterator[Sequence[Any] | None]:
        """The engine is asked with the first part, where its errors are expected."""
        yield from self._engine.encode(prompts)

    def _ready(self, generation: Generation, handle: Any, cached: bool) -> Ready:
        shared = generation.encoding
        if shared is not None:
            shared.users -= 1
            self._share(shared, handle)
        return Ready(generation, handle, cached)

    def _share(self, shared: SharedEncoding, handle: Any) -> None:
        """Keep the handle for those that come; of more prompts than rows it is read again."""
        if shared.users == 0:
            shared.handle = None
            self._shared.discard(shared)
        elif shared.handle is None and len(self._shared) < self._engine.max_rows:
            shared.handle = handle
            self._shared.add(shared)
