"""Loading for fastertransformer: what the wheel serves right, and how many processes it needs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.fastertransformer_layout import check_stages, other_network
from handler.checkpoints.splits import check_degree
from handler.config import Configuration
from handler.errors import LoadError
from handler.ranks import World

DTYPES = ("fp32", "bf16", "fp16")
# In fp16 the feed-forward of FLAN-T5 large and up overflows: values of 1.2e5, above 65504
# (FasterTransformer issue 554, fastertransformer_backend issue 95).
_WIDTH_THAT_OVERFLOWS = 1024


def refusal(config: dict[str, Any], c: Configuration, *, ready_made: bool = False) -> str | None:
    """Why the wheel cannot serve this checkpoint as configured, or None.

    ready_made: the wheel does not convert it, it was partitioned.
    """
    if config["model_type"] != "t5":
        return (
            f"model type {config['model_type']} is not served by backend fastertransformer, only "
            "t5; set option.backend to another one"
        )
    if c.dtype not in ("auto", *DTYPES):
        return (
            f"option.dtype={c.dtype} is not supported by backend fastertransformer for T5, allowed "
            f"are auto, {', '.join(DTYPES)}"
        )
    if c.merge_adapter:
        return (
            f"option.merge_adapter={c.merge_adapter} is not supported by backend "
            "fastertransformer; merge the adapter into the checkpoint and unset it"
        )
    a = T5Architecture.from_config(config)
    reason = other_network(a)
    if reason is not None:
        return f"{reason}; set option.backend to another one"
    # The wheel's transformers takes the key at its word; transformers 5 writes true for every T5.
    # Of what was partitioned config.ini is read, which has it right.
    if not ready_made and a.scale_logits != config.get("tie_word_embeddings", True):
        return (
            "config.json: tie_word_embeddings is true beside scale_decoder_outputs=false, as "
            "transformers 5 saves it; backend fastertransformer would scale the logits: set "
            "tie_word_embeddings to false"
        )
    return None


def quality_warning(config: dict[str, Any], c: Configuration) -> str | None:
    """Why this checkpoint answers badly in the configured dtype, or None."""
    a = T5Architecture.from_config(config)
    if c.dtype != "fp16" or not a.gated or a.d_model < _WIDTH_THAT_OVERFLOWS:
        return None
    return (
        f"option.dtype=fp16 spoils the answers of this model (gated feed-forward, d_model "
        f"{a.d_model}: its values overflow fp16); set option.dtype to bf16 or fp32"
    )


def degrees(
    c: Configuration, a: T5Architecture, world: World, *, uses_triton: bool, ready_made: bool
) -> tuple[int, int]:
    """(tensor, pipeline) as the integers that the wheel wants. Raises LoadError.

    ready_made: as for ``refusal``.
    """
    import torch

    pipeline, gpus = c.pipeline_parallel_degree, torch.cuda.device_count()
    if c.tensor_parallel_degree == "max":
        tensor = max(1, (world.size if world.size > 1 else gpus) // pipeline)
    else:
        tensor = int(c.tensor_parallel_degree)
    needed = tensor * pipeline
    told = f"option.tensor_parallel_degree={tensor} x option.pipeline_parallel_degree={pipeline}"
    if world.size > 1 and world.size != needed:
        raise LoadError(
            f"{told} needs {needed} MPI ranks, mpirun started {world.size}; make them equal"
        )
    if world.size == 1 and needed > 1 and not uses_triton:
        raise LoadError(
            f"{told} needs {needed} MPI ranks with this fastertransformer wheel: set "
            f"engine=FasterTransformer (or option.mpi_mode=true) and option.tensor_parallel_degree"
        )
    if world.size == 1 and gpus and needed > gpus:
        raise LoadError(f"{told} needs {needed} GPUs, there are {gpus}; lower them")
    check_stages(a, pipeline)
    if ready_made:
        check_degree(a, tensor)
    else:  # the wheel's converter splits by the product
        check_degree(a, needed, "tensor_parallel_degree x pipeline_parallel_degree")
    return tensor, pipeline


def accepts(parameter: str) -> bool:
    """Whether this wheel's init_inference has that parameter by name; 0.21's has no use_triton."""
    import fastertransformer

    return parameter in inspect.signature(fastertransformer.init_inference).parameters


def init_inference(folder: Path, tensor: int, pipeline: int, arguments: dict[str, Any]) -> Any:
    import fastertransformer

    try:
        return fastertransformer.init_inference(str(folder), tensor, pipeline, **arguments)
    except Exception as error:  # of the wheel, transformers, torch, Triton
        raise LoadError(
            f"{folder} could not be loaded by fastertransformer with option.dtype "
            f"{arguments['dtype']} and degrees {tensor} x {pipeline}: {type(error).__name__}: "
            f"{error}"
        ) from error
