"""Kernels and CUDA graphs, which all ranks of a model decode with, or none.

Without them the answers are the same, later. A rank on which one of them fails would leave the
others waiting for it inside a step: so each tries alone first, and hears how the others fared. What
fails after that, where ranks meet, mostly fails on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from handler.engines.torch_t5.cuda_graphs import Capture
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.model import T5
from handler.engines.torch_t5.tensor_parallel import apart

logger = logging.getLogger(__name__)

# (what was tried, why it failed on this rank, for how many seconds that waits for the others) ->
# on which rank it failed, and why; or None. All ranks call it, and get the same. TimeoutError: the
# others have not come.
Agree = Callable[[str, "str | None", "float | None"], "str | None"]
# After a failure where ranks meet: the others failed as soon, or wait there for this one.
_TOGETHER_SECONDS = 10.0


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
        if not _all_can("kernels", engine.use_kernels, engine.use_no_kernels, agree) or not graphs:
            return
        if not _all_can("graphs", lambda: engine.use_graphs(capture), engine.use_no_graphs, agree):
            return
    if agree is not None:
        engine.use_no_graphs()  # first, so that memory is needed once
        _all_can(
            "graphs together",
            lambda: engine.use_graphs(capture),
            engine.use_no_graphs,
            agree,
            _TOGETHER_SECONDS,
        )


def _all_can(
    what: str,
    use: Callable[[], None],
    use_none: Callable[[], None],
    agree: Agree | None,
    patience: float | None = None,
) -> bool:
    """Use it on this rank; where it fails on any, go on without it on all."""
    against = None
    try:
        use()
    except Exception as error:  # Triton's compiler, the driver, too little memory
        against = repr(error)
    if agree is not None:
        against = agree(what, against, patience)
    if against is not None:
        use_none()
        logger.warning("decoding is slower than it could be, without %s: %s", what, against)
    return against is None
