"""One file of torch.save: pytorch_model.bin, a shard of it, adapter_model.bin."""

from __future__ import annotations

import inspect
import re
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from handler.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT_TYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
# How versions of torch say that a pickle names something else than tensors and their parts.
_MORE_THAN_TENSORS = re.compile(r"[Uu]nsupported (?:global|GLOBAL|class):? (?:GLOBAL )?([\w.]+)")
_MOST_MAPPED_BYTES = 1 << 27  # that are read before the file is mapped anew
_LONGEST_REASON = 100


class TorchFile:
    """See TensorFile. The pickle is read with weights_only: it can make tensors and run no code.

    Where torch can map the file (2.1 and newer, files in the zip form) it is mapped, anew now and
    then, since pages that were read count as the process's memory until then; else its content
    stays in memory until ``release``. Raises LoadError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise LoadError(f"{path} cannot be read: no such file")
        torch = self._torch()
        # A tar is torch's form of before 2017; reading it ran code even with weights_only.
        if tarfile.is_tarfile(path):
            raise LoadError(f"{path} is a tar file, which is refused: reading it may run its code")
        mappable = "mmap" in inspect.signature(torch.load).parameters and zipfile.is_zipfile(path)
        self._arguments: dict[str, Any] = {"mmap": True} if mappable else {}
        self._state: dict[str, Tensor] | None = None
        self._read_bytes = 0
        self._kinds = {n: (tuple(t.shape), str(t.dtype)) for n, t in self._load().items()}
        self.names = self._kinds.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        shape, dtype = self._kinds[name]
        if dtype not in _FLOAT_TYPES:
            raise LoadError(
                f"{self.path}: tensor {name} is of type {dtype}, allowed are "
                f"{', '.join(_FLOAT_TYPES)}"
            )
        return shape

    def read(self, name: str) -> npt.NDArray[np.float32]:
        return self.read_part(name, ())

    def read_part(self, name: str, index: tuple[slice, ...]) -> npt.NDArray[np.float32]:
        tensor = self._load()[name][index]
        torch = self._torch()
        # a copy: the view of a mapping would end with it
        copy = tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self._count(tensor)
        array: npt.NDArray[np.float32] = copy.numpy()
        return array

    def aliases(self) -> dict[str, str]:
        """Name -> the first name of the same tensor, where it is stored once under several."""
        first: dict[tuple[int, tuple[int, ...]], str] = {}
        found: dict[str, str] = {}
        for name, tensor in self._load().items():
            earlier = first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
            if earlier != name and tensor.numel():
                found[name] = earlier
        return found

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, torch's name of the type) of any tensor."""
        return self._kinds[name]

    def stored(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, of whatever type it is."""
        torch = self._torch()
        tensor = self._load()[name].detach()
        # a copy: the view of a mapping would end with it
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
        self._count(tensor)
        array: npt.NDArray[np.uint8] = flat.numpy()
        return array

    def release(self) -> None:
        self._state = None
        self._read_bytes = 0

    def _count(self, tensor: Tensor) -> None:
        self._read_bytes += tensor.numel() * tensor.element_size()
        if self._arguments and self._read_bytes > _MOST_MAPPED_BYTES:
            self.release()

    def _torch(self) -> Any:
        try:
            import torch
        except ImportError as error:
            raise LoadError(
                f"{self.path} can only be read by torch, which is not installed: save the "
                "checkpoint as safetensors (model.save_pretrained(folder) where transformers is) "
                "or install torch"
            ) from error
        return torch

    def _load(self) -> dict[str, Tensor]:
        if self._state is not None:
            return self._state
        torch = self._torch()
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, **self._arguments)
        except Exception as error:  # of the zip reader, of the unpickler, of torch itself
            raise LoadError(self._refusal(error)) from error
        if not isinstance(state, dict) or not state:
            raise LoadError(f"{self.path} holds no tensors by name, but a {type(state).__name__}")
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                raise LoadError(
                    f"{self.path}: {name} is no tensor, but a {type(tensor).__name__}; save the "
                    "model's state_dict() alone"
                )
            if tensor.is_meta or tensor.layout != torch.strided:
                kind = "without data (on the device meta)" if tensor.is_meta else "sparse"
                raise LoadError(
                    f"{self.path}: tensor {name} is {kind}; save the checkpoint with dense tensors"
                )
        self._state = state
        return state

    def _refusal(self, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        more = _MORE_THAN_TENSORS.search(reason)
        if more is not None:
            return (
                f"{self.path} holds more than tensors ({more.group(1)}) and is refused, since "
                "reading it would run its code; convert it to safetensors where you trust it"
            )
        at = max(reason.find("Unsupported operand"), 0)  # behind advice that does not help here
        return f"{self.path} is damaged, torch cannot read it: {reason[at : at + _LONGEST_REASON]}"
