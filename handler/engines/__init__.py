"""Engines: what computes. ``init_inference`` chooses one and makes a Model of it."""

from __future__ import annotations

import logging
from typing import Any

from handler.checkpoints.find import find_checkpoint, model_config
from handler.config import Configuration, Degree, configuration_of
from handler.errors import LoadError
from handler.inference import Model

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
    return load_model(
        configuration_of(
            str(model),
            tensor_parallel_degree=tensor_parallel_degree,
            pipeline_parallel_degree=pipeline_parallel_degree,
            dtype=dtype,
            backend=backend,
            **options,
        )
    )


def load_model(configuration: Configuration) -> Model:
    """Load the model that the configuration describes. Raises LoadError."""
    folder = find_checkpoint(configuration)
    backend, reason = _choose_backend(configuration, model_config(folder)["model_type"])
    logger.info("backend %s: %s", backend, reason)
    from handler.engines import hf_generate

    engine = hf_generate.load(folder, configuration)
    return Model(
        engine,
        max_input_tokens=configuration.max_input_tokens,
        max_output_tokens=configuration.max_output_tokens,
        max_queue=configuration.max_queue,
    )


def _choose_backend(configuration: Configuration, model_type: str) -> tuple[str, str]:
    if configuration.backend not in ("auto", "transformers"):
        raise LoadError(
            f"option.backend={configuration.backend} is not in this version, allowed are auto and "
            "transformers"
        )
    if configuration.backend == "auto":
        return "transformers", f"auto, model type {model_type}"
    return "transformers", "option.backend"
