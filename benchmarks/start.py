"""Time from a new process to a loaded model, and the process's peak memory, beside their targets.

A first start finds an empty cache: it reads the checkpoint, chooses kernels, builds and keeps the
graphs. A cached start finds them. Each start is a fresh Python process that calls init_inference
and answers one prompt; the files are in the page cache in any case.

A partitioned start is the first one on a copy of what ``python -m handler partition`` makes, int8.

load: seconds that init_inference takes; ready: seconds from starting the process until it returns;
answered: until the first answer of 8 tokens is there, too. peak: the most memory that was resident
(VmHWM) up to then, interpreter and mapped files included. Times are medians, peaks the largest of
the runs. Targets:

  cached start  ready within 3 s (250 M weights) and 2 s (demo); peak at most 1.6 x the weights in
                the form served (of the demo, which the interpreter outweighs, none)
  first start   peak at most 1.6 x the checkpoint + 300 MB
  partitioned   load at most a fifth of the first start's (250 M weights)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import OtherLoad, describe, print_description, warn_of_load
from random_model import CACHE, SHAPES, checkpoint
from report import print_table, write_json

from handler.checkpoints.partition import partition
from handler.checkpoints.read import CheckpointWeights
from handler.cli.common import DEMO
from handler.config import configuration_of
from handler.machine import usable_cpus

_PROCESS = """
import json, sys, time
from handler.engines import init_inference

options = {"cache_dir": sys.argv[3]} if sys.argv[3] else {}
begun = time.perf_counter()
model = init_inference(sys.argv[1], dtype=sys.argv[2], backend="onnxruntime", **options)
ready = time.perf_counter()
model.pipeline_generate([sys.argv[4]], max_new_tokens=8)
answered = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([ready - begun, ready, answered, int(status["VmHWM"].split()[0]) * 1024]))
"""
_CACHED_SECONDS = {"demo": 2.0, "base": 3.0}


@dataclass(frozen=True)
class Start:
    """One start of one process."""

    load: float
    ready: float
    answered: float
    peak: int
    cpu: float


@dataclass(frozen=True)
class Case:
    name: str
    model: Path
    dtype: str
    prompt: str

    def start(self, cache: Path | None) -> Start:
        """Start a process; times are from the moment before it is made.

        cache: option.cache_dir.
        """
        arguments = [str(self.model), self.dtype, str(cache or ""), self.prompt]
        begun, before = time.perf_counter(), _children_seconds()
        process = subprocess.run(
            [sys.executable, "-c", _PROCESS, *arguments], capture_output=True, text=True
        )
        if process.returncode:
            sys.exit(f"{self.name}, {self.dtype} failed:\n{process.stderr[-2000:]}")
        # perf_counter is one clock for all processes of a machine
        load, ready, answered, peak = json.loads(process.stdout)
        cpu = _children_seconds() - before
        return Start(load, ready - begun, answered - begun, peak, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=["demo", *SHAPES], default=["base", "demo"], metavar="MODEL"
    )
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "int8"], default=["fp32", "int8"])
    parser.add_argument("--runs", type=int, default=3, help="of each start (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    a = parser.parse_args()
    machine = describe(usable_cpus())
    print_description(machine)
    cases = list(_cases(a))
    load, before = OtherLoad(), _children_seconds()
    measured = [figures for case in cases for figures in _measure(case, a.runs)]
    others = load.share(_children_seconds() - before)
    _print(measured)
    warn_of_load(others)
    write_json(a.json, {"machine": machine, "other_load": others, "measured": measured})


def _cases(a: argparse.Namespace) -> Iterator[Case]:
    for name in a.models:
        model = DEMO if name == "demo" else checkpoint(name)
        prompt = "Write 7 in words." if name == "demo" else "w7 w8 w9"
        for dtype in a.dtypes:
            yield Case(name, model, dtype, prompt)


def _measure(case: Case, runs: int) -> list[dict[str, Any]]:
    """The figures of the first start, of the cached one, and of the first when partitioned."""
    _read(case.model)
    CACHE.mkdir(parents=True, exist_ok=True)
    cache = Path(tempfile.mkdtemp(prefix="start.", dir=CACHE))
    bare = Path(tempfile.mkdtemp(prefix="bare.", dir=CACHE))
    for file in case.model.glob("[!.]*"):  # without the graphs that lie beside the model
        (bare / file.name).symlink_to(file.resolve())
    case = replace(case, model=bare)
    try:
        first = []
        for _ in range(runs):
            shutil.rmtree(cache)
            cache.mkdir()
            first.append(case.start(cache))
        served = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        cached = [case.start(cache) for _ in range(runs)]
        partitioned = _partitioned(case, cache, runs) if case.dtype == "int8" else []
    finally:
        shutil.rmtree(cache)
    stored = CheckpointWeights(case.model).stored_bytes
    shutil.rmtree(bare)
    figures = [
        _figures(case, "first", first, None, 1.6 * stored + 300e6, stored),
        _figures(
            case,
            "cached",
            cached,
            _CACHED_SECONDS.get(case.name),
            None if case.name == "demo" else 1.6 * served,
            served,
        ),
    ]
    if partitioned:
        figures.append(_figures(case, "partitioned", partitioned, None, None, served))
        if case.name == "base":
            figures[-1]["load_target"] = figures[0]["load"] / 5
    return figures


def _partitioned(case: Case, folder: Path, runs: int) -> list[Start]:
    """First starts, each on a copy that no process has seen yet."""
    made, copy = folder / "partitioned", folder / "copy"
    partition(configuration_of(str(case.model), dtype=case.dtype), "native", made)
    starts = []
    for _ in range(runs):
        shutil.copytree(made, copy)
        os.sync()  # what is still written would slow the start
        starts.append(replace(case, model=copy).start(None))
        shutil.rmtree(copy)
    return starts


def _figures(
    case: Case,
    kind: str,
    starts: list[Start],
    seconds_target: float | None,
    peak_target: float | None,
    weights: int,
) -> dict[str, Any]:
    return {
        "model": case.name,
        "dtype": case.dtype,
        "start": kind,
        "load": statistics.median(s.load for s in starts),
        "load_target": None,
        "ready": statistics.median(s.ready for s in starts),
        "ready_target": seconds_target,
        "answered": statistics.median(s.answered for s in starts),
        "cpu_seconds": statistics.median(s.cpu for s in starts),
        "peak": max(s.peak for s in starts),
        "peak_target": peak_target,
        "weights": weights,
    }


def _print(measured: list[dict[str, Any]]) -> None:
    head = [
        "",
        "load s",
        "target",
        "ready s",
        "target",
        "answered s",
        "CPU s",
        "weights MB",
        "peak MB",
        "target",
    ]
    rows = [
        [
            f"{m['model']} {m['dtype']} {m['start']}",
            f"{m['load']:.2f}",
            _target(m["load"], m["load_target"], 1, 2),
            f"{m['ready']:.2f}",
            _target(m["ready"], m["ready_target"], 1, 1),
            f"{m['answered']:.2f}",
            f"{m['cpu_seconds']:.2f}",
            f"{m['weights'] / 1e6:.0f}",
            f"{m['peak'] / 1e6:.0f}",
            _target(m["peak"], m["peak_target"], 1e6, 0),
        ]
        for m in measured
    ]
    print()
    print_table(head, rows)


def _target(value: float, target: float | None, unit: float, digits: int) -> str:
    if target is None:
        return "-"
    return f"<= {target / unit:.{digits}f} {'met' if value <= target else 'MISSED'}"


def _read(folder: Path) -> None:
    """Into the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def _children_seconds() -> float:
    """CPU time of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
