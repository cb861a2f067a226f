"""``batch``: answer a file of requests."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from handler.batch.files import STANDARD, Source
from handler.batch.lines import LineForm
from handler.batch.progress import Progress
from handler.batch.results import Results
from handler.batch.run import Batch
from handler.batch.settings import settings_of
from handler.cli.common import (
    ModelChoice,
    add_model_arguments,
    choose_model,
    json_object,
    start_log,
)
from handler.errors import LoadError
from handler.parameters import parse_parameters
from handler.service import Service

logger = logging.getLogger(__name__)


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer a file of requests, a line each, in their order. Started again after "
        "it was interrupted, however that was, it goes on where it stood.",
    )
    parser.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help='JSON lines: {"inputs": ..., "parameters": ...}, or a string; .gz is unpacked; - is '
        "standard input",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUTPUT",
        help="answers, a line each; .gz is packed; - is standard output",
    )
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the demo)")
    parser.add_argument(
        "--parameters",
        default="{}",
        metavar="JSON",
        help="generation parameters of every line; those that a line has itself win",
    )
    parser.add_argument(
        "--input-field",
        metavar="NAME",
        help="lines are objects of any kind, of which this field is answered",
    )
    parser.add_argument(
        "--output-field",
        default=LineForm.output_field,
        metavar="NAME",
        help="with --input-field: where the answer is put (default: %(default)s)",
    )
    parser.add_argument(
        "--errors",
        type=Path,
        metavar="FILE",
        help="bad lines, by number, and why (default: OUTPUT.errors, or standard error)",
    )
    parser.add_argument("--strict", action="store_true", help="end at the first bad line")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer all lines. Raises LoadError, RequestError."""
    start_log(quiet=sys.stderr.isatty())
    form = LineForm(
        json_object(arguments.parameters, "--parameters"),
        arguments.input_field,
        arguments.output_field,
    )
    _check(arguments, form)
    choice = choose_model(arguments.model, arguments.option)
    source = Source(arguments.input)
    results = Results(arguments.output, arguments.errors, source.can_be_read_again)
    try:
        content = source.content() if source.can_be_read_again else None
        done = results.begin(settings_of(choice.configuration, form), content)
        if not done.complete:
            total = content.lines if content else None
            _answer(arguments, choice, form, source, results, total)
    finally:
        results.close()
    _tell_end(results, arguments)


def _check(arguments: argparse.Namespace, form: LineForm) -> None:
    """Raises LoadError, RequestError."""
    parameters = parse_parameters(form.parameters)
    if form.input_field is not None and (parameters.details or parameters.return_log_probs):
        raise LoadError(
            "--input-field has room for texts only: leave the parameter details out, or give "
            "lines with 'inputs'"
        )
    if form.input_field is not None and form.input_field == form.output_field:
        raise LoadError(f"--output-field must not be --input-field, got {form.output_field} twice")
    paths = [p for p in (arguments.input, arguments.output, arguments.errors) if p is not None]
    places = [path.resolve() for path in paths if path != STANDARD]
    if len(set(places)) < len(places):
        raise LoadError("INPUT, OUTPUT and --errors must be different files")


def _answer(
    arguments: argparse.Namespace,
    choice: ModelChoice,
    form: LineForm,
    source: Source,
    results: Results,
    total: int | None,
) -> None:
    done = results.checkpoint
    if done.lines:
        logger.info("going on after line %d", done.lines)
    elif not source.can_be_read_again or arguments.output == STANDARD:
        logger.info("a pipe cannot be gone on with after an interruption")
    service = Service()
    try:
        model = service.load(choice.configuration, choice.name)
        parse_parameters(form.parameters, model.limits)
        progress = Progress(total, done.lines)
        with _stopped_by_signals() as stop:
            batch = Batch(service, form, results, progress, strict=arguments.strict, stop=stop)
            try:
                batch.run(source.lines(done.lines, done.offset))
            finally:
                progress.close()
        logger.info("%s", progress.rates)
        if stop.number is not None:
            _tell_stop(stop.number, results, total)
    finally:
        service.close()


class _Stop(threading.Event):
    """Set by a signal, whose ``number`` it keeps."""

    number: int | None = None


@contextmanager
def _stopped_by_signals() -> Iterator[_Stop]:
    """A first SIGINT, SIGTERM or SIGHUP asks to stop; a second one ends the process at once."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.number = number
        stop.set()
        for each in before:
            signal.signal(each, signal.SIG_DFL)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_stop(number: int, results: Results, total: int | None) -> None:
    of_all = f" of {total}" if total is not None else ""
    told = (
        f"stopped by {signal.Signals(number).name} after {results.checkpoint.lines}{of_all} lines"
    )
    resumes = "; the same command goes on from there" if results.resumable else ""
    print(f"{told}{resumes}", file=sys.stderr)
    sys.exit(128 + number)


def _tell_end(results: Results, arguments: argparse.Namespace) -> None:
    c = results.checkpoint
    bad = f", {c.bad} bad ones in {results.errors}" if c.bad else ""
    print(f"{arguments.output}: {c.answered} lines answered{bad}", file=sys.stderr)
