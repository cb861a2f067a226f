"""T5 for CPUs: ONNX graphs that are built from a checkpoint, run by ONNX Runtime, without torch."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.lora import merged
from handler.checkpoints.native_layout import NativeWeights
from handler.checkpoints.partitioned import read_partition
from handler.checkpoints.read import CheckpointWeights
from handler.config import MAX_ROWS_ON_CPU, Configuration
from handler.engines.protocol import StepEngine
from handler.errors import LoadError
from handler.machine import usable_cpus
from handler.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from handler.engines.onnx_t5.choose import Forms

# ONNX Runtime tells Microsoft about models and machines unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

logger = logging.getLogger(__name__)

_DTYPES = ("auto", "fp32", "int8")


def load(folder: Path, configuration: Configuration) -> StepEngine:
    """The engine on the checkpoint in ``folder``. Raises LoadError."""
    try:
        from handler.engines.onnx_t5.engine import OnnxT5StepEngine

        graphs = prepare(folder, configuration)
    except ImportError as error:
        raise LoadError(
            f"option.backend=onnxruntime needs the packages onnx and onnxruntime: {error}"
        ) from error
    logger.info("weights: %s", graphs.forms)
    return OnnxT5StepEngine(
        graphs.folder,
        graphs.architecture,
        graphs.forms,
        graphs.tokenizer,
        max_rows=_max_rows(configuration),
        max_input_tokens=configuration.max_input_tokens,
        max_output_tokens=configuration.max_output_tokens,
    )


@dataclass(frozen=True)
class PreparedGraphs:
    """Graphs on disk, and what they are run with."""

    folder: Path
    architecture: T5Architecture
    forms: Forms
    tokenizer: Tokenizer


def prepare(folder: Path, c: Configuration) -> PreparedGraphs:
    """Find the graphs of the checkpoint, or build them. Raises LoadError, ImportError."""
    from handler.engines.onnx_t5.build import GraphBuilder
    from handler.engines.onnx_t5.cache import beside_the_model, built, cache_folder, digest
    from handler.engines.onnx_t5.choose import choose_forms
    from handler.engines.onnx_t5.sessions import use_threads

    _refuse_unsupported(c)
    partition = read_partition(folder)
    architecture = T5Architecture.from_config(model_config(folder))
    tokenizer = load_tokenizer(folder, architecture.vocab_size)
    weights = (
        NativeWeights(folder)
        if partition
        else merged(CheckpointWeights(folder), c, tied=architecture.tied)
    )
    use_threads(c.threads or usable_cpus())
    cache = cache_folder(folder, c.cache_dir)
    shipped = beside_the_model(folder)
    forms = choose_forms(
        architecture,
        "int8" if c.dtype == "int8" else "fp32",
        per_batch=c.cpu_kernel == "per_batch",
        max_rows=_max_rows(c),
        cache=cache,
        shipped=shipped,
        quantized=partition is not None,
    )
    builder = GraphBuilder(architecture, weights, forms)

    def build(graphs: Path) -> None:
        for path, expected in zip(weights.paths, sources):
            if digest(path, cache) != expected:
                raise LoadError(f"{path} is not the file that partition.json tells: copy it again")
        builder.build(graphs)

    # those of a partition are compared with partition.json only where its weights are needed
    sources = partition.digests if partition else [digest(path, cache) for path in weights.paths]
    graphs = built(cache, sources, builder.settings, build, shipped=shipped)
    return PreparedGraphs(graphs, architecture, forms, tokenizer)


def _max_rows(c: Configuration) -> int:
    return c.max_rows or MAX_ROWS_ON_CPU


def _refuse_unsupported(c: Configuration) -> None:
    for name, allowed in (
        ("dtype", _DTYPES),
        ("tensor_parallel_degree", (1, "max")),
        ("pipeline_parallel_degree", (1,)),
    ):
        value = getattr(c, name)
        if value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise LoadError(
                f"option.{name}={value} is not supported by backend onnxruntime, allowed: {listed}"
            )
    if c.cpu_kernel == "per_batch" and c.dtype != "int8":
        raise LoadError(
            "option.cpu_kernel=per_batch chooses between int8 kernels; set option.dtype=int8 or "
            "option.cpu_kernel=auto"
        )
