"""Decoding steps as CUDA graphs: one for each of a few numbers of rows, captured at load.

A step launches hundreds of small kernels, which takes the host longer than the GPU computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# n, whose inputs are at their place on the device -> logits [n, 1, vocabulary]
Step = Callable[[int], Tensor]
# What computes the step again, from the same tensors into the one that it returns.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CudaGraphs:
    """A step over 1 to max_rows rows. Rows beyond n up to the next captured number run, too, from
    position 0: nobody reads what they come to, and whoever begins there writes over it."""

    def __init__(
        self, step: Step, max_rows: int, device: torch.device, capture: Capture | None = None
    ) -> None:
        start, before = time.monotonic(), _memory(device)
        capture = capture or _Capture(device)
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        for rows in reversed(row_counts(max_rows)):  # the largest first: others use its memory
            self._graphs[rows] = capture(partial(step, rows))
        self._counts = sorted(self._graphs)
        logger.info(
            "%d CUDA graphs of up to %d rows captured in %.1f s, %.0f MiB",
            len(self._graphs),
            max_rows,
            time.monotonic() - start,
            (_memory(device) - before) / 2**20,
        )

    def run(self, n: int) -> Tensor:
        """Logits [n, 1, vocabulary], good until the next call"""
        rows = next(count for count in self._counts if count >= n)
        replay, logits = self._graphs[rows]
        replay()
        return logits[:n]


def row_counts(max_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 8th up to 32 and every 16th: little is computed for nobody."""
    counts = {1, 2, 4, *range(8, 33, 8), *range(48, max_rows, 16), max_rows}
    return sorted(count for count in counts if count <= max_rows)


class _Capture:
    """Captures steps that share one pool of memory, since only one runs at a time, and one stream,
    for each of which cuBLAS has a workspace."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # kernels are compiled and workspaces made before
            step()
        graph = torch.cuda.CUDAGraph()
        # meanwhile another thread, of another model or of NCCL, may call CUDA as it likes
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            logits = step()
        return graph.replay, logits


def _memory(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
