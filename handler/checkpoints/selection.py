"""Which of the files that lie in a place make up a checkpoint, or an adapter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from handler.checkpoints.read import ADAPTER_WEIGHTS, MODEL_WEIGHTS, WeightNames

# Tells of a partitioned folder, whose other files it names.
PARTITION = "partition.json"


@dataclass(frozen=True)
class Selection:
    """What is loaded: the file that describes it, its small files (fnmatch patterns), its weights.

    Weights come in one form: safetensors where they are there, else what torch.save wrote. Never
    copies for TensorFlow, Flax and ONNX, what training left, or what a broken download left
    (``model.safetensors1234567``); nothing hidden (as what a download here notes), nothing from
    subfolders.
    """

    description: str
    small: tuple[str, ...]
    weights: WeightNames

    def wanted(self, form: str) -> list[str]:
        """Patterns of the files to take; ``form``: a name of ``weights``."""
        stem, _, ending = form.rpartition(".")
        return [*self.small, form, f"{stem}-*.{ending}"]

    def unwanted(self, form: str) -> list[str]:
        """Patterns that win over ``wanted``."""
        others = [f"{name}.index.json" for name in self.weights if name != form]
        return ["*/*", ".*", "tf_model*", "flax_model*", *others]

    def chosen(self, names: Collection[str]) -> list[str]:
        """Of names relative to a place, those to take."""
        form = self.form(names)
        unwanted = self.unwanted(form)
        if form in names:  # shards would be the same again
            stem, _, ending = form.rpartition(".")
            unwanted += [f"{form}.index.json", f"{stem}-*.{ending}"]
        return sorted(
            name
            for name in names
            if any(fnmatchcase(name, p) for p in self.wanted(form))
            and not any(fnmatchcase(name, p) for p in unwanted)
        )

    def form(self, names: Collection[str]) -> str:
        """The name of ``weights`` that is there, the better one first; the last if none is."""
        there = (form for form in self.weights if {form, f"{form}.index.json"} & set(names))
        return next(there, self.weights.torch)


CHECKPOINT = Selection(
    "config.json", ("*.json", "*.model", "*.txt", "*.spm", "*.py"), MODEL_WEIGHTS
)
ADAPTER = Selection("adapter_config.json", ("adapter_config.json", "*.index.json"), ADAPTER_WEIGHTS)
