"""What commands share: the model they work on, its options, the log."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.config import (
    Configuration,
    canonical_name,
    read_configuration,
    serving_properties,
)
from handler.errors import LoadError, RequestError, nearest
from handler.log import start_log as start_log
from handler.packaging.serving_properties import written_key

# Lies in a source checkout, not in an installed package or a model tarball.
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "model"
_DEMO_NAME = "demo"
_VARIABLES_THAT_NAME_A_MODEL = ("HF_MODEL_ID", "OPTION_MODEL_ID", "OPTION_S3URL")


@dataclass(frozen=True)
class ModelChoice:
    name: str
    configuration: Configuration


class CommandParser(argparse.ArgumentParser):
    """Of one command: what it does not know is an error here, with the command's own usage.

    mixed: options may also stand between positional arguments that can be left out.
    """

    def __init__(self, *, mixed: bool = False, **told: Any) -> None:
        super().__init__(**told)
        self._mixed = mixed
        self._inside = False  # parsing mixed arguments calls parse_known_args again

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside or not self._mixed:
            parsed, unknown = super().parse_known_args(args, namespace)
        else:
            self._inside = True
            try:
                parsed, unknown = self.parse_known_intermixed_args(args, namespace)
            finally:
                self._inside = False
        if unknown and not self._inside:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._advice(unknown[0])}")
        return parsed, unknown

    def _advice(self, unknown: str) -> str:
        flag, _, _ = unknown.partition("=")
        known = self._option_string_actions
        bare = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            return ""
        if "--option" in known and canonical_name(bare):
            return f"; did you mean --option {bare}=VALUE?"
        hint = nearest(flag, known)
        return f"; did you mean {hint}?" if hint else ""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a property, as option.NAME=VALUE in serving.properties; may be repeated",
    )


def confirm(question: str, yes: bool) -> None:
    """Asks on the terminal, unless ``yes``. Raises LoadError unless it is answered with yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise LoadError("there is no terminal to ask on: --yes goes on without")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise LoadError("nothing was done")


def choose_model(model: str | None, options: Sequence[str]) -> ModelChoice:
    """The configuration for MODEL (a folder or a hub id), or for the demo without one.

    A folder's serving.properties count as they do in DJLServing: below ``--option``, above the
    environment. A folder that holds a checkpoint is not passed over for one that the environment
    names. Raises LoadError.
    """
    command_line = dict(map(split_option, options))
    for name in command_line:
        if canonical_name(name) is None:
            written_key(name)  # refuses what DJLServing does not know either
    properties: dict[str, str] = {}
    environment = dict(os.environ)
    if model is None and not _names_a_model(command_line):
        model = str(_demo())
    if model is not None and Path(model).is_dir():
        properties = {**serving_properties(Path(model)), "model_dir": model}
        if (Path(model) / "config.json").is_file():
            for variable in _VARIABLES_THAT_NAME_A_MODEL:
                environment.pop(variable, None)
    elif model is not None:
        command_line["model_id"] = model
    configuration = read_configuration(
        command_line=command_line, properties=properties, environment=environment
    )
    return ModelChoice(_name(configuration), configuration)


def json_object(text: str, option: str) -> dict[str, Any]:
    """What a command's option holds. Raises RequestError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{option} must be a JSON object, got {text}")
    return value


def split_option(option: str) -> tuple[str, str]:
    """(name, value) of a ``--option``. Raises LoadError."""
    name, equals, value = option.partition("=")
    if not equals or not name:
        raise LoadError(f"--option {option} must be NAME=VALUE")
    return name.removeprefix("option."), value


def _names_a_model(command_line: dict[str, str]) -> bool:
    named = {"model_id", "s3url"} & {name.lower() for name in command_line}
    return bool(named) or any(map(os.environ.get, _VARIABLES_THAT_NAME_A_MODEL))


def _demo() -> Path:
    if not DEMO.is_dir():
        raise LoadError("no MODEL given, and the demo model is not in this installation")
    return DEMO


def _name(configuration: Configuration) -> str:
    """As DJLServing names a model: by its folder, other characters than those of words as _."""
    c = configuration
    place = c.model_dir or c.model_id or c.s3url or ""
    if Path(place).resolve() == DEMO:
        return _DEMO_NAME
    path = Path(place)
    name = path.resolve().name if path.is_dir() else place.rstrip("/*").split("/")[-1]
    return re.sub(r"\W|^_", "_", name)
