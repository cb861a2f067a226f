"""Encoded prompts that may come again, the least recently used forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any


class EncoderCache:
    """Handles of an engine's encoder by the prompt's tokens, within a budget of bytes.

    The engine's thread alone calls it; hits and misses are for any thread to read.
    """

    def __init__(self, budget: int) -> None:
        self.hits = 0
        self.misses = 0
        self._budget = budget
        self._used = 0
        self._handles: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def get(self, prompt_ids: Sequence[int]) -> Any | None:
        key = tuple(prompt_ids)
        handle = self._handles.get(key)
        if handle is None:
            self.misses += 1
            return None
        self.hits += 1
        self._handles.move_to_end(key)
        return handle

    def put(self, prompt_ids: Sequence[int], handle: Any) -> None:
        """Keep a handle, unless it is larger than the budget by itself."""
        key = tuple(prompt_ids)
        if key in self._handles or self._budget < handle.nbytes:
            return
        self._handles[key] = handle
        self._used += handle.nbytes
        while self._used > self._budget:
            _, forgotten = self._handles.popitem(last=False)
            self._used -= forgotten.nbytes
