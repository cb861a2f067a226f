"""``check``: what would fail on the endpoint."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handler.cli.common import start_log
from handler.packaging.check import BadArchive, check, unpacked
from handler.packaging.findings import Finding
from handler.packaging.images import IMAGES, find_image
from handler.packaging.instances import find_instance
from handler.packaging.trial import Trial, serve_once


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="find what would fail on the endpoint",
        description="Find what would fail on the endpoint before an archive is uploaded. Every "
        "finding has a name, docs/checking.md tells them all. Exit status 1 with errors.",
    )
    parser.add_argument("place", type=Path, metavar="PLACE", help="model.tar.gz, or model folder")
    parser.add_argument("--image", metavar="NAME", help=f"to run in: {', '.join(IMAGES)}")
    parser.add_argument("--instance-type", metavar="TYPE", help="to run on, as ml.g5.12xlarge")
    parser.add_argument(
        "--serve",
        action="store_true",
        help="where nothing fails, also load it here with its own handler and answer --prompt",
    )
    parser.add_argument("--prompt", default="Hello, world.", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the findings, and the answer. Raises LoadError."""
    start_log(quiet=True)
    image = find_image(arguments.image) if arguments.image else None
    instance = find_instance(arguments.instance_type) if arguments.instance_type else None
    trials: list[Trial] = []
    try:
        with unpacked(arguments.place) as folder:
            findings = check(folder, image, instance)
            if arguments.serve and not _failed(findings):
                trials, failures = serve_once(folder, arguments.prompt)
                findings += failures
    except BadArchive as bad:
        findings = [bad.finding]
    if arguments.json:
        told = {"findings": [asdict(f) for f in findings], "answers": [asdict(t) for t in trials]}
        print(json.dumps(told, indent=1))
    else:
        _print(findings, trials, arguments.prompt)
    if _failed(findings):
        sys.exit(1)


def _print(findings: list[Finding], trials: list[Trial], prompt: str) -> None:
    for finding in findings:
        print(f"{finding.severity}: {finding.name}: {finding.message}")
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{errors} errors, {len(findings) - errors} warnings")
    for trial in trials:
        print(
            f"served by {trial.door}: {prompt!r} -> {trial.answer} "
            f"(loaded in {trial.loading:.1f} s, answered in {trial.answering:.3f} s)"
        )


def _failed(findings: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)
