"""From a configuration to a local checkpoint folder: a path, or a model id of the hub."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from handler.config import Configuration
from handler.errors import LoadError

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Never the TensorFlow and Flax copies of the weights, nor what lies in folders: exported graphs,
# training's checkpoints.
_WANTED = ["*.json", "*.model", "*.safetensors", "*.bin", "*.txt", "*.spm", "*.py"]
_UNWANTED = ["*/*"]
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_LONGEST_REASON = 300


def find_checkpoint(configuration: Configuration) -> Path:
    """The folder with config.json that the configuration names; downloads a hub id.

    Raises LoadError, naming the property to change.
    """
    c = configuration
    if c.s3url or (c.model_id or "").startswith("s3://"):
        raise LoadError(
            f"{c.s3url or c.model_id}: S3 addresses are not read by this version; copy the model "
            "to a folder and set option.model_id to it"
        )
    if c.model_id is None:
        if c.model_dir is None:
            raise LoadError("no model given: set option.model_id to a folder or a model id")
        return _checked(Path(c.model_dir), "the model folder holds no weights: set option.model_id")
    for folder in (Path(c.model_dir or ".") / c.model_id, Path(c.model_id).expanduser()):
        if folder.is_dir():
            return _checked(folder, "change option.model_id")
    if c.model_id.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(c.model_id):
        raise LoadError(f"option.model_id={c.model_id}: no such folder, and not a hub model id")
    return _download(c.model_id, c)


def model_config(folder: Path) -> dict[str, Any]:
    """config.json as the checkpoint has it: libraries add and change keys when they read it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{folder}/config.json cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LoadError(f"{folder}/config.json is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadError(f"{folder}/config.json names no model_type")
    return config


def weight_bytes(folder: Path) -> int:
    """Size of the weight files that would be read, in bytes."""
    for pattern in ("*.safetensors", "*.bin"):
        files = list(folder.glob(pattern))
        if files:
            return sum(file.stat().st_size for file in files)
    return 0


def _checked(folder: Path, advice: str) -> Path:
    if not (folder / "config.json").is_file():
        raise LoadError(f"{folder} has no config.json; {advice}")
    return folder


def _download(model_id: str, c: Configuration) -> Path:
    place = f"option.model_id={model_id}" + (f" at revision {c.revision}" if c.revision else "")
    logger.info("downloading %s", place)
    try:
        folder = _snapshot(model_id, c, [*_UNWANTED, "*.bin"])
        if not any((folder / name).is_file() for name in _SAFETENSORS):
            folder = _snapshot(model_id, c, _UNWANTED)
    except Exception as error:  # of the hub, of the name, of its HTTP client (which one changes)
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise LoadError(f"{place} is no folder and could not be downloaded: {reason}") from error
    return _checked(folder, "change option.model_id")


def _snapshot(model_id: str, c: Configuration, unwanted: list[str]) -> Path:
    """The files of the root, from the cache as far as they are there."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model_id,
            revision=c.revision,
            cache_dir=c.cache_dir,
            allow_patterns=_WANTED,
            ignore_patterns=unwanted,
        )
    )
