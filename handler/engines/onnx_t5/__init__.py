"""T5 for CPUs: ONNX graphs that are built from a checkpoint, run by ONNX Runtime, without torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.lora import merged
from handler.checkpoints.read import CheckpointWeights
from handler.config import MAX_ROWS_ON_CPU, Configuration
from handler.engines.protocol import StepEngine
from handler.errors import LoadError
from handler.machine import usable_cpus
from handler.tokenizer import load_tokenizer

# ONNX Runtime tells Microsoft about models and machines unless this is set before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

logger = logging.getLogger(__name__)

_DTYPES = ("auto", "fp32", "int8")


def load(folder: Path, configuration: Configuration) -> StepEngine:
    """The engine on the checkpoint in ``folder``. Raises LoadError."""
    _refuse_unsupported(configuration)
    try:
        from handler.engines.onnx_t5.build import GraphBuilder
        from handler.engines.onnx_t5.cache import built, cache_folder
        from handler.engines.onnx_t5.choose import choose_forms
        from handler.engines.onnx_t5.engine import OnnxT5StepEngine
        from handler.engines.onnx_t5.sessions import use_threads
    except ImportError as error:
        raise LoadError(
            f"option.backend=onnxruntime needs the packages onnx and onnxruntime: {error}"
        ) from error
    architecture = T5Architecture.from_config(model_config(folder))
    tokenizer = load_tokenizer(folder, architecture.vocab_size)
    weights = merged(CheckpointWeights(folder), configuration)
    max_rows = configuration.max_rows or MAX_ROWS_ON_CPU
    use_threads(configuration.threads or usable_cpus())
    cache = cache_folder(folder, configuration.cache_dir)
    forms = choose_forms(
        architecture,
        "int8" if configuration.dtype == "int8" else "fp32",
        per_batch=configuration.cpu_kernel == "per_batch",
        max_rows=max_rows,
        cache=cache,
    )
    builder = GraphBuilder(architecture, weights, forms)
    graphs = built(cache, weights.paths, builder.settings, builder.build)
    logger.info("weights: encoder %s, decoder %s (most rows)", forms.encoder, forms.decoder)
    return OnnxT5StepEngine(
        graphs,
        architecture,
        forms,
        tokenizer,
        max_rows=max_rows,
        max_input_tokens=configuration.max_input_tokens,
        max_output_tokens=configuration.max_output_tokens,
    )


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
