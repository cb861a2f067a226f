"""The entry point that DJLServing calls. It holds no state: DJL loads this file several times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from handler.service import service

if TYPE_CHECKING:
    from djl_python.inputs import Input


def handle(inputs: Input) -> Any:
    """Answer one call of DJLServing, sync, batched or async; the empty first call loads."""
    return service.handle(inputs)


def partition(inputs: Input) -> Any:
    """Partition the checkpoint, as DJLServing's partition command asks."""
    return service.partition(inputs)
