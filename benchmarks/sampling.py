"""Time what choosing tokens adds to a decoding step of the engine, for sets of parameters.

The engine decodes B rows of real prompts step by step; after each step one set of parameters
chooses the tokens, with a B-row state of its own, and the sets take turns. So every set meets the
engine's own logits, just written. The texts go on from the best tokens, the same for all sets.

A set's rows want no log-probabilities, as requests that do not ask for them; those named so do.

choose: ms that choose_tokens takes; CPU: its thread's CPU time, which other processes disturb less;
adds: the first in per cent of a step of the engine alone. Medians over the steps of all
generations. Targets, for 16 rows: greedy and temperature+top_k+top_p add at most 5 %, all together
at most 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import OtherLoad, describe, print_description, warn_of_load
from random_model import FIRST_WORD, SHAPES, TOKENS, checkpoint
from report import print_table, write_json

from handler.config import configuration_of
from handler.engines import onnx_t5
from handler.engines.protocol import StepEngine
from handler.machine import usable_cpus
from handler.parameters import GenerationParameters
from handler.sampling import RowSampling, choose_tokens

_PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 10_000,
}
_USUAL: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
SETS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, log-probs": {},
    "temperature+top_k+top_p": _USUAL,
    "the same, log-probs": _USUAL,
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 50},
    "top_p": {"do_sample": True, "top_p": 0.9},
    "top_p, peaked": {"do_sample": True, "top_p": 0.9, "temperature": 0.2},
    "top_p, flat": {"do_sample": True, "top_p": 0.9, "temperature": 5.0},
    "typical_p": {"do_sample": True, "typical_p": 0.9},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "bad words": {},
    "greedy, all penalties": _PENALTIES,
    "all together": {**_USUAL, "typical_p": 0.9, **_PENALTIES},
}
_WITH_BAD_WORDS = ("bad words", "greedy, all penalties", "all together")
_TARGETS = {"greedy": 0.05, "temperature+top_k+top_p": 0.05, "all together": 0.15}

Times = dict[str, list[tuple[float, float]]]
"""set of parameters -> of each step (seconds, CPU seconds)"""


def main() -> None:
    a = _arguments()
    machine = describe(a.threads)
    print_description(machine)
    measured = [_measure(shape, batch, a) for shape in a.shapes for batch in a.batch]
    write_json(a.json, {"machine": machine, "measured": measured})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "base"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16])
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--tokens-in", type=int, default=64)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5, help="generations (default: 5)")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def _measure(shape: str, batch: int, a: argparse.Namespace) -> dict[str, Any]:
    folder = checkpoint(shape)
    options = {"dtype": a.dtype, "threads": a.threads, "max_rows": batch}
    engine = onnx_t5.load(folder, configuration_of(str(folder), **options))
    load, cpu = OtherLoad(), time.process_time()
    decoding: list[float] = []
    choosing: Times = {name: [] for name in SETS}
    for run in range(a.runs + 1):  # one to warm up
        _generate(engine, batch, a, run, decoding, choosing)
        if not run:
            decoding.clear()
            for times in choosing.values():
                times.clear()
    others = load.share(time.process_time() - cpu)
    engine.close()
    step = statistics.median(decoding)
    chosen, cpu_times = (
        {name: statistics.median(time[i] for time in times) for name, times in choosing.items()}
        for i in (0, 1)
    )
    print(f"\n{shape} {a.dtype}, B={batch}: a step of the engine takes {1e3 * step:.2f} ms")
    print_table(
        ["parameters", "choose, ms", "CPU, ms", "adds", "target"],
        [
            [
                name,
                f"{1e3 * s:.3f}",
                f"{1e3 * cpu_times[name]:.3f}",
                f"{s / step:.1%}",
                _target(name, s / step),
            ]
            for name, s in chosen.items()
        ],
    )
    warn_of_load(others)
    return {
        "shape": shape,
        "batch": batch,
        "other_load": others,
        "decode_seconds": step,
        "choose_seconds": chosen,
        "choose_cpu_seconds": cpu_times,
        "all_decode_seconds": decoding,
        "all_choose_seconds": choosing,
    }


def _target(name: str, share: float) -> str:
    target = _TARGETS.get(name)
    if target is None:
        return ""
    return f"{target:.0%} {'met' if share <= target else 'MISSED'}"


def _generate(
    engine: StepEngine,
    batch: int,
    a: argparse.Namespace,
    run: int,
    decoding: list[float],
    choosing: Times,
) -> None:
    """One generation; each step is followed by one set of parameters, another one each time."""
    random, tokenizer = np.random.default_rng(run), engine.tokenizer
    words = random.integers(FIRST_WORD, TOKENS, (batch, a.tokens_in - 1))
    for row, prompt in enumerate(words.tolist()):
        *_, handles = engine.encode([[*prompt, tokenizer.eos_token_id]])
        assert handles is not None
        engine.attach(handles[0], row)
    states = {name: _rows(name, batch, random) for name in SETS}
    tokens = np.full((batch, 1), engine.decoder_start_token_id)
    for step in range(a.tokens_out):
        start = time.perf_counter()
        logits = engine.decode(batch, tokens, np.full(batch, step))[:, 0]
        decoding.append(time.perf_counter() - start)
        tokens = logits[:, : tokenizer.size].argmax(-1)[:, None]
        name = list(SETS)[(step + run) % len(SETS)]
        start, cpu = time.perf_counter(), time.thread_time()
        choose_tokens(logits, states[name], [step] * batch, tokenizer.eos_token_id, tokenizer.size)
        choosing[name].append((time.perf_counter() - start, time.thread_time() - cpu))
        for other, rows in states.items():  # all have a history as long as the text
            if other != name:
                for row, token in zip(rows, tokens[:, 0].tolist()):
                    row.append(token)


def _rows(name: str, batch: int, random: np.random.Generator) -> list[RowSampling]:
    p = GenerationParameters(max_new_tokens=10_000, **SETS[name])
    bad_words: list[list[int]] = []
    if name in _WITH_BAD_WORDS:
        lengths = [1] * 50 + [2] * 50
        bad_words = [random.integers(FIRST_WORD, TOKENS, n).tolist() for n in lengths]
    wanted = name.endswith("log-probs")
    return [
        RowSampling(replace(p, seed=row), bad_words=bad_words, log_probs=wanted)
        for row in range(batch)
    ]


if __name__ == "__main__":
    main()
