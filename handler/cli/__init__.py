"""The command line: ``python -m handler COMMAND``. Each command is a module here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from handler import __version__
from handler.errors import LoadError, RequestError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error of configuration or request is one line and exit status 1."""
    from handler.cli import batch, generate, partition, serve

    parser = argparse.ArgumentParser(
        prog="python -m handler", description="Serve T5-family models on DJLServing, or without it."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (serve, generate, batch, partition):
        command.add_to(commands)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (LoadError, RequestError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
