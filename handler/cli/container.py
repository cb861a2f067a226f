"""``serve --container``: the same in one of DJLServing's images, by docker/run.sh."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from handler.cli.common import split_option
from handler.errors import LoadError

# In a source checkout, as what it builds is; not in an installed package.
_SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "run.sh"

# cpu: djl-cpu
IMAGES = ("lmi", "cpu", "fastertransformer", "pytorch-gpu")


def run_in_container(arguments: argparse.Namespace) -> None:
    """Become docker/run.sh, which where no Docker engine is tells the commands and exits with 3.

    Raises LoadError.
    """
    if not _SCRIPT.is_file():
        raise LoadError("--container needs a checkout of the repository: docker/ is not here")
    options = [_as_variable(option) for option in arguments.option]
    environment = {**os.environ, "HOST": arguments.host, "PORT": str(arguments.port)}
    model = [] if arguments.model is None else [arguments.model]
    if options and not model:
        model = [str(_SCRIPT.parents[1] / "examples" / "demo" / "model")]
    command = [str(_SCRIPT), arguments.container, *model, *options]
    os.execve(_SCRIPT, command, environment)


def _as_variable(option: str) -> str:
    """A property as ``docker run`` is told it."""
    name, value = split_option(option)
    return f"--env=OPTION_{name.upper()}={value}"
