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

if TYPE_CHECKING:
    from handler.engines.torch_ranks.engine import TensorParallelEngine
    from handler.engines.torch_t5.engine import TorchT5StepEngine

DEGREE = "option.tensor_parallel_degree"
_OLDEST_TORCH = (2, 4)


def load(folder: Path, c: Configuration) -> TorchT5StepEngine | TensorParallelEngine:
    """The engine on the checkpoint in ``folder``, with ranks of its own where several are asked
    for. Raises LoadError."""
    refuse_unsupported(c)
    degree = _degree(c)
    check_degree(T5Architecture.from_config(model_config(folder)), degree, DEGREE)
    if degree == 1:
        from handler.engines.torch_t5.part import load_part

        part = load_part(folder, c)
        return part.engine(part.rows)
    from handler.engines.torch_ranks.loading import start

    return start(folder, c, degree)


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


def refuse_unsupported(c: Configuration) -> None:
    """What this engine does not have. Raises LoadError."""
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
