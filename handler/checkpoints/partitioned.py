"""partition.json: what a partitioned folder was made of and for, and whether it fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from handler import __version__
from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.selection import PARTITION
from handler.config import Configuration
from handler.errors import LoadError, shown

FORMATS = ("fastertransformer", "native")
MANIFEST = PARTITION
# Counts up when a folder of an older version must not be read.
_FORMAT_VERSION = 1
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Partition:
    """What partition.json tells.

    architecture: T5Architecture as a dictionary. source: SHA-256 over config.json and the weight
    files it was made from. files: what was written; of weight files their bytes, and SHA-256 where
    we read them ourselves; None of others. model_path: the folder that FasterTransformer's
    ``verify`` names.
    """

    format: str
    architecture: Mapping[str, Any]
    tensor_parallel_degree: int
    pipeline_parallel_degree: int
    dtype: str
    source: str
    files: Mapping[str, tuple[int, str | None] | None]
    model_path: str | None = None
    handler_version: str = __version__
    format_version: int = _FORMAT_VERSION

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each weight file that we read ourselves."""
        return [entry[1] for entry in self.files.values() if entry and entry[1]]


def read_partition(folder: Path) -> Partition | None:
    """What the folder's partition.json tells; None without one. Raises LoadError."""
    file = folder / MANIFEST
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        version = told["format_version"]
        if version != _FORMAT_VERSION:
            raise LoadError(
                f"{file} is of format version {version!r}, this handler ({__version__}) reads "
                f"{_FORMAT_VERSION}; partition the original checkpoint again"
            )
        made = Partition(**told)
        _check_types(made)
        return made
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}") from error
    except LoadError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file} is damaged: {error!r}; partition the checkpoint again") from error


def check_partition(p: Partition, folder: Path, c: Configuration) -> None:
    """Raises LoadError, with both values, where the folder was not made for this configuration."""
    _check_model(p, folder)
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "dtype"):
        made, asked = getattr(p, name), getattr(c, name)
        if asked not in (made, "auto", "max"):
            raise LoadError(
                f"{folder} was partitioned for {name}={made}, option.{name}={asked}; set "
                f"option.{name}={made} or partition the original checkpoint again"
            )
    if c.merge_adapter is not None:
        raise LoadError(
            f"option.merge_adapter={c.merge_adapter} cannot be merged into {folder}, which is "
            "partitioned; partition the original checkpoint with it"
        )
    if p.model_path not in (None, str(folder)):
        raise LoadError(
            f"{folder} was partitioned to be served from {p.model_path}, and FasterTransformer "
            "would delete it here; put it there, or partition again with "
            f"--model-path-on-host {folder}"
        )
    for name, entry in p.files.items():
        size = _size(folder / name)
        if size is None or (entry and size != entry[0]):
            seen = "is missing" if size is None else f"has {size} bytes, not {entry and entry[0]}"
            raise LoadError(
                f"{folder / name} {seen}: copy the partitioned folder again, or partition again"
            )


def check_content(p: Partition, folder: Path) -> None:
    """Reads all of its weight files. Raises LoadError where one is not as it was written."""
    for name, entry in p.files.items():
        if entry and entry[1] and sha256_of([folder / name]) != entry[1]:
            raise LoadError(
                f"{folder / name} is damaged: copy the partitioned folder again, or partition again"
            )


def sha256_of(files: Iterable[Path]) -> str:
    """Over the files' content, one after another. Raises OSError."""
    sha = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                sha.update(block)
    return sha.hexdigest()


def as_partitioned(c: Configuration, folder: Path) -> Configuration:
    """With what the folder was made for in the place of auto and max, if it is partitioned."""
    p = read_partition(folder)
    if p is None:
        return c
    return replace(c, dtype=p.dtype, tensor_parallel_degree=p.tensor_parallel_degree)


def _check_model(p: Partition, folder: Path) -> None:
    here = asdict(T5Architecture.from_config(model_config(folder)))
    for name, value in here.items():
        if p.architecture.get(name) != value:
            raise LoadError(
                f"{folder} was partitioned from a model with {name}={p.architecture.get(name)!r}, "
                f"its config.json says {value!r}; partition the original checkpoint again"
            )


def _check_types(p: Partition) -> None:
    """Raises TypeError, ValueError."""
    if p.format not in FORMATS:
        raise ValueError(f"format {shown(p.format)} is none of {', '.join(FORMATS)}")
    degrees = p.tensor_parallel_degree, p.pipeline_parallel_degree
    for values, kind in (
        ((p.format, p.dtype, p.source, p.handler_version), str),
        (degrees, int),
        ((p.architecture, p.files), dict),
        ([e for e in p.files.values() if e is not None] if isinstance(p.files, dict) else [], list),
    ):
        for value in values:
            if not isinstance(value, kind):
                raise TypeError(f"{shown(value)} is no {kind.__name__}")
    for entry in p.files.values():
        if entry is not None:
            size, digest = entry
            if not isinstance(size, int) or not isinstance(digest, (str, type(None))):
                raise TypeError(f"{shown(entry)} is no size and digest")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
