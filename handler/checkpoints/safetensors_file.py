"""One safetensors file: its header, and its tensors where they lie."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from handler.errors import LoadError

_NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_STORED_TYPES = {**_NUMPY_TYPES, "I8": "<i1"}
_PIECE = 1 << 22  # elements that are read at a time where some of each row are wanted
_LONGEST_HEADER = 100_000_000  # the format's own limit
# What reading a header that is none, or has other values, raises; Infinity is no integer.
_WRONG_HEADERS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
)


class _Place(NamedTuple):
    """A tensor's entry in the header; begin and end are counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @staticmethod
    def of(entry: Any) -> _Place:
        begin, end = map(int, entry["data_offsets"])
        if not 0 <= begin <= end:
            raise ValueError(f"data_offsets {begin}, {end}")
        return _Place(str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end)


class SafetensorsFile:
    """See TensorFile.

    The safetensors library gives numpy no bfloat16, hence the reading of the (documented) format
    here: eight bytes of header length, a JSON header, the data without holes. Nothing is kept, nor
    mapped: mapped pages count as the process's memory, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                length = int.from_bytes(stream.read(8), "little")
                fits = 8 + length <= size and length <= _LONGEST_HEADER
                header = stream.read(length) if fits else b""
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        self._start = 8 + length
        self._places = self._read_header(header, size)
        self.names = self._places.keys()

    def _read_header(self, header: bytes, size: int) -> dict[str, _Place]:
        try:
            entries = json.loads(header, object_pairs_hook=_without_repetition)
            entries.pop("__metadata__", None)
            places = {name: _Place.of(entry) for name, entry in entries.items()}
            if not places:
                raise ValueError("no tensors")
        except _WRONG_HEADERS as error:
            raise LoadError(f"{self.path} is not a safetensors file: {error!r}") from error
        end = self._start + max(place.end for place in places.values())
        if end != size:
            raise LoadError(
                f"{self.path} is truncated or padded: {size} bytes, its header tells {end}"
            )
        reached = 0
        for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
            if place.begin != reached:
                raise LoadError(
                    f"{self.path}: tensor {name} begins at byte {place.begin} of the data, the one "
                    f"before it ends at {reached}"
                )
            reached = place.end
            self._check_length(name, place)
        return places

    def _check_length(self, name: str, place: _Place) -> None:
        kind = _STORED_TYPES.get(place.dtype)
        length = place.end - place.begin
        if kind is not None and length != math.prod(place.shape) * np.dtype(kind).itemsize:
            raise LoadError(
                f"{self.path}: tensor {name} has {length} bytes, which is not {place.dtype} "
                f"{list(place.shape)}"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places[name]
        if place.dtype not in _NUMPY_TYPES:
            raise LoadError(
                f"{self.path}: tensor {name} is of type {place.dtype}, allowed are "
                f"{', '.join(_NUMPY_TYPES)}"
            )
        return place.shape

    def stored(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """(the format's name of the type, shape) of any tensor; None where it is missing."""
        place = self._places.get(name)
        return None if place is None else (place.dtype, place.shape)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        self.shape(name)
        return self._in_fp32(name, self.read_as_stored(name))

    def read_part(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[np.float32]:
        """``read(name)[index]``: of the first axis no more is read, of others piece by piece."""
        shape = self.shape(name)
        rows = range(shape[0])[index[0]] if index else range(0)
        if not index or rows.step != 1:
            return self.read(name)[index]
        others = zip(index[1:], shape[1:])
        if all(range(size)[part] == range(size) for part, size in others):
            return self._in_fp32(name, self._read_rows(name, rows.start, len(rows)))
        wanted = (slice(None), *index[1:])
        most = max(1, _PIECE // max(1, math.prod(shape[1:])))
        pieces = [
            self._in_fp32(name, self._read_rows(name, start, min(most, rows.stop - start))[wanted])
            for start in rows[::most] or [rows.stop]
        ]
        return np.concatenate(pieces)

    def read_as_stored(self, name: str) -> npt.NDArray[Any]:
        """The numbers of a float tensor or one of I8; of BF16 the bits."""
        shape = self._places[name].shape
        if not shape:
            return self._read_rows(name, 0, 1).reshape(())
        return self._read_rows(name, 0, shape[0])

    def _read_rows(self, name: str, first: int, count: int) -> npt.NDArray[Any]:
        """[count, ...] as stored, from the tensor's row ``first``."""
        place = self._places[name]
        kind = np.dtype(_STORED_TYPES[place.dtype])
        width = math.prod(place.shape[1:])
        start = self._start + place.begin + first * width * kind.itemsize
        try:
            flat = np.fromfile(self.path, kind, count * width, offset=start)
        except OSError as error:
            raise LoadError(f"{self.path} cannot be read: {error}") from error
        if flat.size != count * width:
            raise LoadError(f"{self.path}: the file ends within tensor {name}")
        return flat.reshape(count, *place.shape[1:])

    def _in_fp32(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self._places[name].dtype == "BF16":  # the upper half of an fp32
            bits = array.astype("<u4")
            bits <<= 16
            array = bits.view("<f4")
        with np.errstate(over="ignore"):  # of fp64; who reads refuses infinity
            return array.astype(np.float32, copy=False)

    def release(self) -> None:
        """Nothing is held."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would silently take the last of two entries."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found
