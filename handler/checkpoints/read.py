"""Weights of a folder as numpy arrays, one tensor at a time, whatever files they lie in."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from handler.checkpoints.safetensors_file import SafetensorsFile
from handler.checkpoints.torch_file import TorchFile
from handler.errors import LoadError

Array = npt.NDArray[np.float32]
# Slices of a tensor's first axes.
Index = tuple[slice, ...]


class Weights(Protocol):
    """Float tensors by name. Errors are LoadErrors that name tensor and file."""

    @property
    def paths(self) -> Sequence[Path]:
        """The files that decide about the tensors."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def file(self, name: str) -> Path: ...

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor in fp32. Raises LoadError where it is missing, misshapen or not finite."""

    def part(self, name: str, shape: tuple[int, ...], index: Index) -> Array:
        """``get(name, shape)[index]``; where the form of the file allows it no more is read."""


class TensorFile(Protocol):
    """A file of tensors. Raises LoadError, naming file and tensor, also when it is opened."""

    @property
    def path(self) -> Path: ...

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a float tensor."""

    def read(self, name: str) -> Array:
        """The tensor in fp32."""

    def read_part(self, name: str, index: Index) -> Array:
        """``read(name)[index]``"""

    def release(self) -> None:
        """Give memory back; reading on takes it again."""


class WeightNames(NamedTuple):
    """How one kind of weights is called on disk, in each form."""

    safetensors: str
    torch: str


MODEL_WEIGHTS = WeightNames("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = WeightNames("adapter_model.safetensors", "adapter_model.bin")


class CheckpointWeights:
    """See Weights. Of a folder with several forms, safetensors are read.

    Files are opened when a tensor is asked for, and one that torch cannot map is held in memory
    while its tensors are read.
    """

    def __init__(self, folder: Path, names: WeightNames = MODEL_WEIGHTS) -> None:
        self.paths, self._index = _weight_files(folder, names)

    @property
    def stored_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.paths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def file(self, name: str) -> Path:
        return self._file(name).path

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        return self._finite(name, self._checked(name, shape).read(name))

    def part(self, name: str, shape: tuple[int, ...], index: Index) -> Array:
        return self._finite(name, self._checked(name, shape).read_part(name, index))

    def release(self) -> None:
        """Give memory back; reading on takes it again."""
        for file in self._opened:
            file.release()

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorFile:
        """The tensor's file, now the only one that holds memory."""
        file = self._file(name)
        check_shape(self, name, shape)
        for other in self._opened:
            if other is not file:
                other.release()
        return file

    def _finite(self, name: str, array: Array) -> Array:
        if not np.isfinite(array).all():
            raise LoadError(f"{self.file(name)}: tensor {name} holds NaN or infinity")
        return array

    def _file(self, name: str) -> TensorFile:
        try:
            return self._files[name]
        except KeyError:
            raise LoadError(f"{', '.join(map(str, self.paths))}: no tensor {name}") from None

    @cached_property
    def _opened(self) -> list[TensorFile]:
        return list({id(file): file for file in self._files.values()}.values())

    @cached_property
    def _files(self) -> dict[str, TensorFile]:
        """Tensor name -> its file, opened."""
        found: dict[str, TensorFile] = {}
        for path in self.paths:
            file: TensorFile
            file = TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
            file.release()
            for name in file.names:
                if name in found:
                    raise LoadError(f"tensor {name} is in {found[name].path} and in {path}")
                found[name] = file
        for name, shard in self._index.items():
            if name not in found or found[name].path != shard:
                raise LoadError(f"{shard}: no tensor {name}, which its index says is there")
        return found


def check_shape(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Raises LoadError where the tensor is missing or has another shape."""
    if weights.shape(name) != shape:
        raise LoadError(
            f"{weights.file(name)}: tensor {name} has shape {list(weights.shape(name))}, "
            f"config.json makes it {list(shape)}"
        )


def _weight_files(folder: Path, names: WeightNames) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and what an index says of them: tensor name -> file."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name], {}
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = _places(index)
            return sorted(set(places.values())), places
    raise LoadError(
        f"{folder} has no weights: neither {names.safetensors} nor {names.torch}, nor shards of "
        "either with their index; complete it or change the property that names it"
    )


def _places(index: Path) -> dict[str, Path]:
    try:
        stored = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): index.parent / shard for name, shard in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{index} is damaged: {error!r}") from error
    for name, shard in places.items():
        if shard.parent != index.parent or shard.suffix not in (".safetensors", ".bin"):
            raise LoadError(f"{index} is damaged: {name} is in {shard}, which is no shard")
        if not shard.is_file():
            raise LoadError(f"{index} names {shard.name} for tensor {name}, which is not there")
    if not places:
        raise LoadError(f"{index} is damaged: it names no tensors")
    return places
