"""The weights of an archive: inside, as they are, converted or partitioned, or their address."""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from handler.checkpoints.architecture import T5_FAMILY, T5Architecture
from handler.checkpoints.find import find_adapter, find_checkpoint, local_folder, model_config
from handler.checkpoints.hub import is_hub_id
from handler.checkpoints.partition import partition
from handler.checkpoints.partitioned import read_partition
from handler.checkpoints.read import MODEL_WEIGHTS, CheckpointWeights
from handler.checkpoints.selection import ADAPTER, CHECKPOINT, PARTITION
from handler.checkpoints.tensors import check_tensors
from handler.config import Configuration
from handler.errors import LoadError
from handler.packaging.archive import Member
from handler.packaging.convert import INDEX, as_safetensors
from handler.packaging.images import Image
from handler.packaging.serving_properties import FILE, ServingProperties
from handler.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# Files of these names are made for the archive, whatever a checkpoint has under them.
RESERVED = ("model.py", "requirements.txt", FILE)
INSIDE = "inside"
_ADAPTER = "adapter"
_GRAPHS = ".onnx_t5"
# Bytes of a parameter; int8 with the CPU engine's graphs, FasterTransformer's bf16 as fp32.
_PARTITIONED_BYTES = {"fp32": 4.0, "fp16": 2.2, "bf16": 2.0, "int8": 2.5}


@dataclass(frozen=True)
class Weights:
    """members: files for the archive. settings: with what the endpoint must be told of them.

    place: "inside", or where the endpoint gets them. model_type: None where it is not known.
    """

    members: list[Member]
    settings: ServingProperties
    place: str
    model_type: str | None


def find_weights(
    image: Image,
    model: str | None,
    settings: ServingProperties,
    work: Path,
    partitioned: bool,
    progress: Callable[[int, int], None],
) -> Weights:
    """What an archive of ``model`` holds of weights. Raises LoadError.

    partitioned: they are partitioned into ``work`` before; progress: of that, in tensors.
    """
    folder = model if model is not None and Path(model).is_dir() else None
    c = replace(settings.configuration, model_dir=folder, cache_dir=None)
    place = c.s3url or c.model_id
    if place is not None and local_folder(place, c) is None:
        if partitioned:
            raise LoadError(
                f"--partition puts weights into the archive, which is to get them from {place}; "
                "leave one of the two out"
            )
        return _elsewhere(model, place, settings, c)
    if place is None and model is None:
        raise LoadError("no MODEL given, nor --s3url or --model-id to load it from")
    if place is None and folder is None:
        c = replace(c, model_id=model)
    source = find_checkpoint(c)
    settings = settings.without("model_id", "s3url", "revision")
    model_type = model_config(source)["model_type"]
    _check(image, source, model_type, c, partitioned)
    if partitioned:
        native = image.name != "fastertransformer"
        source = _partitioned(source, c, work, native, progress)
        settings, c = settings.without("merge_adapter"), replace(c, merge_adapter=None)
    members = _files(source, with_python=folder is None and c.trust_remote_code, image=image)
    adapter, settings = _adapter(settings, c)
    return Weights([*members, *adapter], settings, INSIDE, model_type)


def _elsewhere(
    model: str | None, place: str, settings: ServingProperties, c: Configuration
) -> Weights:
    if c.s3url is not None and c.model_id is not None:
        raise LoadError("option.s3url and option.model_id are both set; unset one")
    if c.s3url is not None and not place.startswith("s3://"):
        raise LoadError(f"option.s3url={place} must begin with s3://")
    if not place.startswith("s3://") and not is_hub_id(place):
        raise LoadError(f"option.model_id={place}: no such folder, and not a model id of the hub")
    if model is not None and c.model_dir is None:
        raise LoadError(
            f"MODEL {model} is no folder, and the weights come from {place}: leave MODEL out"
        )
    known = c.model_dir is not None and (Path(c.model_dir) / "config.json").is_file()
    model_type = model_config(Path(str(c.model_dir)))["model_type"] if known else None
    adapter, settings = _adapter(settings, c)
    return Weights(adapter, settings, place, model_type)


