"""The command line: ``python -m handler COMMAND``. Each command is a module here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from handler import __version__
from handler.errors import LoadError, RequestError


def command_parser() -> argparse.ArgumentParser:
    """Of all commands; what it parses has ``run``, which takes it."""
    from handler.cli import (
        batch,
        bench,
        check,
        delete,
        deploy,
        generate,
        invoke,
        logs,
        package,
        partition,
        plan,
        serve,
    )
    from handler.cli.common import CommandParser

    parser = argparse.ArgumentParser(
        prog="python -m handler", description="Serve T5-family models on DJLServing, or without it."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for command in (
        *(serve, generate, batch, bench, partition),
        *(package, check, plan),
        *(deploy, invoke, logs, delete),
    ):
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error of configuration or request is one line and exit status 1."""
    parsed = command_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (LoadError, RequestError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # as of logs ... | head; nothing more is to be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
