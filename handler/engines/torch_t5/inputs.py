"""What a decoding step reads, where it always finds it: a CUDA graph knows no other place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class StepInputs:
    """The token and the position of each row, on the device.

    chosen [max_rows]: where a sampler leaves the tokens that it chooses, from which a step can take
    them without the host.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._max_rows = max_rows
        # tokens chosen here, tokens of the host; which of all these each row reads; its position
        self._numbers = torch.zeros(4, max_rows, dtype=torch.int64, device=device)
        self.chosen = self._numbers[0]

    def fill(self, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> None:
        """tokens [n, 1], of which -1 - i is the i-th chosen one; positions [n]"""
        n = len(positions)
        numbers = np.zeros((3, self._max_rows), np.int64)
        given = numbers[0, :n] = tokens[:, 0]
        numbers[1, :n] = np.where(given < 0, -1 - given, self._max_rows + np.arange(n))
        numbers[2, :n] = positions
        self._numbers[1:].copy_(pinned(numbers, self._numbers.device), non_blocking=True)

    def of(self, rows: int) -> tuple[Tensor, Tensor]:
        """tokens [rows, 1], positions [rows]; of rows that nothing was filled in for, any."""
        known = self._numbers[:2].view(-1)
        return known[self._numbers[2, :rows, None]], self._numbers[3, :rows]


def on_device(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The same there, without waiting for what it does."""
    return pinned(numbers, device).to(device, non_blocking=True)


def pinned(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Where a GPU copies them from by itself. torch does not use that memory for anything else
    before it has."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory() if device.type == "cuda" else tensor
