"""One rank of two that compute a model with kernels and graphs, as on GPUs, on which something
fails. Prints a line of JSON: what rank 0 answers, whether this rank has kernels, and whether it ran
graphs.

Arguments: the folder of the model, the rank, and what fails on this rank: nothing; kernels; graphs,
captured alone; meeting, when graphs are captured for both; stuck, which waits there for ever, as
NCCL does for a rank that is gone. MASTER_ADDR and MASTER_PORT are set as under MPI.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from handler.config import configuration_of
from handler.engines.torch_ranks import loading
from handler.engines.torch_t5 import kernels
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.fast_steps import Agree, speed_up
from handler.engines.torch_t5.part import LoadedPart
from handler.errors import LoadError
from handler.inference import Model
from handler.ranks import World
from handler.scheduler import Scheduler

LIMITS = {"max_rows": 2, "max_input_tokens": 32, "max_output_tokens": 16}
engines: list[TorchT5StepEngine] = []
replayed: set[Tensor] = set()


def engine_as_on_gpus(
    part: LoadedPart, fault: str, rows: int, agree: Agree | None
) -> TorchT5StepEngine:
    captures = 0

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        nonlocal captures
        captures += 1
        if (captures, fault) in [(2, "graphs"), (4, "meeting")]:
            raise MemoryError("no memory for graphs")
        if (captures, fault) == (4, "stuck"):
            time.sleep(1000)
        logits = step()

        def replay() -> None:
            replayed.add(logits)
            logits.copy_(step())

        return replay, logits

    engine = part.plain_engine(rows)
    engines.append(engine)
    speed_up(engine, part.model, agree, capture=capture)
    return engine


def main(folder: Path, rank: int, fault: str) -> None:
    logging.basicConfig(level=logging.INFO)
    if fault == "kernels":
        kernels._attention = {}  # no launch: a KeyError
    LoadedPart.engine = lambda part, rows, agree=None: engine_as_on_gpus(part, fault, rows, agree)  # type: ignore[method-assign]
    c = configuration_of(str(folder), tensor_parallel_degree=2, backend="torch", **LIMITS)
    told: dict[str, object] = {}
    try:
        if rank:
            loading.follow(folder, c, World(rank, 2)).run()
        else:
            engine = loading.lead(folder, c, World(rank, 2))
            model = Model(
                Scheduler(engine, 10), backend="torch", max_input_tokens=32, max_output_tokens=16
            )
            told["texts"] = model.pipeline_generate(["Write 7 in words."], max_new_tokens=3)
            model.close()
    except (LoadError, EOFError, MemoryError) as error:
        told["error"] = repr(error)
    told |= {"kernels": any(engine.has_kernels for engine in engines), "graphs": bool(replayed)}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
