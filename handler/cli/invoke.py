"""``invoke``: asks an endpoint, or a server on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from handler.cli.common import start_log
from handler.deployment.aws import find_region
from handler.deployment.invoke import Asker, request_body, texts
from handler.deployment.settings import checked_name
from handler.errors import LoadError, RequestError
from handler.generation import checked_text


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "invoke",
        mixed=True,
        help="ask a SageMaker endpoint",
        description="Ask a SageMaker endpoint, through its runtime API. A TEXT is answered with "
        "the generated text, a request in JSON with the answer as it came.",
    )
    parser.add_argument("name", metavar="NAME", help="of the endpoint")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a prompt")
    parser.add_argument("--json", metavar="REQUEST", help='as {"inputs": "...", "parameters": {}}')
    parser.add_argument(
        "--file", type=Path, metavar="FILE", help="a request in a file; - for standard input"
    )
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument("--region", help="default: AWS_REGION, or that of the AWS profile")
    parser.add_argument(
        "--endpoint-url",
        metavar="URL",
        help="a server in SageMaker's place, as serve is on http://127.0.0.1:8080",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the answer. Raises LoadError, RequestError."""
    start_log(quiet=True)
    if sum(each is not None for each in (arguments.text, arguments.json, arguments.file)) != 1:
        raise RequestError("invoke takes one of TEXT, --json and --file")
    name = checked_name(arguments.name, "NAME")
    text = None if arguments.text is None else checked_text(arguments.text, "TEXT")
    body = request_body(text, arguments.json, _content(arguments.file), arguments.stream)
    is_elsewhere = arguments.endpoint_url and not arguments.region
    region = None if is_elsewhere else find_region(arguments.region)
    asker = Asker(name, region, arguments.endpoint_url)
    if arguments.stream:
        _print_stream(asker, body)
    else:
        answer = asker.answer(body)
        print("\n".join(texts(answer)) if text is not None else answer.decode("utf-8", "replace"))


def _print_stream(asker: Asker, body: bytes) -> None:
    printed = False
    try:
        for piece in asker.stream(body):
            print(piece, end="", flush=True)
            printed = True
    finally:  # so that an error begins on a line of its own
        if printed:
            print()


def _content(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise LoadError(f"--file {file} cannot be read: {error.strerror}") from error
