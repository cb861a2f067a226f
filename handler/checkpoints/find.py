"""From a configuration to local folders: a path, a model id of the hub, an address in S3."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from handler.checkpoints import hub, s3
from handler.checkpoints.selection import ADAPTER, CHECKPOINT, PARTITION, Selection
from handler.config import Configuration
from handler.errors import LoadError

logger = logging.getLogger(__name__)


def find_checkpoint(configuration: Configuration) -> Path:
    """The folder with config.json that the configuration names; downloads what is not local.

    Raises LoadError, naming the property to change.
    """
    c = configuration
    if c.s3url is not None:
        return _from_s3url(c.s3url, c)
    if c.model_id is None:
        if c.model_dir is None:
            raise LoadError("no model given: set option.model_id to a folder or a model id")
        advice = "the model folder holds no weights: set option.model_id"
        return _checked(Path(c.model_dir), CHECKPOINT, advice)
    return _found(c.model_id, CHECKPOINT, c, option="model_id", revision=c.revision)


def find_adapter(configuration: Configuration) -> Path | None:
    """The folder with adapter_config.json that option.merge_adapter names, or None without it.

    Raises LoadError.
    """
    c = configuration
    if c.merge_adapter is None:
        return None
    return _found(c.merge_adapter, ADAPTER, c, option="merge_adapter", revision=None)


def model_config(folder: Path) -> dict[str, Any]:
    """config.json as the checkpoint has it: libraries add and change keys when they read it."""
    config = read_json_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise LoadError(f"{folder}/config.json names no model_type")
    return config


def read_json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _from_s3url(address: str, c: Configuration) -> Path:
    """DJLServing up to 0.25 downloads s3url itself and puts its folder into model_id."""
    if c.model_id is None:
        return _from_s3(address, CHECKPOINT, c, option="s3url")
    folder = local_folder(c.model_id, c)
    if folder is None:
        raise LoadError(
            f"option.s3url={address} and option.model_id={c.model_id} are both set; unset one"
        )
    logger.info("option.s3url=%s was downloaded to %s", address, folder)
    return _checked(folder, CHECKPOINT, "change option.s3url")


def _found(
    place: str, selection: Selection, c: Configuration, *, option: str, revision: str | None
) -> Path:
    if place.startswith("s3://"):
        return _from_s3(place, selection, c, option=option)
    folder = local_folder(place, c)
    if folder is None:
        if not hub.is_hub_id(place):
            raise LoadError(f"option.{option}={place}: no such folder, and not a hub model id")
        folder = hub.download(
            place, selection, option=option, revision=revision, cache_dir=c.cache_dir
        )
        _refuse_partitioned(folder, f"option.{option}={place}")
    return _checked(folder, selection, f"change option.{option}")


def _from_s3(address: str, selection: Selection, c: Configuration, *, option: str) -> Path:
    folder = s3.download(address, selection, option=option, cache_dir=c.cache_dir)
    _refuse_partitioned(folder, f"option.{option}={address}")
    return _checked(folder, selection, f"change option.{option}")


def _refuse_partitioned(folder: Path, place: str) -> None:
    """FasterTransformer's would have to lie where it was made for, and not in a cache."""
    if (folder / PARTITION).is_file():
        raise LoadError(
            f"{place} is partitioned, which is served from a folder only: copy all of it to this "
            "host, subfolders too, and set option.model_id to the folder"
        )


def local_folder(place: str, c: Configuration) -> Path | None:
    """The folder that a path names, absolute or from the model or working directory, or None."""
    folders = (Path(c.model_dir or ".") / place, Path(place).expanduser())
    return next((folder for folder in folders if folder.is_dir()), None)


def _checked(folder: Path, selection: Selection, advice: str) -> Path:
    if not (folder / selection.description).is_file():
        raise LoadError(f"{folder} has no {selection.description}; {advice}")
    return folder
