"""Time whole generations of fixed lengths: ours beside transformers and CTranslate2, in one run.

All B requests of a batch are handed over at once, and a generation is everything from there to the
last token: encoder, scheduler, sampling, with ours tokenizing too (the others get token ids).
Engines take turns (A B C A B C ...), each in a process of its own; the next one begins only when
the others' threads are at rest. A figure is the median of the runs.

ms a step: a generation's time divided by the tokens out, its range over the runs, and the CPU time
of all the engine's threads divided likewise (which other processes disturb less; threads that spin
count); tokens/s: of the whole batch; "x transformers-fp32" and the like: how many times as fast as
that engine; peak MB: the process's largest resident memory since its start, mapped files included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from machine import (
    OtherLoad,
    cpu_seconds,
    describe,
    peak_memory,
    print_description,
    settle,
    warn_of_load,
)
from peers import ENGINES, Peer, prepare
from random_model import SHAPES, checkpoint
from report import print_table, ratio, write_json

from handler.config import MAX_ROWS_ON_CPU
from handler.machine import usable_cpus

_DEFAULT = ("ours-int8", "ours-fp32", "transformers-fp32", "ctranslate2-int8")
_REFERENCES = ("transformers-fp32", "ctranslate2-int8")


class Turn(NamedTuple):
    """One generation of one engine."""

    seconds: float
    cpu_seconds: float


Turns = dict[str, list[Turn]]
"""engine -> its runs"""


def main() -> None:
    a = _arguments()
    machine = describe(a.threads)
    print_description(machine)
    measured = []
    for shape in a.shapes:
        measured += _measure_shape(shape, a)
    write_json(a.json, {"machine": machine, "measured": measured})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "base"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--runs", type=int, default=5, help="of each engine (default: 5)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=_DEFAULT, metavar="ENGINE")
    parser.add_argument("--tokens-in", type=int, default=64)
    parser.add_argument("--tokens-out", type=int, default=64)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def _measure_shape(shape: str, a: argparse.Namespace) -> list[dict[str, Any]]:
    measured = []
    with _running(shape, a) as peers:
        for batch in a.batch:
            load, before = OtherLoad(), _own_seconds(peers)
            turns = _take_turns(peers, batch, a)
            others = load.share(_own_seconds(peers) - before)
            figures = _figures(turns, batch, a.tokens_out)
            memory = {peer.engine: peak_memory(peer.pid) for peer in peers}
            _print(f"{shape}, B={batch}", figures, memory, a)
            warn_of_load(others)
            measured.append(
                {
                    "shape": shape,
                    "batch": batch,
                    "tokens_in": a.tokens_in,
                    "tokens_out": a.tokens_out,
                    "other_load": others,
                    "turns": {engine: [t._asdict() for t in ts] for engine, ts in turns.items()},
                    "peak_memory": memory,
                    **figures,
                }
            )
    return measured


@contextmanager
def _running(shape: str, a: argparse.Namespace) -> Iterator[list[Peer]]:
    """The engines, loaded from what is on disk already: peak memory is without conversions."""
    model, max_rows = checkpoint(shape), max(MAX_ROWS_ON_CPU, *a.batch)
    for engine in a.engines:
        prepare(engine, model, a.threads, max_rows)
    peers = [Peer(engine, model, a.threads, max_rows) for engine in a.engines]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def _take_turns(peers: Sequence[Peer], batch: int, a: argparse.Namespace) -> Turns:
    """One round to warm up, then a.runs that count."""
    turns: Turns = {peer.engine: [] for peer in peers}
    for run in range(a.runs + 1):
        for peer in peers:
            settle([other.pid for other in peers])
            before = cpu_seconds(peer.pid)
            seconds = peer.generate(batch, a.tokens_in, a.tokens_out)
            if run:
                turns[peer.engine].append(Turn(seconds, cpu_seconds(peer.pid) - before))
    return turns


def _own_seconds(peers: Sequence[Peer]) -> float:
    return sum(cpu_seconds(peer.pid) for peer in peers)


def _figures(turns: Turns, batch: int, steps: int) -> dict[str, Any]:
    seconds = {engine: [t.seconds for t in ts] for engine, ts in turns.items()}
    medians = {engine: statistics.median(values) for engine, values in seconds.items()}
    cpu = {engine: statistics.median(t.cpu_seconds for t in ts) for engine, ts in turns.items()}
    return {
        "ms_per_step": {engine: 1e3 * m / steps for engine, m in medians.items()},
        "range_of_ms_per_step": {
            engine: [1e3 * min(values) / steps, 1e3 * max(values) / steps]
            for engine, values in seconds.items()
        },
        "cpu_ms_per_step": {engine: 1e3 * c / steps for engine, c in cpu.items()},
        "tokens_per_second": {engine: batch * steps / m for engine, m in medians.items()},
        "times_as_fast_as": {
            reference: {engine: medians[reference] / m for engine, m in medians.items()}
            for reference in _REFERENCES
            if reference in medians
        },
    }


def _print(
    title: str, figures: dict[str, Any], memory: dict[str, int], a: argparse.Namespace
) -> None:
    references = figures["times_as_fast_as"]
    head = [
        title,
        "ms a step",
        "range",
        "CPU ms",
        "tokens/s",
        *(f"x {name}" for name in references),
        "peak MB",
    ]
    rows = [
        [
            engine,
            f"{figures['ms_per_step'][engine]:.2f}",
            "{:.2f}-{:.2f}".format(*figures["range_of_ms_per_step"][engine]),
            f"{figures['cpu_ms_per_step'][engine]:.1f}",
            f"{figures['tokens_per_second'][engine]:.0f}",
            *(ratio(ratios[engine]) for ratios in references.values()),
            f"{memory[engine] / 1e6:.0f}",
        ]
        for engine in figures["ms_per_step"]
    ]
    print(f"\n{a.tokens_in} tokens in, {a.tokens_out} out, median of {a.runs} runs")
    print_table(head, rows)


if __name__ == "__main__":
    main()
