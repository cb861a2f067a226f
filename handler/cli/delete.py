"""``delete``: what deploy made, away again."""

from __future__ import annotations

import argparse
from typing import Any

from handler.cli.common import confirm, start_log
from handler.deployment.aws import Services, find_region
from handler.deployment.container_log import group
from handler.deployment.removal import Remover
from handler.deployment.settings import checked_name
from handler.errors import LoadError


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "delete",
        help="delete an endpoint and all that deploy made for it",
        description="Delete an endpoint, its configurations, models, autoscaling and archives: "
        "what deploy made, and nothing else.",
    )
    parser.add_argument("name", metavar="NAME", help="of the endpoint")
    parser.add_argument("--region", help="default: AWS_REGION, or that of the AWS profile")
    parser.add_argument(
        "--bucket", help="where else archives may be: deploy's --bucket, run on another machine"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Raises LoadError."""
    start_log()
    name = checked_name(arguments.name, "NAME")
    region = find_region(arguments.region)
    remover = Remover(Services(region), name, arguments.bucket)
    found = remover.find()
    things = found.described()
    for thing in found.foreign:
        print(f"left alone, deploy did not make it: {thing}")
    if not things:
        raise LoadError(f"in {region} there is nothing that deploy made for {name}")
    print("\n".join(things))
    confirm(f"Delete these {len(things)}?" if len(things) > 1 else "Delete it?", arguments.yes)
    remover.remove(found)
    print(f"deleted; the log {group(name)} stays in CloudWatch")
