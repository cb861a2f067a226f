"""One process's part of the model: all of it, or what one rank has, on its device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.lora import merged
from handler.checkpoints.partitioned import read_partition
from handler.checkpoints.read import CheckpointWeights
from handler.config import MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU, Configuration
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.fast_steps import Agree, speed_up
from handler.engines.torch_t5.kv_cache import RowCache
from handler.engines.torch_t5.loading import CheckpointParts, Parts, RankFileParts, load_model
from handler.engines.torch_t5.model import T5
from handler.engines.torch_t5.tensor_parallel import join_ranks, part_of
from handler.errors import LoadError
from handler.machine import available_memory, gpu_is_there, return_freed_memory, usable_cpus
from handler.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_BF16_CAPABILITY = 8  # major compute capability
# Part of a GPU's free memory for the rows; the rest is for CUDA graphs, NCCL and gaps.
_ROWS_SHARE = 0.85
# Bytes for each of a row's logits: what choosing its token takes at most, top_p and typical_p used.
_CHOOSING_BYTES = 104


@dataclass(frozen=True)
class LoadedPart:
    """What one rank has of the model. rows: that fit into its memory."""

    model: T5
    whole: T5Architecture
    architecture: T5Architecture
    tokenizer: Tokenizer
    device: torch.device
    rows: int
    configuration: Configuration

    def join(self, group: dist.ProcessGroup) -> None:
        join_ranks(self.model, self.whole.vocab_size, group)

    def engine(self, rows: int, agree: Agree | None = None) -> TorchT5StepEngine:
        """As fast as the device lets it be. agree: of ranks that have joined. See fast_steps.py."""
        engine = self.plain_engine(rows)
        if self.device.type == "cuda":
            # gloo brings the ranks' results together on the host, which no CUDA graph can hold
            graphs = agree is None or dist.get_backend() == "nccl"
            speed_up(engine, self.model, agree, graphs=graphs)
        return engine

    def plain_engine(self, rows: int) -> TorchT5StepEngine:
        return TorchT5StepEngine(
            self.model,
            self.architecture,
            self.tokenizer,
            self.device,
            max_rows=rows,
            max_input_tokens=self.configuration.max_input_tokens,
            max_output_tokens=self.configuration.max_output_tokens,
        )

    def with_rows(self) -> LoadedPart:
        """As many as are asked for, or as fit beside what encoding takes. Raises LoadError."""
        if self.device.type == "cuda":
            _try_to_encode(self.plain_engine(1), self.configuration)
        return replace(self, rows=_rows(self))


def load_part(
    folder: Path,
    c: Configuration,
    rank: int = 0,
    degree: int = 1,
    device: torch.device | None = None,
) -> LoadedPart:
    """One rank's part of the checkpoint in ``folder``. device: where it goes, if not to the rank's
    own. Raises LoadError."""
    device = device or _device(c, rank)
    if device.type == "cpu":
        torch.set_num_threads(c.threads or max(1, usable_cpus() // degree))
    whole = T5Architecture.from_config(model_config(folder))
    tokenizer = load_tokenizer(folder, whole.vocab_size)
    own = part_of(whole, degree)
    dtype = _compute_dtype(c, device)
    model = load_model(own, _parts(folder, c, whole, rank, degree), dtype, device)
    return_freed_memory()
    return LoadedPart(model, whole, own, tokenizer, device, 1, c).with_rows()


def _device(c: Configuration, rank: int) -> torch.device:
    """Rank r has the r-th GPU of those that DJL left visible. Raises LoadError."""
    if c.device_id == -1 or not gpu_is_there():
        return torch.device("cpu")
    place = max(c.device_id or 0, 0) + rank
    if place >= torch.cuda.device_count():
        raise LoadError(
            f"option.tensor_parallel_degree={c.tensor_parallel_degree} needs as many GPUs from "
            f"number {c.device_id or 0} on, there are {torch.cuda.device_count()} in all"
        )
    return torch.device("cuda", place)


def _compute_dtype(c: Configuration, device: torch.device) -> torch.dtype:
    """What products are computed in; int8 weights are turned into it."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if c.dtype in named:
        return named[c.dtype]
    if device.type == "cpu":
        return torch.float32
    capable = torch.cuda.get_device_capability(device)[0] >= _BF16_CAPABILITY
    return torch.bfloat16 if capable else torch.float16


def _parts(folder: Path, c: Configuration, a: T5Architecture, rank: int, degree: int) -> Parts:
    if read_partition(folder) is not None:
        return RankFileParts(folder, a, rank, degree)
    weights = merged(CheckpointWeights(folder), c, tied=a.tied)
    return CheckpointParts(weights, a, rank, degree, int8=c.dtype == "int8")


def _try_to_encode(engine: TorchT5StepEngine, c: Configuration) -> None:
    """The most prompts at once: the memory that it takes stays with torch's allocator, so that what
    is free then is free for rows. Raises LoadError."""
    longest = [0] * c.max_input_tokens  # an id that each rank's part of the embedding has
    try:
        for _ in engine.encode([longest] * (engine.encode_tokens // len(longest))):
            pass
    except torch.cuda.OutOfMemoryError as error:
        raise LoadError(
            f"the model leaves too little memory to encode {engine.encode_tokens} tokens; lower "
            "option.max_input_tokens or raise option.tensor_parallel_degree"
        ) from error


def _rows(part: LoadedPart) -> int:
    """Raises LoadError where those that are asked for do not fit."""
    c, device = part.configuration, part.device
    limits = c.max_input_tokens, c.max_output_tokens
    of_one = RowCache.nbytes(part.architecture, 1, *limits, part.model.dtype.itemsize)
    if device.type == "cuda":
        of_one += part.whole.vocab_size * _CHOOSING_BYTES
        left = int(torch.cuda.mem_get_info(device)[0] * _ROWS_SHARE) - (c.encoder_cache << 20)
        free, wanted = max(0, left), MAX_ROWS_ON_GPU
    else:
        available = available_memory()
        free, wanted = 1 << 62 if available is None else available, MAX_ROWS_ON_CPU
    rows = c.max_rows or min(wanted, free // of_one)
    if not rows or rows * of_one > free:
        raise LoadError(
            f"the keys and values of {rows or 1} rows take {(rows or 1) * of_one / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free on {device}; lower option.max_rows, "
            "option.max_input_tokens or option.max_output_tokens, or raise "
            "option.tensor_parallel_degree"
        )
    if c.max_rows is None and rows < wanted:
        logger.info("%d rows instead of %d fit into the memory of %s", rows, wanted, device)
    return rows
