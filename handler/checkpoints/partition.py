"""Partitioning ahead of time: a checkpoint becomes a folder that an engine loads as it is."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

from handler.checkpoints import fastertransformer_layout, native_layout
from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import find_checkpoint, model_config
from handler.checkpoints.lora import merged
from handler.checkpoints.partitioned import (
    FORMATS,
    MANIFEST,
    Partition,
    read_partition,
    sha256_of,
)
from handler.checkpoints.read import CheckpointWeights, Weights
from handler.checkpoints.splits import Tensor, check_degree, t5_tensors
from handler.checkpoints.tensors import check_tensors
from handler.config import Configuration
from handler.errors import LoadError
from handler.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(tensors written, of all)"""

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_GRAPHS = ".onnx_t5"


def partition_as_told(configuration: Configuration) -> None:
    """What DJL's partition command asks for: option.save_mp_checkpoint_path says where to.

    The layout is that of option.backend. Under MPI each rank is asked, and the first one does it.
    Raises LoadError.
    """
    output = configuration.save_mp_checkpoint_path
    if output is None:
        raise LoadError("set option.save_mp_checkpoint_path to the folder to write")
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") != "0":
        return
    ours = configuration.backend != "fastertransformer"
    partition(configuration, "native" if ours else "fastertransformer", Path(output))


def partition(
    configuration: Configuration, layout: str, output: Path, progress: Progress | None = None
) -> None:
    """Write the configured checkpoint as a folder that is served without converting it again.

    layout: fastertransformer or native; output: a folder that is not there yet, is empty, or holds
    an older partition, which is replaced. It appears when it is complete. Memory: what the largest
    tensor takes, up to three times. Raises LoadError.
    """
    if layout not in FORMATS:
        raise LoadError(f"--format must be one of {', '.join(FORMATS)}, got {layout!r}")
    c = replace(configuration, dtype=_dtype(configuration))
    source = find_checkpoint(c)
    a = T5Architecture.from_config(model_config(source))
    degree = _checked_degree(c, a, layout)
    _refuse(source, output)
    load_tokenizer(source, a.vocab_size)  # raises where the folder would have none to serve with
    weights = merged(CheckpointWeights(source), c, tied=a.tied)
    check_tensors(weights, a)
    tensors = (
        native_layout.tensors_of(a, weights, c.dtype)
        if layout == "native"
        else list(t5_tensors(a, weights))
    )
    made = Partition(
        format=layout,
        architecture=asdict(a),
        tensor_parallel_degree=degree,
        pipeline_parallel_degree=c.pipeline_parallel_degree,
        dtype=c.dtype,
        source=sha256_of([source / "config.json", *weights.paths]),
        files={},
        model_path=_model_path(c) if layout == "fastertransformer" else None,
    )
    with _appearing(output) as folder:
        written = _written(folder, source, a, tensors, weights, made)
        for done, _ in enumerate(written, 1):
            if progress:
                progress(done, len(tensors))
        _complete(folder, source, made)
        if layout == "native" and degree == 1 and c.dtype == "int8":
            _build_graphs(folder, c)


def _complete(folder: Path, source: Path, made: Partition) -> None:
    """Add what makes the weights a checkpoint, and partition.json."""
    files: dict[str, tuple[int, str | None] | None] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest = sha256_of([file]) if file.suffix == ".safetensors" else None
        files[str(file.relative_to(folder))] = (file.stat().st_size, digest)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            files[name] = None
    replace(made, files=files).write(folder)


def _written(
    folder: Path,
    source: Path,
    a: T5Architecture,
    tensors: list[Tensor],
    weights: Weights,
    made: Partition,
) -> Iterator[str]:
    """Names of tensors, each when it is written."""
    if made.format == "native":
        degree = made.tensor_parallel_degree
        return native_layout.write(folder, tensors, weights, degree, made.dtype)
    assert made.model_path is not None
    degrees = made.tensor_parallel_degree, made.pipeline_parallel_degree
    inner = folder / fastertransformer_layout.folder_name(*degrees)
    inner.mkdir()
    return fastertransformer_layout.write(
        inner,
        tensors,
        a,
        model_config(source),
        weights,
        tensor_parallel=degrees[0],
        pipeline_parallel=degrees[1],
        dtype=made.dtype,
        model_path=made.model_path,
    )


