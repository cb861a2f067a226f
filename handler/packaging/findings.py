"""What a check looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.checkpoints.architecture import T5_FAMILY, T5Architecture
from handler.checkpoints.hub import is_hub_id
from handler.config import Configuration
from handler.errors import LoadError, one_line
from handler.packaging.images import Image
from handler.packaging.instances import InstanceType

# Where SageMaker puts the archive's content.
SERVED_FROM = "/opt/ml/model"


@dataclass(frozen=True)
class Finding:
    """name: short and stable. severity: error (it will not be served) or warning (it may not be as
    intended). message: one line, what was seen, what is allowed, what to change."""

    name: str
    severity: str
    message: str


def error(name: str, message: object) -> Finding:
    return Finding(name, "error", one_line(str(message)))


def warning(name: str, message: object) -> Finding:
    return Finding(name, "warning", one_line(str(message)))


@dataclass(frozen=True)
class Subject:
    """A model folder as it was unpacked, and what it is to run on.

    properties: serving.properties, None where it cannot be read. configuration: what the handler
    makes of it, None where it would refuse. checkpoint: the folder with config.json, None where the
    weights come from elsewhere. config: config.json, None where there is none to read.
    """

    folder: Path
    properties: Mapping[str, str] | None
    configuration: Configuration | None
    checkpoint: Path | None
    config: Mapping[str, Any] | None
    image: Image | None = None
    instance: InstanceType | None = None

    def relative(self, text: object) -> str:
        """Without the place where it was unpacked, which says nothing to people."""
        return (
            str(text).replace(f"{self.folder}/", "").replace(str(self.folder), "the model folder")
        )

    @property
    def architecture(self) -> T5Architecture | None:
        """None where config.json tells none of the T5 family."""
        if self.config is None or self.config["model_type"] not in T5_FAMILY:
            return None
        try:
            return T5Architecture.from_config(self.config)
        except LoadError:
            return None

    @property
    def on_gpu(self) -> bool | None:
        """None: not told."""
        if self.instance is not None:
            return self.instance.gpus > 0
        return None if self.image is None else self.image.gpu


def checkpoint_folder(folder: Path, c: Configuration) -> Path | None:
    """Where in the unpacked folder the configuration finds its checkpoint; None: elsewhere.

    Raises LoadError where it names a folder that will not be there.
    """
    if c.s3url is not None:
        return None
    return folder if c.model_id is None else folder_inside(folder, "model_id", c.model_id)


def folder_inside(folder: Path, option: str, place: str) -> Path | None:
    """The unpacked folder that a property names; None: a place of the hub or in S3.

    Raises LoadError where it is neither.
    """
    inside = place
    if place == SERVED_FROM or place.startswith(f"{SERVED_FROM}/"):
        inside = place[len(SERVED_FROM) :].lstrip("/") or "."
    if (folder / inside).is_dir() and not Path(inside).is_absolute():
        return folder / inside
    if place.startswith("s3://") or is_hub_id(place):
        return None
    raise LoadError(
        f"option.{option}={place} is no folder of the archive, no hub id and no s3:// address; "
        f"name a folder in it, which will be in {SERVED_FROM}, or remove the line"
    )
