"""What hf_generate's model is made of: checked files before it is loaded, its parameters after."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.checkpoints.architecture import T5_FAMILY, T5Architecture
from handler.checkpoints.lora import MergedWeights
from handler.checkpoints.read import Array, CheckpointWeights, Index
from handler.checkpoints.tensors import HEAD, check_tensors
from handler.errors import LoadError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def checked_files(folder: Path, config: Mapping[str, Any]) -> CheckpointWeights:
    """The checkpoint's files: whole, each tensor once, those of the T5 family all and no other.

    Reads headers only. Raises LoadError naming tensor and file.
    """
    if (folder / "adapter_config.json").is_file() and importlib.util.find_spec("peft"):
        raise LoadError(
            f"{folder} has an adapter_config.json, for which transformers would load another base; "
            "move the adapter to a folder of its own and set option.merge_adapter to it"
        )
    files = CheckpointWeights(folder)
    if config["model_type"] in T5_FAMILY:
        check_tensors(files, T5Architecture.from_config(config))
    list(files)
    files.release()
    return files


def refuse_what_transformers_passed_over(
    files: CheckpointWeights, config: Mapping[str, Any], told: Mapping[str, Any]
) -> None:
    """It goes on with random numbers where a tensor is missing or misshapen. Raises LoadError.

    What it did not know is a warning: some checkpoints carry buffers of old versions.

    told: from_pretrained's loading info.
    """
    where = _listed(files.paths)
    for name, stored, expected in told.get("mismatched_keys") or ():
        place = files.file(name) if name in files else where
        raise LoadError(
            f"{place}: tensor {name} has shape {list(stored)}, config.json makes it "
            f"{list(expected)}"
        )
    missing = sorted(told["missing_keys"])
    if missing:
        raise LoadError(
            f"{where}: no tensor {missing[0]}; {len(missing)} weights of a model of type "
            f"{config['model_type']} are missing, complete its files or change option.model_id"
        )
    for name in sorted(told.get("unexpected_keys") or ()):
        logger.warning("%s: tensor %s has no place in the model", where, name)


def refuse_numbers_that_are_none(model: Any, files: CheckpointWeights) -> None:
    """Raises LoadError naming the tensor and its file, or the dtype that spoilt it.

    Looks at the parameters where they lie, which is fast on a GPU; only when something is wrong are
    the files read again to name it.
    """
    import torch

    wrong = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if not wrong:
        return
    for name in files:
        if any(name.endswith(n) or n.endswith(name) for n in wrong):  # some have a prefix more
            files.get(name, files.shape(name))
    raise LoadError(
        f"{_listed(files.paths)}: tensor {wrong[0]} is beyond the range of "
        f"{model.get_parameter(wrong[0]).dtype}; set option.dtype=bf16 or fp32"
    )


def merge_adapter(
    model: Any, files: CheckpointWeights, adapter: Path, config: Mapping[str, Any]
) -> None:
    """Merge an adapter into the model's parameters, one at a time. Raises LoadError."""
    import torch

    tied = config.get("tie_word_embeddings") is not False
    if not tied:
        _untie(model, files)
    parameters = _Parameters(model, files)
    weights = MergedWeights(parameters, adapter, tied=tied)
    with torch.no_grad():
        for name in weights.changed:
            new = torch.from_numpy(weights.get(name, weights.shape(name)))
            parameters.of_the_model[name].copy_(new)


def _untie(model: Any, files: CheckpointWeights) -> None:
    """Give the head a parameter of its own where the checkpoint has a tensor of its own for it.

    transformers 5 ties the two whenever they hold the same numbers.
    """
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight and HEAD in files:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


class _Parameters:
    """See Weights: a loaded model's parameters under the names that peft knows them by.

    A parameter that has several names is there under the first.
    """

    def __init__(self, model: Any, files: CheckpointWeights) -> None:
        self.of_the_model: dict[str, torch.nn.Parameter] = dict(model.named_parameters())
        self.paths: Sequence[Path] = files.paths
        self._files = files

    def __iter__(self) -> Iterator[str]:
        return iter(self.of_the_model)

    def __contains__(self, name: object) -> bool:
        return name in self.of_the_model

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.of_the_model[name].shape)

    def file(self, name: str) -> Path:
        return self._files.file(name) if name in self._files else self.paths[0]

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        import torch

        copy = self.of_the_model[name].detach().to("cpu", torch.float32, copy=True)
        array: Array = copy.contiguous().numpy()
        return array

    def part(self, name: str, shape: tuple[int, ...], index: Index) -> Array:
        return self.get(name, shape)[index]


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))