def _build_graphs(folder: Path, c: Configuration) -> None:
    """The CPU engine's graphs for a CPU as this one, so that its first start builds none."""
    from handler.engines import onnx_t5

    try:
        onnx_t5.prepare(folder, replace(c, model_id=None, merge_adapter=None, cache_dir=None))
    except ImportError as error:
        logger.warning("without graphs for the CPU engine, which this Python cannot run: %s", error)


def _dtype(c: Configuration) -> str:
    return "fp32" if c.dtype == "auto" else c.dtype


def _checked_degree(c: Configuration, a: T5Architecture, layout: str) -> int:
    degree = c.tensor_parallel_degree
    if not isinstance(degree, int):
        raise LoadError(f"tensor_parallel_degree={degree} must be a number to partition for")
    if layout == "native":
        native_layout.check(c.dtype, c.pipeline_parallel_degree)
    else:
        fastertransformer_layout.check(a, c.dtype)
        fastertransformer_layout.check_stages(a, c.pipeline_parallel_degree)
        _warn_of_fp16(c)
    check_degree(a, degree)
    return degree


def _warn_of_fp16(c: Configuration) -> None:
    if c.dtype != "fp16":
        return
    message = (
        "dtype=fp16 overflows in the feed-forward layers of FLAN-T5 large and larger on "
        "FasterTransformer, and their answers are garbage; take bf16 or fp32"
    )
    if c.strict_dtype:
        raise LoadError(f"{message} (option.strict_dtype=true refuses it)")
    logger.warning(message)


def _model_path(c: Configuration) -> str:
    path = PurePosixPath(c.model_path_on_host)
    if not path.is_absolute():
        raise LoadError(f"model_path_on_host={path} must be an absolute path")
    return str(path)


def _refuse(source: Path, output: Path) -> None:
    if read_partition(source) is not None:
        raise LoadError(f"{source} is partitioned already; name the original checkpoint")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise LoadError(f"{output} is a file or a link; choose another output")
    if os.path.ismount(output):
        raise LoadError(f"{output} is a mount point and cannot be replaced; name a folder in it")
    if output.is_dir() and any(output.iterdir()):
        old = read_partition(output)
        if old is None:
            raise LoadError(f"{output} is not empty and has no {MANIFEST}; choose another output")
        ours = {MANIFEST, _GRAPHS, *(Path(name).parts[0] for name in old.files)}
        others = {file.name for file in output.iterdir()} - ours
        if others:
            raise LoadError(
                f"{output} holds {', '.join(sorted(others))}, which would be lost; move them or "
                "choose another output"
            )


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``output`` when the block ends well, else is removed."""
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        with _aside(output) as aside:
            aside.chmod(0o755)
            yield aside
            _replace(output, aside)
    except OSError as error:
        raise LoadError(
            f"cannot write {output}: {error.strerror or error}; choose another output, or make room"
        ) from error


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """A new folder beside ``output``, held by a lock, that is removed in the end."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # file systems that lock no folders: nobody takes it for left over
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.is_dir():
            break
        os.close(handle)  # taken for left over before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_leftovers(output: Path) -> None:
    """Folders of runs that were killed: nobody holds their locks any more."""
    for folder in output.parent.glob(f"{glob.escape(_prefix(output))}*"):
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _prefix(output: Path) -> str:
    return f".{output.name}.partition-"


def _replace(output: Path, aside: Path) -> None:
    if output.is_dir() and any(output.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        output.rename(old)
        aside.rename(output)
        shutil.rmtree(old)
    else:
        aside.rename(output)
