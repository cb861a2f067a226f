"""pytorch_model.bin as safetensors, on its way into an archive: one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from handler.checkpoints.read import MODEL_WEIGHTS
from handler.checkpoints.torch_file import TorchFile
from handler.errors import LoadError
from handler.packaging.archive import BLOCK, Member

INDEX = ".index.json"
# torch's names of types -> safetensors' names, bytes of an element
_TYPES = {
    "torch.float64": ("F64", 8),
    "torch.float32": ("F32", 4),
    "torch.float16": ("F16", 2),
    "torch.bfloat16": ("BF16", 2),
    "torch.int64": ("I64", 8),
    "torch.int32": ("I32", 4),
    "torch.int16": ("I16", 2),
    "torch.int8": ("I8", 1),
    "torch.uint8": ("U8", 1),
    "torch.bool": ("BOOL", 1),
}
_ALIGNMENT = 64
# transformers' own second and third names of shared.weight, which every reader does without.
_NEEDLESS = "embed_tokens.weight"


def as_safetensors(files: list[Path]) -> list[Member]:
    """The members that hold what ``files`` (pytorch_model*.bin) hold, each number as it is.

    Shards stay shards, with a new index. Raises LoadError where a file is damaged or no tensors'.
    """
    members, places = [], {}
    total = 0
    for file in files:
        name = file.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
        member, sizes = _converted(file, name)
        members.append(member)
        places.update(dict.fromkeys(sizes, name))
        total += sum(sizes.values())
    if [member.name for member in members] != [MODEL_WEIGHTS.safetensors]:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=1) + "\n"
        members.append(Member.of_bytes(MODEL_WEIGHTS.safetensors + INDEX, text.encode()))
    return members


def _converted(file: Path, name: str) -> tuple[Member, dict[str, int]]:
    """The member, and tensor -> bytes."""
    source = TorchFile(file)
    needless = [alias for alias in source.aliases() if alias.endswith(_NEEDLESS)]
    kinds = {tensor: _kind(source, tensor) for tensor in source.names if tensor not in needless}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    offset = 0
    # wide elements first, so that none is misaligned
    for tensor, (kind, shape, width) in sorted(kinds.items(), key=lambda item: -item[1][2]):
        size = width * math.prod(shape)
        header[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        sizes[tensor] = size
        offset += size
    source.release()
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return Member(name, len(head) + offset, partial(_pieces, source, head, sizes)), sizes


def _kind(source: TorchFile, tensor: str) -> tuple[str, tuple[int, ...], int]:
    shape, dtype = source.kind(tensor)
    if dtype not in _TYPES:
        raise LoadError(
            f"{source.path}: tensor {tensor} is of type {dtype}, allowed are {', '.join(_TYPES)}"
        )
    return (_TYPES[dtype][0], shape, _TYPES[dtype][1])


def _pieces(source: TorchFile, head: bytes, sizes: Mapping[str, int]) -> Iterator[bytes]:
    yield head
    for tensor in sizes:
        data = source.stored(tensor).data
        for start in range(0, len(data), BLOCK):
            yield bytes(data[start : start + BLOCK])
    source.release()
