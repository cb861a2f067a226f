"""The entry point that DJLServing calls. It holds no state: DJL loads this file several times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from handler.service import service
from handler.steps import Step, Steps, unchanged

if TYPE_CHECKING:
    from djl_python.inputs import Input


def handle(inputs: Input) -> Any:
    """Answer one call of DJLServing, sync, batched or async; the empty first call loads."""
    return service.handle(inputs)


def with_steps(before: Step = unchanged, after: Step = unchanged) -> Callable[[Input], Any]:
    """A ``handle`` for a model.py of one's own, in each of DJLServing's modes.

    before: a request's JSON object -> the one that is answered; after: an answer's -> the one that
    the client gets. Both are quick, since others wait. A RequestError in them is the client's.
    """
    return partial(service.handle, steps=Steps(before, after))


def partition(inputs: Input) -> Any:
    """Partition the checkpoint, as DJLServing's partition command asks."""
    return service.partition(inputs)
