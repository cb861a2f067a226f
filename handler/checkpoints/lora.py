"""A peft LoRA adapter, merged into the weights of its base tensor by tensor as they are read.

W' = W + scaling * B @ A (Hu et al. 2021), with DoRA each row of that scaled to the magnitude that
was learned for it (Liu et al. 2024). peft's own merge_and_unload is what it is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from handler.checkpoints.find import find_adapter
from handler.checkpoints.lora_config import LoraConfig
from handler.checkpoints.read import ADAPTER_WEIGHTS, Array, CheckpointWeights, Index, Weights
from handler.checkpoints.tensors import EMBEDDINGS, HEAD, embedding_name
from handler.config import Configuration
from handler.errors import LoadError

_PREFIX = "base_model.model."
_BLOCK_ELEMENTS = 1 << 22  # of B @ A that are computed at a time


def merged(weights: Weights, configuration: Configuration, *, tied: bool) -> Weights:
    """The weights with option.merge_adapter merged into them; as they are where it is unset.

    tied: as for MergedWeights. Raises LoadError.
    """
    folder = find_adapter(configuration)
    return weights if folder is None else MergedWeights(weights, folder, tied=tied)


@dataclass
class _Change:
    """What the adapter has for one tensor of the base: names of its own tensors.

    replacement: taken in the base's place (modules_to_save, biases). a, b: [r, in], [out, r].
    transposed: the base is [in, out], as embeddings are.
    """

    module: str
    replacement: str | None = None
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    transposed: bool = False


class MergedWeights:
    """See Weights. ``changed`` are the base's names of the tensors that the adapter changes.

    tied: the head may be the embedding, as T5Architecture's.
    """

    def __init__(self, base: Weights, adapter: Path, *, tied: bool) -> None:
        self._base, self._tied = base, tied
        self._config = LoraConfig.read(adapter / "adapter_config.json")
        self._adapter = CheckpointWeights(adapter, ADAPTER_WEIGHTS)
        self.paths: Sequence[Path] = [*base.paths, self._config.file, *self._adapter.paths]

    @property
    def changed(self) -> Sequence[str]:
        return list(self._changes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def file(self, name: str) -> Path:
        return self._base.file(name)

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        change = self._changes.get(name)
        if change is None:
            return self._base.get(name, shape)
        if change.replacement is None:
            weight = self._base.get(name, shape)
        else:
            weight = self._stored(change.replacement)
        if change.a is not None and change.b is not None:
            self._add(change, weight.T if change.transposed else weight)
        if not np.isfinite(weight).all():
            raise LoadError(
                f"{self._adapter.file(change.b or change.replacement or '')}: merged into tensor "
                f"{name} it makes NaN or infinity; change option.merge_adapter"
            )
        return weight

    def part(self, name: str, shape: tuple[int, ...], index: Index) -> Array:
        if name in self._changes:
            return self.get(name, shape)[index]
        return self._base.part(name, shape, index)

    def _add(self, change: _Change, weight: Array) -> None:
        """Change ``weight`` [out, in] in place, some rows at a time: B @ A is as large as it."""
        a, b = self._stored(change.a or ""), self._stored(change.b or "")
        magnitude = self._stored(change.magnitude) if change.magnitude else None
        scaling = np.float32(self._config.scaling(change.module))
        rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), rows):
            block = weight[start : start + rows]
            block += (b[start : start + rows] @ a) * scaling
            if magnitude is not None:
                with np.errstate(divide="ignore", invalid="ignore"):
                    factors = magnitude[start : start + rows] / np.linalg.norm(block, axis=1)
                    block *= factors[:, None]

    def _stored(self, name: str) -> Array:
        return self._adapter.get(name, self._adapter.shape(name))

    @cached_property
    def _changes(self) -> dict[str, _Change]:
        """Base tensor -> what the adapter has for it; every tensor of the adapter has its place."""
        changes: dict[str, _Change] = {}
        for name in self._adapter:
            module, part = _split(name.removeprefix(_PREFIX))
            tensor = f"{module}.weight" if part in _PARTS else module
            if part == "lora_bias":
                raise LoadError(f"{self._adapter.file(name)}: {name} is a bias, which T5 has not")
            if tensor not in self._base:
                raise LoadError(
                    f"{self._adapter.file(name)}: tensor {name} of the adapter belongs to "
                    f"{tensor}, which {_listed(self._base.paths)} has not; option.merge_adapter "
                    "must name an adapter of this base"
                )
            if tensor in EMBEDDINGS and tensor != embedding_name(self._base):
                raise LoadError(
                    f"{self._adapter.file(name)}: tensor {name} changes {tensor} alone, which this "
                    f"base ties to {embedding_name(self._base)}; it cannot be merged"
                )
            change = changes.setdefault(tensor, _Change(module))
            setattr(change, _PARTS.get(part, "replacement"), name)
            change.transposed |= part.startswith("lora_embedding")
        for tensor, change in changes.items():
            self._check(tensor, change)
        self._check_completeness(changes)
        self._spread(changes)
        return changes

    def _spread(self, changes: dict[str, _Change]) -> None:
        """To the other names of a table that is stored twice: for peft it is one parameter."""
        names = (*EMBEDDINGS, HEAD) if self._tied else EMBEDDINGS
        tables = [name for name in names if name in self._base]
        changed = [name for name in tables if name in changes]
        for name in changed:
            others = [other for other in tables if other != name and self._are_equal(name, other)]
            if others and (changes[name].a is None or set(others) & set(changed)):
                raise LoadError(
                    f"{_listed(self._adapter.paths)}: {name} is changed by itself, which this base "
                    f"ties to {', '.join(others)}; it cannot be merged"
                )
            changes.update(dict.fromkeys(others, changes[name]))

    def _are_equal(self, one: str, other: str) -> bool:
        shape = self._base.shape(one)
        return self._base.shape(other) == shape and np.array_equal(
            self._base.get(one, shape), self._base.get(other, shape)
        )

    def _check(self, tensor: str, change: _Change) -> None:
        """Complete, and of the base's shapes."""
        shape = self._base.shape(tensor)
        if change.replacement is not None:
            self._check_shape(change.replacement, shape, tensor)
        if change.a is None and change.b is None and change.magnitude is None:
            return
        module, config = change.module, self._config
        is_embedding = change.transposed
        for part in ("a", "b") + (("magnitude",) if config.use_dora else ()):
            if getattr(change, part) is None:
                raise LoadError(
                    f"{_listed(self._adapter.paths)}: no tensor lora_{part} for {module}; the "
                    "adapter is incomplete"
                )
        if bool(change.magnitude) != config.use_dora or (config.use_dora and is_embedding):
            raise LoadError(
                f"{config.file}: use_dora={config.use_dora} does not go with what the adapter has "
                f"for {module}; DoRA is merged into linear layers only"
            )
        if len(shape) != 2:
            raise LoadError(f"{config.file}: {module} has the shape {list(shape)}, no matrix")
        outputs, inputs = shape[::-1] if is_embedding else shape
        rank = config.rank(module)
        self._check_shape(change.a or "", (rank, inputs), tensor)
        self._check_shape(change.b or "", (outputs, rank), tensor)
        if change.magnitude:
            self._check_shape(change.magnitude, (outputs,), tensor)

    def _check_shape(self, name: str, shape: tuple[int, ...], tensor: str) -> None:
        if self._adapter.shape(name) != shape:
            raise LoadError(
                f"{self._adapter.file(name)}: tensor {name} has shape "
                f"{list(self._adapter.shape(name))}, it must be {list(shape)} for {tensor} "
                f"{list(self._base.shape(tensor))} of {self._base.file(tensor)} and the r of "
                f"{self._config.file.name}; option.merge_adapter must name an adapter of this base"
            )

    def _check_completeness(self, changes: dict[str, _Change]) -> None:
        for tensor in self._base:
            module = tensor.removesuffix(".weight")
            if module == tensor or len(self._base.shape(tensor)) != 2 or tensor in changes:
                continue
            if self._config.targets(module):
                raise LoadError(
                    f"{_listed(self._adapter.paths)}: no tensors for {module}, which "
                    f"target_modules of {self._config.file} name; the adapter is incomplete or of "
                    "another base"
                )


_PARTS = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "base_layer": "replacement",  # peft saves targeted embeddings with the adapter
}


def _split(name: str) -> tuple[str, str]:
    """(module, a key of _PARTS), or (tensor, "") for one that replaces the base's."""
    stem = name.removesuffix(".weight")
    module, _, part = stem.rpartition(".")
    if part in _PARTS:
        return module, part
    if name.endswith(".lora_B.bias"):
        return name.removesuffix(".lora_B.bias"), "lora_bias"
    return name, ""


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
