"""``plan``: which instance types hold a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from handler.cli.common import add_model_arguments, choose_model, start_log
from handler.packaging.instances import GB, GIB, INSTANCES, find_instance
from handler.packaging.plan import Plan, Wanted, plan, recommended

_COLUMNS = (
    ("instance", "<"),
    ("GPUs", "<"),
    ("degree", ">"),
    ("backend", "<"),
    ("dtype", "<"),
    ("needs GiB", ">"),
    ("has GiB", ">"),
    ("most rows", ">"),
    ("ms/token >=", ">"),
    ("tokens/s <=", ">"),
)


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="which instance types hold a model",
        description="Tell which of SageMaker's instance types hold a model of the T5 family, and "
        "how it is set there. Needs its config.json alone. Times are lower bounds: what a step "
        "must read of the GPU's memory, over its bandwidth. Memory is for all rows at their "
        "longest, one GPU of the degree.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, or hub id")
    for flag, name, meaning in (
        ("--rows", "max_rows", "texts at the same time (default: 64 on GPUs, 16 on CPUs)"),
        ("--input-tokens", "max_input_tokens", "the longest input (default: 1024)"),
        ("--output-tokens", "max_output_tokens", "the longest output (default: 512)"),
    ):
        parser.add_argument(flag, dest=name, metavar="N", help=meaning)
    parser.add_argument("--dtype", help="fp32, bf16, fp16 or int8 (default: auto)")
    parser.add_argument(
        "--instance-type",
        action="append",
        metavar="TYPE",
        help="only this one, as ml.g5.12xlarge; may be repeated",
    )
    parser.add_argument("--all", action="store_true", help="every type, not one for each family")
    parser.add_argument("--json", action="store_true", help="for machines: every type")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the table, or JSON. Raises LoadError."""
    start_log(quiet=True)
    names = ("max_rows", "max_input_tokens", "max_output_tokens", "dtype")
    told = [f"{name}={getattr(arguments, name)}" for name in names if getattr(arguments, name)]
    configuration = choose_model(arguments.model, [*arguments.option, *told]).configuration
    asked = [find_instance(name) for name in arguments.instance_type or ()]
    plans = plan(Wanted.of(configuration), asked or INSTANCES.values())
    if arguments.json:
        print(json.dumps(_as_json(plans), indent=1))
    else:
        shown = plans if asked or arguments.all else list(_one_of_each_family(plans))
        print("\n".join(_lines(shown, plans)))


def _one_of_each_family(plans: Sequence[Plan]) -> Iterator[Plan]:
    """For each family and number of GPUs the smallest that fits, else the largest."""
    groups: dict[tuple[str, int], list[Plan]] = {}
    for p in plans:
        groups.setdefault((p.instance.family, p.instance.gpus), []).append(p)
    kept = {id(group[0] if group[0].fits else group[-1]) for group in groups.values()}
    return (p for p in plans if id(p) in kept)


def _lines(shown: Sequence[Plan], plans: Sequence[Plan]) -> Iterator[str]:
    fitting = [p for p in shown if p.fits]
    if fitting:
        yield from _table(fitting)
        yield ""
    failing = [p for p in shown if not p.fits]
    if failing:
        yield "do not hold it:"
        yield from (f"  {p.instance.name}: {p.reason}" for p in failing)
        yield ""
    yield from _advice("recommended", recommended(p for p in plans if p.instance.gpus))
    yield from _advice("without a GPU", recommended(p for p in plans if not p.instance.gpus))
    if not any(p.fits for p in plans):
        yield "nothing holds it: lower --rows, --input-tokens or --output-tokens, or the dtype"


def _table(plans: Sequence[Plan]) -> Iterator[str]:
    rows = [[name for name, _ in _COLUMNS], *map(_cells, plans)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (f"{cell:{side}{n}}" for cell, (_, side), n in zip(row, _COLUMNS, widths))
        yield "  ".join(cells).rstrip()


def _cells(p: Plan) -> list[str]:
    f, i = p.footprint, p.instance
    one, all_rows = p.step_ms(1), p.step_ms(p.work.rows)
    return [
        i.name,
        f"{i.gpus} x {i.gpu} {i.gpu_sold_as} GB" if i.gpus else "-",
        str(f.degree),
        f.backend,
        f.dtype,
        f"{p.needed / GIB:.1f}",
        f"{p.available / GIB:.1f}",
        str(p.most_rows),
        "-" if one is None else f"{one:.2f}",
        "-" if all_rows is None else f"{1000 * p.work.rows / all_rows:.0f}",
    ]


def _advice(title: str, p: Plan | None) -> Iterator[str]:
    if p is None:
        return
    options = " ".join(f"--option {name}={value}" for name, value in p.options.items())
    disk = p.instance.local_disk
    volume = f"{disk / GB:.0f} GB of local disk" if disk else "set VolumeSizeInGB for its disk"
    yield f"{title}: {p.instance.name} {options} ({volume})"


def _as_json(plans: Iterable[Plan]) -> dict[str, Any]:
    plans = list(plans)
    best = recommended(p for p in plans if p.instance.gpus)
    on_cpu = recommended(p for p in plans if not p.instance.gpus)
    return {
        "recommended": best and best.instance.name,
        "without_gpu": on_cpu and on_cpu.instance.name,
        "instances": [
            {
                "name": p.instance.name,
                "fits": p.fits,
                "reason": p.reason or None,
                "backend": p.footprint.backend,
                "options": p.options,
                "gpus": p.instance.gpus,
                "weights_bytes": p.footprint.weights,
                "caches_bytes": p.footprint.caches(p.work),
                "workspace_bytes": p.footprint.workspace(p.work),
                "needed_bytes": p.needed,
                "available_bytes": p.available,
                "most_rows": p.most_rows,
                "ms_per_token_lower_bound": p.step_ms(1),
                "ms_per_step_of_all_rows_lower_bound": p.step_ms(p.work.rows),
            }
            for p in plans
        ],
    }
