"""Kernels and CUDA graphs, which all ranks of a model decode with, or none.

Without them the answers are the same, later. A rank on which one of them fails would leave the
others waiting for it inside a step: so each tries alone first, and hears how the others fared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from handler.engines.torch_t5.cuda_graphs import Capture
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.model import T5
from handler.engines.torch_t5.tensor_parallel import apart

logger = logging.getLogger(__name__)

# (what was tried, why it failed on this rank) -> on which rank it failed, and why; or None.
# All ranks call it, and get the same.
Agree = Callable[[str, "str | None"], "str | None"]


def speed_up(
    engine: TorchT5StepEngine,
    model: T5,
    agree: Agree | None = None,
    *,
    graphs: bool = True,
    capture: Capture | None = None,
) -> None:
    """agree: None where no other rank computes ``model``. graphs: whether they can hold what the
    ranks do where they meet."""
    with apart(model):
        against = _agreed("kernels", _failure(engine.use_kernels), agree)
        if against is not None:
            engine.use_no_kernels()
            logger.warning("decoding is slower than it could be, without kernels: %s", against)
            return
        if not graphs:
            return
        against = _agreed("graphs", _failure(lambda: engine.use_graphs(capture)), agree)
        if against is not None:
            engine.use_no_graphs()
            logger.warning("decoding is slower than it could be, without CUDA graphs: %s", against)
            return
    if agree is not None:
        engine.use_no_graphs()  # first, so that memory is needed once
        engine.use_graphs(capture)


def _agreed(what: str, failure: str | None, agree: Agree | None) -> str | None:
    return failure if agree is None else agree(what, failure)


def _failure(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except Exception as error:  # Triton's compiler, the driver, too little memory
        return repr(error)
    return None
