"""Weights of a checkpoint folder as numpy arrays, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handler.errors import LoadError

Array = npt.NDArray[np.float32]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class CheckpointWeights:
    """The float tensors of a folder's safetensors files; ``get`` reads one of them.

    Nothing is kept, nor mapped: mapped pages count as the process's memory, too. Raises LoadError
    naming tensor and file.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {name: _SafetensorsFile(folder / name) for name in _weight_files(folder)}
        self._place = {name: file for file in self._files.values() for name in file.tensors}
        self.paths = [folder / name for name in self._files]

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor in fp32. Raises LoadError where it is missing, misshapen or not finite."""
        file = self._place.get(name)
        if file is None:
            raise LoadError(f"{', '.join(map(str, self.paths))}: no tensor {name}")
        array = file.read(name)
        if array.shape != shape:
            raise LoadError(
                f"{file.path}: tensor {name} has shape {list(array.shape)}, config.json makes it "
                f"{list(shape)}"
            )
        if not np.isfinite(array).all():
            raise LoadError(f"{file.path}: tensor {name} holds NaN or infinity")
        return array


def has_safetensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_SINGLE, _INDEX))


def _weight_files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise LoadError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; save the checkpoint as safetensors or "
            "set option.backend=transformers"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index} is damaged: {error!r}") from error
    return sorted(map(str, names))


class _Tensor(NamedTuple):
    """A tensor's entry in the header; begin and end are counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @staticmethod
    def of(entry: Any) -> _Tensor:
        begin, end = map(int, entry["data_offsets"])
        if not 0 <= begin <= end:
            raise ValueError(f"data_offsets {begin}, {end}")
        return _Tensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end)


class _SafetensorsFile:
    """One file: its header, and its tensors where they lie.

    The safetensors library gives numpy no bfloat16, hence the reading of the (documented) format
    here: eight bytes of header length, a JSON header, the data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                length = int.from_bytes(stream.read(8), "little")
                header = stream.read(length) if 8 + length <= size else b""
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        self._start = 8 + length
        self.tensors = self._tensors(header, size)

    def _tensors(self, header: bytes, size: int) -> dict[str, _Tensor]:
        try:
            entries: dict[str, Any] = json.loads(header)
            entries.pop("__metadata__", None)
            tensors = {name: _Tensor.of(entry) for name, entry in entries.items()}
            end = self._start + max(tensor.end for tensor in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"{self.path} is not a safetensors file: {error!r}") from error
        if end != size:
            raise LoadError(
                f"{self.path} is truncated or padded: {size} bytes, its header tells {end}"
            )
        return tensors

    def read(self, name: str) -> Array:
        tensor = self.tensors[name]
        kind = _NUMPY_TYPES.get(tensor.dtype)
        if kind is None:
            raise LoadError(
                f"{self.path}: tensor {name} is of type {tensor.dtype}, allowed are "
                f"{', '.join(_NUMPY_TYPES)}"
            )
        count = math.prod(tensor.shape)
        if tensor.end - tensor.begin != count * np.dtype(kind).itemsize:
            raise LoadError(
                f"{self.path}: tensor {name} has {tensor.end - tensor.begin} bytes, which is not "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        flat = np.fromfile(self.path, kind, count, offset=self._start + tensor.begin)
        if tensor.dtype == "BF16":  # the upper half of an fp32
            flat = (flat.astype("<u4") << 16).view("<f4")
        array: Array = flat.reshape(tensor.shape).astype(np.float32, copy=False)
        return array
