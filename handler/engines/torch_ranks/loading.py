"""A model on several ranks of one host, from their start until all are ready."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.splits import check_degree
from handler.config import Configuration
from handler.engines.torch_ranks.engine import TensorParallelEngine
from handler.engines.torch_ranks.rank import Follower
from handler.engines.torch_ranks.ranks import (
    Ranks,
    process_group,
    refuse_another_model,
    start_processes,
)
from handler.engines.torch_t5 import DEGREE
from handler.engines.torch_t5.part import load_part
from handler.errors import LoadError
from handler.ranks import World, meeting_place


def start(folder: Path, c: Configuration, degree: int) -> TensorParallelEngine:
    """The engine of this process, rank 0, and of the others, which it starts. Raises LoadError."""
    refuse_another_model()
    store = TCPStore("127.0.0.1", 0, degree, True, wait_for_workers=False)
    ranks = Ranks(degree, start_processes(folder, c, degree, store.port))
    return _load_together(folder, c, store, ranks)


def lead(
    folder: Path, c: Configuration, world: World, device: torch.device | None = None
) -> TensorParallelEngine:
    """The engine of MPI rank 0. device: see load_part. Raises LoadError."""
    _check_ranks(folder, c, world)
    return _load_together(folder, c, meeting_place(world), Ranks(world.size), device)


def follow(
    folder: Path, c: Configuration, world: World, device: torch.device | None = None
) -> Follower:
    """What an MPI rank > 0 has of the engine. device: see load_part. Raises LoadError."""
    _check_ranks(folder, c, world)
    try:
        return Follower(folder, c, world.rank, world.size, meeting_place(world), device)
    except EOFError:
        raise LoadError(f"rank 0 of {world.size} is gone, its log says why") from None


def _check_ranks(folder: Path, c: Configuration, world: World) -> None:
    """Raises LoadError."""
    if c.tensor_parallel_degree not in (world.size, "max"):
        raise LoadError(
            f"{DEGREE}={c.tensor_parallel_degree} needs as many MPI ranks, mpirun started "
            f"{world.size}; set it to {world.size}"
        )
    check_degree(T5Architecture.from_config(model_config(folder)), world.size, DEGREE)


def _load_together(
    folder: Path,
    c: Configuration,
    store: TCPStore,
    ranks: Ranks,
    device: torch.device | None = None,
) -> TensorParallelEngine:
    """Rank 0's part of the model, and the others' when they have theirs."""
    try:
        ranks.meet(store)
        part = load_part(folder, c, 0, ranks.size, device)
        rows = min(part.rows, *ranks.all_told("loaded"))
        ranks.send("join", rows)
        with ranks.ending_if_stuck():
            part.join(process_group(store, 0, ranks.size, part.device))
            engine = TensorParallelEngine(part.engine(rows, ranks.agree), ranks)
            ranks.all_told("ready")
        ranks.serve()
        return engine
    except BaseException as error:
        # what fails here may be that another rank did: then that is the reason
        failed = isinstance(error, Exception) and not isinstance(error, LoadError)
        reason = ranks.blame(error) if failed else None
        ranks.close()
        if reason is None:
            raise
        raise LoadError(reason) from error
