"""Engines: what computes. ``init_inference`` chooses one and makes a Model of it."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from handler.batcher import Batcher, Lockstep
from handler.checkpoints.architecture import T5_FAMILY
from handler.checkpoints.find import find_checkpoint, model_config
from handler.checkpoints.partitioned import (
    Partition,
    as_partitioned,
    check_partition,
    read_partition,
)
from handler.config import Configuration, Degree, configuration_of
from handler.errors import LoadError, shown
from handler.following import Following, Leading
from handler.inference import Model
from handler.machine import gpu_is_there
from handler.ranks import World, end_with_parent, rank_0_gets_all_requests, world_of
from handler.runner import Runner
from handler.scheduler import Scheduler

__all__ = ["Model", "init_inference", "load_model"]

logger = logging.getLogger(__name__)


def init_inference(
    model: str,
    tensor_parallel_degree: Degree = 1,
    pipeline_parallel_degree: int = 1,
    dtype: str = "auto",
    *,
    backend: str = "auto",
    **options: Any,
) -> Model:
    """Load a model.

    model: a checkpoint folder or a model id of the Hugging Face hub; tensor_parallel_degree: GPUs
    that share it, or "max"; dtype: auto, fp32, bf16, fp16, int8 or int4; backend: auto or an
    engine's name; options: any property of the configuration table.
    Raises LoadError: one line that names the property to change.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise LoadError(f"model must be a folder or a model id, got {shown(model)}")
    if dtype != "auto":  # else quantize, its alias, may be given instead
        options["dtype"] = dtype
    return load_model(
        configuration_of(
            str(model),
            tensor_parallel_degree=tensor_parallel_degree,
            pipeline_parallel_degree=pipeline_parallel_degree,
            backend=backend,
            **options,
        )
    )


def load_model(configuration: Configuration) -> Model:
    """Load the model that the configuration describes. Raises LoadError."""
    folder = find_checkpoint(configuration)
    if world_of().by_mpirun:  # DJLServing tells its ranks -1
        configuration = replace(configuration, device_id=None)
    backend, reason = choose_backend(configuration, folder)
    configuration = as_partitioned(configuration, folder)
    logger.info("backend %s: %s", backend, reason)
    return Model(
        _runner(backend, folder, configuration),
        backend=backend,
        max_input_tokens=configuration.max_input_tokens,
        max_output_tokens=configuration.max_output_tokens,
    )