def _check(image: Image, source: Path, model_type: str, c: Configuration, partition: bool) -> None:
    """Raises LoadError where no endpoint could load it. Reads headers of weights, not numbers."""
    if image.name == "fastertransformer":
        _check_for_the_wheel(source, c, partition)
    made = read_partition(source)
    if made is not None:
        if (made.format == "fastertransformer") != (image.name == "fastertransformer"):
            raise LoadError(
                f"{source} is partitioned in the layout {made.format}, which image {image.name} "
                "does not read; package the original checkpoint"
            )
        return
    weights = CheckpointWeights(source)
    if model_type in T5_FAMILY:
        a = T5Architecture.from_config(model_config(source))
        load_tokenizer(source, a.vocab_size)
        if weights.paths[0].suffix != ".bin" or _torch_is_there():
            check_tensors(weights, a)


def _check_for_the_wheel(source: Path, c: Configuration, partition: bool) -> None:
    from handler.engines import fastertransformer_loading as wheel

    config = model_config(source)
    ready_made = partition or read_partition(source) is not None
    asked = replace(c, merge_adapter=None) if partition else c
    reason = wheel.refusal(config, asked, ready_made=ready_made)
    warning = reason or wheel.quality_warning(config, c)
    if reason or (warning and c.strict_dtype):
        raise LoadError(f"{source}: {warning}")
    if warning:
        logger.warning("%s", warning)


def _partitioned(
    source: Path,
    c: Configuration,
    work: Path,
    native: bool,
    progress: Callable[[int, int], None],
) -> Path:
    folder = work / "partition"
    needed = _partition_bytes(source, c, native)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise LoadError(
            f"--partition needs {needed / 1e9:.2f} GB beside the archive, "
            f"{free / 1e9:.2f} GB are free there; make room, or choose another output"
        )
    partition(
        replace(c, model_id=str(source), s3url=None),
        "native" if native else "fastertransformer",
        folder,
        progress,
    )
    return folder


def _partition_bytes(source: Path, c: Configuration, native: bool) -> float:
    weights = CheckpointWeights(source)
    numbers = sum(math.prod(weights.shape(name)) for name in weights)
    kind = "fp32" if c.dtype == "auto" or (c.dtype == "bf16" and not native) else c.dtype
    return numbers * _PARTITIONED_BYTES.get(kind, 4.0)


def _files(source: Path, *, with_python: bool, image: Image) -> list[Member]:
    """The checkpoint's files; Python of a place elsewhere only where it may run."""
    made = read_partition(source)
    there = [file.name for file in source.iterdir() if file.is_file()]
    if made is not None:
        names = [*made.files, PARTITION, *_graphs(source)]
    else:
        names = CHECKPOINT.chosen(there)
    names = [
        name for name in names if name not in RESERVED and (with_python or not name.endswith(".py"))
    ]
    pickled = [name for name in names if Path(name).suffix == ".bin"] if made is None else []
    if pickled and image.name != "fastertransformer":  # whose transformers reads both
        if _torch_is_there():
            others = set(names) - {*pickled, MODEL_WEIGHTS.torch + INDEX}
            converted = as_safetensors([source / name for name in sorted(pickled)])
            return [*converted, *(Member.of_file(name, source / name) for name in others)]
        logger.warning(
            "%s goes into the archive as it is, since torch is not installed here to convert it to "
            "safetensors: the endpoint reads it with the torch of image %s",
            pickled[0],
            image.name,
        )
    return [Member.of_file(name, source / name) for name in names]


def _graphs(source: Path) -> list[str]:
    """What partitioning built for the CPU engine; not its locks, nor its notes of this machine."""
    files = (file for file in (source / _GRAPHS).glob("*/*") if file.is_file())
    return [str(file.relative_to(source)) for file in files]


def _adapter(
    settings: ServingProperties, c: Configuration
) -> tuple[list[Member], ServingProperties]:
    """A LoRA adapter on this machine comes along; one of the hub or S3 is the endpoint's to get."""
    if c.merge_adapter is None or local_folder(c.merge_adapter, c) is None:
        return [], settings
    folder = find_adapter(c)
    assert folder is not None
    names = ADAPTER.chosen([file.name for file in folder.iterdir() if file.is_file()])
    members = [Member.of_file(f"{_ADAPTER}/{name}", folder / name) for name in names]
    return members, settings.but(merge_adapter=_ADAPTER)


def _torch_is_there() -> bool:
    return importlib.util.find_spec("torch") is not None
