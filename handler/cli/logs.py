"""``logs``: what an endpoint's containers write."""

from __future__ import annotations

import argparse
import time
from typing import Any

from handler.cli.common import start_log
from handler.deployment.aws import Clock, Services, find_region
from handler.deployment.container_log import follow, lines, parsed_age
from handler.deployment.settings import checked_name


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "logs",
        help="print what an endpoint's containers write",
        description="Print what an endpoint's containers write: time (UTC), instance, line.",
    )
    parser.add_argument("name", metavar="NAME", help="of the endpoint")
    parser.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
    parser.add_argument(
        "--since", default="10m", metavar="AGE", help="as 30s, 10m, 2h, 1d (default: %(default)s)"
    )
    parser.add_argument("--region", help="default: AWS_REGION, or that of the AWS profile")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Raises LoadError."""
    start_log()
    name = checked_name(arguments.name, "NAME")
    since_ms = int((time.time() - parsed_age(arguments.since)) * 1000)
    services = Services(find_region(arguments.region))
    if arguments.follow:
        found = follow(services, name, since_ms, Clock())
    else:
        found = lines(services, name, since_ms)
    for line in found:
        print(line, flush=arguments.follow)