def choose_backend(c: Configuration, folder: Path) -> tuple[str, str]:
    """(backend, why). Raises LoadError."""
    partition = read_partition(folder)
    if partition is not None:
        return _backend_of_partition(partition, c, folder)
    if c.backend != "auto":
        return c.backend, "option.backend"
    config = model_config(folder)
    model_type = config["model_type"]
    world = world_of()
    if world.by_mpirun and importlib.util.find_spec("fastertransformer") and not _is_passive(c):
        return "fastertransformer", f"rank {world.rank} of {world.size} under MPI"
    if world.size > 1:
        return "torch", f"rank {world.rank} of {world.size} under MPI"
    if importlib.util.find_spec("fastertransformer") and c.device_id != -1 and gpu_is_there():
        reason = _against_fastertransformer(config, c)
        if reason is None:
            return "fastertransformer", "its wheel is there, and a GPU"
        logger.info("not backend fastertransformer: %s", reason)
    if model_type not in T5_FAMILY:
        return "transformers", f"model type {model_type} is not of the T5 family"
    wanted = _why_torch(model_type, c)
    if wanted is not None:
        from handler.engines import torch_t5

        against = torch_t5.against_this_torch()
        if against is None or not importlib.util.find_spec(
            "torch"
        ):  # which transformers needs, too
            return "torch", wanted
        return "transformers", against
    missing = [name for name in ("onnx", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        return "transformers", f"the package {missing[0]} is not installed"
    return "onnxruntime", f"model type {model_type} on a CPU"


def _why_torch(model_type: str, c: Configuration) -> str | None:
    """Why a T5 is for backend torch, or None: then a CPU's own engine has it."""
    if c.device_id != -1 and gpu_is_there():
        return f"model type {model_type} on a GPU"
    if c.tensor_parallel_degree not in (1, "max"):
        return f"option.tensor_parallel_degree={c.tensor_parallel_degree} on a CPU"
    if c.dtype in ("fp16", "bf16"):
        return f"option.dtype={c.dtype} on a CPU"
    return None


def _against_fastertransformer(config: dict[str, Any], c: Configuration) -> str | None:
    """Why the wheel would not serve this model right, or None."""
    from handler.engines import fastertransformer_loading as wheel

    return wheel.refusal(config, c) or wheel.quality_warning(config, c)


def _is_passive(c: Configuration) -> bool:
    return rank_0_gets_all_requests(c.use_passive_workers)


def _refuse_ranks(backend: str, world: World, c: Configuration) -> None:
    """Raises LoadError."""
    if world.size == 1:
        return
    if backend not in ("fastertransformer", "torch"):
        raise LoadError(
            f"option.backend={backend} runs in one process, mpirun started {world.size}: set "
            "engine=Python and option.mpi_mode=false, or option.backend=torch or fastertransformer"
        )
    if backend == "fastertransformer" and _is_passive(c):
        raise LoadError(
            "option.use_passive_workers=true (this DJLServing's default): requests would reach MPI "
            "rank 0 only; set it to false, or set option.backend=torch or engine=Python"
        )


def _backend_of_partition(p: Partition, c: Configuration, folder: Path) -> tuple[str, str]:
    """An engine that reads the folder. Raises LoadError where it is not asked for or there."""
    check_partition(p, folder, c)
    reading = _backends_that_read(p)
    if c.backend not in ("auto", *reading):
        raise LoadError(
            f"{folder} is partitioned for backend {' or '.join(reading)}, "
            f"option.backend={c.backend}; set option.backend=auto or name the original checkpoint"
        )
    if c.backend != "auto":
        return c.backend, "option.backend"
    on_gpu = "torch" in reading and c.device_id != -1 and gpu_is_there()
    return "torch" if on_gpu else reading[0], f"{folder} is partitioned for it"


def _backends_that_read(p: Partition) -> tuple[str, ...]:
    """The first is the one for CPUs."""
    if p.format != "native":
        return (p.format,)
    if p.tensor_parallel_degree == 1 and p.dtype in ("fp32", "int8"):
        return "onnxruntime", "torch"
    return ("torch",)


def _runner(backend: str, folder: Path, c: Configuration) -> Runner:
    """The engine, loaded, with what runs it. Engines are imported where they are used."""
    world = world_of()
    _refuse_ranks(backend, world, c)
    if backend == "fastertransformer":
        from handler.engines import fastertransformer

        engine = fastertransformer.load(folder, c)
        if world.size > 1:
            return Lockstep(engine, c.max_queue, world, engine.seeds)
        return Batcher(engine, c.max_queue)
    if backend == "onnxruntime":
        from handler.engines import onnx_t5

        return Scheduler(onnx_t5.load(folder, c), c.max_queue, c.encoder_cache << 20)
    if backend == "torch":
        return _torch_runner(folder, c, world)
    from handler.engines import hf_generate

    return Batcher(hf_generate.load(folder, c), c.max_queue)


def _torch_runner(folder: Path, c: Configuration, world: World) -> Runner:
    from handler.engines import torch_t5

    if world.by_mpirun:
        end_with_parent()
    if world.size == 1:
        alone = torch_t5.load(folder, c)
        scheduler = Scheduler(alone, c.max_queue, c.encoder_cache << 20)
        alone.when_lost(scheduler.end)
        return scheduler
    torch_t5.refuse_unsupported(c)  # before torch is imported, which may be missing
    from handler.engines.torch_ranks import loading

    if world.rank:
        return Following(loading.follow(folder, c, world), shares=not _is_passive(c))
    engine = loading.lead(folder, c, world)
    leading = Scheduler if _is_passive(c) else Leading
    scheduler = leading(engine, c.max_queue, c.encoder_cache << 20)
    engine.when_lost(scheduler.end)
    return scheduler
