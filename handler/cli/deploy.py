"""``deploy``: a model archive as a SageMaker endpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from handler.cli.common import confirm, start_log
from handler.deployment import autoscaling
from handler.deployment.aws import Services, find_region, role_of_notebook
from handler.deployment.plan import TIMEOUTS, VOLUMES, Deployment
from handler.deployment.runner import account_of, default_bucket, deploy
from handler.deployment.settings import (
    checked_name,
    checked_number,
    default_target,
    find_ami,
    find_image_uri,
    find_role,
    parsed_autoscale,
    parsed_environment,
    parsed_instances,
)
from handler.deployment.upload import read_archive
from handler.errors import LoadError


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "deploy",
        help="make a SageMaker endpoint of a model archive",
        description="Upload a model archive and make a SageMaker endpoint of it. Cut off anywhere, "
        "the same command goes on; delete takes all of it away again.",
    )
    parser.add_argument("archive", metavar="MODEL.tar.gz", type=Path, help="what package writes")
    parser.add_argument("--name", required=True, help="of the endpoint")
    parser.add_argument(
        "--instance-type",
        required=True,
        metavar="TYPE[,TYPE...]",
        help="as ml.g5.2xlarge; each next one is tried when AWS has none left of those before",
    )
    _add_container_arguments(parser)
    _add_size_arguments(parser)
    parser.add_argument("--region", help="default: AWS_REGION, or that of the AWS profile")
    parser.add_argument(
        "--role", metavar="ARN", help="what it runs as; default: SAGEMAKER_ROLE, or the notebook's"
    )
    parser.add_argument("--bucket", help="for the archive (default: sagemaker-REGION-ACCOUNT)")
    parser.add_argument(
        "--update", action="store_true", help="change the endpoint of that name while it serves"
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="until it is in service (default: yes)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the calls as JSON, do nothing in AWS"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=run)


def _add_container_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image",
        metavar="NAME|URI",
        help="lmi, djl-cpu, fastertransformer, or an address in ECR (default: lmi for instances "
        "with GPUs, djl-cpu for others)",
    )
    parser.add_argument(
        "--inference-ami",
        default="auto",
        metavar="NAME|none|auto",
        help="the host's image, whose driver fits the container's CUDA (default: auto, by the tag)",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the container, as OPTION_DTYPE=bf16; may be repeated",
    )
    parser.add_argument("--variant", default="AllTraffic", help="its name (default: %(default)s)")


def _add_size_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, metavar, meaning in (
        ("--volume-size", "GB", "of instances without a disk of their own"),
        ("--download-timeout", "SECONDS", "to download and unpack the archive"),
        ("--startup-timeout", "SECONDS", "until the container answers that it is healthy"),
    ):
        parser.add_argument(
            flag, type=int, metavar=metavar, help=f"{meaning} (default: from the archive's size)"
        )
    parser.add_argument(
        "--autoscale",
        metavar="MIN:MAX|off",
        help="so many instances as the requests in flight need",
    )
    parser.add_argument(
        "--autoscale-target",
        type=float,
        metavar="N",
        help="requests at a time on each instance (default: 3/4 of its rows)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Raises LoadError."""
    deployment = deployment_of(arguments)
    if arguments.dry_run:
        print(json.dumps(_dry_run(deployment, arguments.update), indent=2))
        return
    start_log()
    types = ", or ".join(instance.name for instance in deployment.instance_types)
    confirm(
        f"Deploy {deployment.archive.path} as endpoint {deployment.name} in {deployment.region} on "
        f"{types}? It costs money until it is deleted.",
        arguments.yes,
    )
    services = Services(deployment.region)
    try:
        deploy(services, deployment, update=arguments.update, wait=arguments.wait)
    except KeyboardInterrupt:
        name = deployment.name
        print(f"cut off: the same command goes on, delete {name} gives up", file=sys.stderr)
        raise
    if not arguments.wait:
        print(f"endpoint {deployment.name} is on its way; the same command without --no-wait waits")


def deployment_of(arguments: argparse.Namespace) -> Deployment:
    """Everything checked that can be without AWS. Raises LoadError."""
    a = arguments
    volume_size = checked_number(a.volume_size, VOLUMES, "--volume-size", "GB")
    instances = parsed_instances(a.instance_type, volume_size)
    environment = parsed_environment(a.env)
    scales = a.autoscale is not None and a.autoscale != "off"
    if scales and not a.wait:
        raise LoadError("--autoscale needs --wait: only what is in service can be scaled")
    if a.autoscale_target is not None and not scales:
        raise LoadError("--autoscale-target needs --autoscale MIN:MAX")
    autoscale = None
    if scales:
        default = default_target(instances[0], environment)
        autoscale = parsed_autoscale(a.autoscale, a.autoscale_target, default)
    name = checked_name(a.name, "--name")
    region = find_region(a.region)
    ask = None if a.dry_run else lambda name: role_of_notebook(Services(region), name)
    role = find_role(a.role, os.environ, role_of_instance=ask)
    image = find_image_uri(a.image, region, instances)
    return Deployment(
        name=name,
        region=region,
        role=role,
        bucket=a.bucket or default_bucket(region, account_of(role)),
        image=image,
        instance_types=instances,
        environment=environment,
        variant=checked_name(a.variant, "--variant"),
        volume_size=volume_size,
        download_timeout=checked_number(
            a.download_timeout, TIMEOUTS, "--download-timeout", "seconds"
        ),
        startup_timeout=checked_number(a.startup_timeout, TIMEOUTS, "--startup-timeout", "seconds"),
        inference_ami=find_ami(a.inference_ami, image),
        autoscale=autoscale,
        fixed_size=a.autoscale == "off",
        archive=read_archive(a.archive),  # last: it may be long
    )


def _dry_run(deployment: Deployment, update: bool) -> list[dict[str, Any]]:
    """The calls that change something; those for further instance types say so."""
    calls = [call.as_json() for call in deployment.calls(update=update)]
    for before, instance in zip(deployment.instance_types, deployment.instance_types[1:]):
        for call in deployment.endpoint_calls(instance, update=update):
            calls.append({"only_if": f"no {before.name} is to be had", **call.as_json()})
    return calls + [call.as_json() for call in autoscaling.calls(deployment)]
