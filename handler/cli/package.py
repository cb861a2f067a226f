"""``package``: a checkpoint as the model.tar.gz that DJLServing and SageMaker serve."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from handler.cli.common import add_model_arguments, split_option, start_log
from handler.packaging.images import IMAGES, find_image
from handler.packaging.package import Order, package


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "package",
        help="write the model.tar.gz that an endpoint serves",
        description="Write a checkpoint, this handler and its settings as the model.tar.gz that "
        "DJLServing and SageMaker serve. A serving.properties, model.py, other modules and "
        "requirements.txt that lie in MODEL are taken along.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint folder, hub id or s3:// address; may be left out with --s3url, --model-id",
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="to write, .tar.gz"
    )
    parser.add_argument(
        "--image",
        default="lmi",
        metavar="NAME",
        help=f"the container it is served in: {', '.join(IMAGES)} (default: %(default)s)",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--s3url", metavar="URL", help="no weights inside: the endpoint loads them from S3"
    )
    weights.add_argument(
        "--model-id", metavar="ID", help="no weights inside: the endpoint loads them from the hub"
    )
    weights.add_argument(
        "--partition",
        action="store_true",
        help="split and convert the weights now, as the options dtype and "
        "tensor_parallel_degree say",
    )
    parser.add_argument(
        "--entry-point", type=Path, metavar="FILE", help="your own model.py, in the place of ours"
    )
    parser.add_argument(
        "--vendor-wheels",
        action="store_true",
        help="with the packages that the image lacks, for an endpoint without a network",
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the archive, with progress bars on a terminal. Raises LoadError."""
    start_log(quiet=True)
    # so that what is half written is removed
    for ends in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ends, lambda number, _: sys.exit(128 + number))
    options = [split_option(option) for option in arguments.option]
    options += [
        (name, getattr(arguments, name))
        for name in ("s3url", "model_id")
        if getattr(arguments, name)
    ]
    order = Order(
        image=find_image(arguments.image),
        model=arguments.model,
        options=options,
        entry_point=arguments.entry_point,
        partition=arguments.partition,
        vendor_wheels=arguments.vendor_wheels,
    )
    with _Bars() as bars:
        packed = package(order, arguments.output, force=arguments.force, progress=bars.tell)
    print(
        f"{packed.bytes / 1e6:.1f} MB, {packed.files} files, for image {arguments.image}; "
        f"weights: {packed.weights}",
        file=sys.stderr,
    )
    print(arguments.output)


class _Bars:
    """One bar after another, on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def tell(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._what:
            self._close()
            unit = {"unit": "B", "unit_scale": True} if what == "archive" else {"unit": " tensors"}
            self._bar = tqdm(desc=what, total=total, disable=None, leave=False, **unit)
            self._what = what
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
