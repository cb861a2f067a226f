"""T5 for GPUs, one or several: our own model in PyTorch. On CPUs for tensor parallelism."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.lora import merged
from handler.checkpoints.partitioned import read_partition
from handler.checkpoints.read import CheckpointWeights
from handler.checkpoints.splits import check_degree
from handler.config import MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU, Configuration
from handler.errors import LoadError
from handler.machine import available_memory, gpu_is_there, return_freed_memory, usable_cpus
from handler.ranks import World, meeting_place
from handler.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, TCPStore  # type: ignore[attr-defined]

    from handler.engines.torch_t5.engine import TorchT5StepEngine
    from handler.engines.torch_t5.loading import Parts
    from handler.engines.torch_t5.model import T5
    from handler.engines.torch_t5.parallel_engine import TensorParallelEngine
    from handler.engines.torch_t5.rank import Follower
    from handler.engines.torch_t5.ranks import Ranks

logger = logging.getLogger(__name__)

_DEGREE = "option.tensor_parallel_degree"
_OLDEST_TORCH = (2, 4)
_BF16_CAPABILITY = 8  # major compute capability
# Part of a GPU's free memory for the rows; the rest is for CUDA graphs, NCCL and gaps.
_ROWS_SHARE = 0.85
# Bytes for each of a row's logits: what choosing its token takes at most, top_p and typical_p used.
_CHOOSING_BYTES = 104


def load(folder: Path, c: Configuration) -> TorchT5StepEngine | TensorParallelEngine:
    """The engine on the checkpoint in ``folder``, with ranks of its own where several are asked
    for. Raises LoadError."""
    _refuse_unsupported(c)
    degree = _degree(c)
    check_degree(T5Architecture.from_config(model_config(folder)), degree, _DEGREE)
    if degree == 1:
        part = load_part(folder, c)
        return part.engine(part.rows)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from handler.engines.torch_t5.ranks import Ranks, refuse_another_model, start_processes

    refuse_another_model()
    store = TCPStore("127.0.0.1", 0, degree, True, wait_for_workers=False)
    ranks = Ranks(degree, start_processes(folder, c, degree, store.port))
    return _load_together(folder, c, store, ranks)


def lead(folder: Path, c: Configuration, world: World) -> TensorParallelEngine:
    """The engine of MPI rank 0. Raises LoadError."""
    _check_ranks(folder, c, world)
    from handler.engines.torch_t5.ranks import Ranks

    return _load_together(folder, c, meeting_place(world), Ranks(world.size))


def follow(folder: Path, c: Configuration, world: World) -> Follower:
    """What an MPI rank > 0 has of the engine. Raises LoadError."""
    _check_ranks(folder, c, world)
    from handler.engines.torch_t5.rank import Follower

    try:
        return Follower(folder, c, world.rank, world.size, meeting_place(world))
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
    folder: Path, c: Configuration, store: TCPStore, ranks: Ranks
) -> TensorParallelEngine:
    """Rank 0's part of the model, and the others' when they have theirs."""
    from handler.engines.torch_t5.parallel_engine import TensorParallelEngine
    from handler.engines.torch_t5.ranks import leave_group, process_group

    try:
        ranks.meet(store)
        part = load_part(folder, c, 0, ranks.size)
        rows = min(part.rows, *ranks.all_told("loaded"))
        ranks.send("join", rows)
        part.join(process_group(store, 0, ranks.size, part.device))
        engine = TensorParallelEngine(part.engine(rows), ranks)
        ranks.all_told("ready")
        ranks.serve()
        return engine
    except BaseException as error:
        ranks.close()
        leave_group(ranks.lost)
        if isinstance(error, LoadError) or ranks.lost is None:
            raise
        raise LoadError(ranks.lost) from error


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

    def join(self, group: ProcessGroup) -> None:
        from handler.engines.torch_t5.tensor_parallel import join_ranks

        join_ranks(self.model, self.whole.vocab_size, group)

    def engine(self, rows: int) -> TorchT5StepEngine:
        """As fast as the device lets it be."""
        engine = self.plain_engine(rows)
        if self.device.type == "cuda":
            _speed_up(engine)
        return engine

    def plain_engine(self, rows: int) -> TorchT5StepEngine:
        from handler.engines.torch_t5.engine import TorchT5StepEngine

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


def _speed_up(engine: TorchT5StepEngine) -> None:
    """What only GPUs have. Without it they answer the same, later."""
    try:
        engine.use_kernels()
        engine.use_graphs()
    except Exception as error:  # Triton's compiler, the driver, too little memory
        without = "CUDA graphs" if engine.has_kernels else "kernels and CUDA graphs"
        logger.warning("decoding is slower than it could be, without %s: %r", without, error)


def load_part(folder: Path, c: Configuration, rank: int = 0, degree: int = 1) -> LoadedPart:
    """One rank's part of the checkpoint in ``folder``. Raises LoadError."""
    import torch

    from handler.engines.torch_t5.loading import load_model
    from handler.engines.torch_t5.tensor_parallel import part_of

    device = _device(c, rank)
    if device.type == "cpu":
        torch.set_num_threads(c.threads or max(1, usable_cpus() // degree))
    whole = T5Architecture.from_config(model_config(folder))
    tokenizer = load_tokenizer(folder, whole.vocab_size)
    own = part_of(whole, degree)
    dtype = _compute_dtype(c, device)
    model = load_model(own, _parts(folder, c, whole, rank, degree), dtype, device)
    return_freed_memory()
    return LoadedPart(model, whole, own, tokenizer, device, 1, c).with_rows()


def _degree(c: Configuration) -> int:
    """ "max" is as many as there are GPUs."""
    import torch

    if c.tensor_parallel_degree != "max":
        return int(c.tensor_parallel_degree)
    on_gpu = c.device_id != -1 and gpu_is_there()
    return torch.cuda.device_count() if on_gpu else 1


def _device(c: Configuration, rank: int) -> torch.device:
    """Rank r has the r-th GPU of those that DJL left visible. Raises LoadError."""
    import torch

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
    import torch

    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if c.dtype in named:
        return named[c.dtype]
    if device.type == "cpu":
        return torch.float32
    capable = torch.cuda.get_device_capability(device)[0] >= _BF16_CAPABILITY
    return torch.bfloat16 if capable else torch.float16


def against_this_torch() -> str | None:
    """Why the torch that is installed does not do, or None."""
    try:
        import torch
    except ImportError as error:
        return f"backend torch needs the package torch: {error}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return f"backend torch needs torch {oldest} or newer, {torch.__version__} is installed"
    return None


def _refuse_unsupported(c: Configuration) -> None:
    """Raises LoadError."""
    against = against_this_torch()
    if against is not None:
        raise LoadError(f"{against}; set option.backend=transformers")
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


def _parts(folder: Path, c: Configuration, a: T5Architecture, rank: int, degree: int) -> Parts:
    from handler.engines.torch_t5.loading import CheckpointParts, RankFileParts

    if read_partition(folder) is not None:
        return RankFileParts(folder, a, rank, degree)
    weights = merged(CheckpointWeights(folder), c, tied=a.tied)
    return CheckpointParts(weights, a, rank, degree, int8=c.dtype == "int8")


def _try_to_encode(engine: TorchT5StepEngine, c: Configuration) -> None:
    """The most prompts at once: the memory that it takes stays with torch's allocator, so that what
    is free then is free for rows. Raises LoadError."""
    import torch

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
    import torch

    from handler.engines.torch_t5.kv_cache import RowCache

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
