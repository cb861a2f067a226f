"""T5 for GPUs, one or several: our own model in PyTorch. On CPUs for tensor parallelism."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.splits import check_degree
from handler.config import Configuration
from handler.errors import LoadError
from handler.machine import gpu_is_there
from handler.ranks import World, meeting_place

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from handler.engines.torch_ranks.engine import TensorParallelEngine
    from handler.engines.torch_ranks.rank import Follower
    from handler.engines.torch_ranks.ranks import Ranks
    from handler.engines.torch_t5.engine import TorchT5StepEngine

_DEGREE = "option.tensor_parallel_degree"
_OLDEST_TORCH = (2, 4)


def load(folder: Path, c: Configuration) -> TorchT5StepEngine | TensorParallelEngine:
    """The engine on the checkpoint in ``folder``, with ranks of its own where several are asked
    for. Raises LoadError."""
    _refuse_unsupported(c)
    degree = _degree(c)
    check_degree(T5Architecture.from_config(model_config(folder)), degree, _DEGREE)
    if degree == 1:
        from handler.engines.torch_t5.part import load_part

        part = load_part(folder, c)
        return part.engine(part.rows)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from handler.engines.torch_ranks.ranks import Ranks, refuse_another_model, start_processes

    refuse_another_model()
    store = TCPStore("127.0.0.1", 0, degree, True, wait_for_workers=False)
    ranks = Ranks(degree, start_processes(folder, c, degree, store.port))
    return _load_together(folder, c, store, ranks)


def lead(
    folder: Path, c: Configuration, world: World, device: torch.device | None = None
) -> TensorParallelEngine:
    """The engine of MPI rank 0. device: see load_part. Raises LoadError."""
    _check_ranks(folder, c, world)
    from handler.engines.torch_ranks.ranks import Ranks

    return _load_together(folder, c, meeting_place(world), Ranks(world.size), device)


def follow(
    folder: Path, c: Configuration, world: World, device: torch.device | None = None
) -> Follower:
    """What an MPI rank > 0 has of the engine. device: see load_part. Raises LoadError."""
    _check_ranks(folder, c, world)
    from handler.engines.torch_ranks.rank import Follower

    try:
        return Follower(folder, c, world.rank, world.size, meeting_place(world), device)
    except EOFError:
        raise LoadError(f"rank 0 of {world.size} is gone, its log says why") from None


def _check_ranks(folder: Path, c: Configuration, world: World) -> None:
    """Raises LoadError."""
    _refuse_unsupported(c)
    if c.tensor_parallel_degree not in (world.size, "max"):
        raise LoadError(
            f"{_DEGREE}={c.tensor_parallel_degree} needs as many MPI ranks, mpirun started "
            f"{world.size}; set it to {world.size}"
        )
    check_degree(T5Architecture.from_config(model_config(folder)), world.size, _DEGREE)


def _load_together(
    folder: Path,
    c: Configuration,
    store: TCPStore,
    ranks: Ranks,
    device: torch.device | None = None,
) -> TensorParallelEngine:
    """Rank 0's part of the model, and the others' when they have theirs."""
    from handler.engines.torch_ranks.engine import TensorParallelEngine
    from handler.engines.torch_ranks.ranks import process_group
    from handler.engines.torch_t5.part import load_part

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


def _degree(c: Configuration) -> int:
    """ "max" is as many as there are GPUs."""
    import torch

    if c.tensor_parallel_degree != "max":
        return int(c.tensor_parallel_degree)
    on_gpu = c.device_id != -1 and gpu_is_there()
    return torch.cuda.device_count() if on_gpu else 1


def against_this_torch() -> str | None:
    """Why the torch that is installed does not do, or None."""
    try:
        import torch
    except ImportError as error:
        return f"backend torch needs the package torch ({error})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return f"backend torch needs torch {oldest} or newer, {torch.__version__} is installed"
    return None


def _refuse_unsupported(c: Configuration) -> None:
    """Raises LoadError."""
    against = against_this_torch()
    if against is not None:
        installed = importlib.util.find_spec("torch") is not None
        other = (
            "set option.backend=transformers"
            if installed
            else ("install it, or unset option.tensor_parallel_degree and option.dtype")
        )
        raise LoadError(f"{against}; {other}")
    if c.dtype == "int4":
        raise LoadError(
            "option.dtype=int4 is not supported by backend torch, allowed are auto, fp32, bf16, "
            "fp16 and int8"
        )
    if c.pipeline_parallel_degree > 1:
        raise LoadError(
            f"option.pipeline_parallel_degree={c.pipeline_parallel_degree} is not supported by "
            "backend torch, allowed is 1; set option.tensor_parallel_degree to the number of GPUs"
        )
    if c.cpu_kernel != "auto":
        raise LoadError(
            f"option.cpu_kernel={c.cpu_kernel} is not supported by backend torch, allowed is auto"
        )
