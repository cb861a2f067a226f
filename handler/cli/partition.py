"""``partition``: split and convert a checkpoint ahead of time."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from handler.checkpoints.partition import partition
from handler.checkpoints.partitioned import FORMATS
from handler.cli.common import add_model_arguments, choose_model, start_log


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "partition",
        help="split and convert a checkpoint ahead of time",
        description="Write a checkpoint as a folder that loads without being converted again.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="DIR", help="to write")
    parser.add_argument(
        "--format", choices=FORMATS, default="native", help="for which engines (default: native)"
    )
    for name, metavar, meaning in (
        ("tensor_parallel_degree", "N", "GPUs that share each layer (default: 1)"),
        ("pipeline_parallel_degree", "N", "groups of layers, fastertransformer only (default: 1)"),
        ("dtype", "DTYPE", "fp32, bf16, fp16 or int8 (default: fp32)"),
        (
            "model_path_on_host",
            "PATH",
            "where it is served from, fastertransformer (default: /opt/ml/model)",
        ),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, metavar=metavar, help=meaning)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the folder, with a progress bar on a terminal. Raises LoadError."""
    from tqdm import tqdm

    start_log(quiet=True)
    # so that what is half written is removed
    for ends in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ends, lambda number, _: sys.exit(128 + number))
    flags = ("tensor_parallel_degree", "pipeline_parallel_degree", "dtype", "model_path_on_host")
    told = [f"{name}={getattr(arguments, name)}" for name in flags if getattr(arguments, name)]
    choice = choose_model(arguments.model, [*arguments.option, *told])
    with tqdm(unit=" tensors", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        partition(choice.configuration, arguments.format, arguments.output, progress)
    print(arguments.output)
