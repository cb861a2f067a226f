"""``bench``: how fast a model answers on this machine."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from handler.cli.common import add_model_arguments, choose_model, start_log
from handler.engines import Model, load_model
from handler.generation import GenerationRequest
from handler.parameters import parse_parameters

_WORDS = "the quick brown fox jumps over a lazy dog while seven cold rivers run to the sea".split()
_HEAD = ("batch", "P50 ms", "P90 ms", "P99 ms", "ms/token", "tokens/s")


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure how fast a model answers here",
        description="Measure how fast a model answers on this machine: so many prompts of so many "
        "tokens handed over at once, each answered greedily with so many tokens, whatever the "
        "model says. P50, P90 and P99 are of the time from handing over a batch to its last "
        "answer; ms/token is P50 over the tokens out. Nothing else should run meanwhile.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for serve")
    parser.add_argument("--batch", nargs="+", type=_positive, default=[1, 4, 16], metavar="N")
    parser.add_argument("--tokens-in", type=_positive, default=64, metavar="N")
    parser.add_argument("--tokens-out", type=_positive, default=64, metavar="N")
    parser.add_argument("--runs", type=_positive, default=10, help="of each (default: 10)")
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each size of batch. Raises LoadError, RequestError."""
    start_log(quiet=True)
    # a prompt that was read before would not be read again
    options = ["encoder_cache=0", *arguments.option]
    choice = choose_model(arguments.model, options)
    model = load_model(choice.configuration)
    try:
        print(
            f"{choice.name} on backend {model.backend}: {arguments.tokens_in} tokens in, "
            f"{arguments.tokens_out} out, {arguments.runs} runs"
        )
        print("  ".join(f"{name:>9}" for name in _HEAD))
        for batch in arguments.batch:
            milliseconds = _measure(model, batch, arguments)
            p50, p90, p99 = (float(np.percentile(milliseconds, p)) for p in (50, 90, 99))
            rate = 1e3 * batch * arguments.tokens_out / p50
            times = f"{p50:>9.1f}  {p90:>9.1f}  {p99:>9.1f}"
            each = p50 / arguments.tokens_out
            print(f"{batch:>9}  {times}  {each:>9.2f}  {rate:>9.1f}", flush=True)
    finally:
        model.close()


def _measure(model: Model, batch: int, arguments: argparse.Namespace) -> list[float]:
    """Milliseconds of each run; one more before them warms up."""
    parameters = parse_parameters(
        {
            "max_new_tokens": arguments.tokens_out,
            "ignore_eos_token": True,
            "truncate": arguments.tokens_in,
        },
        model.limits,
    )
    random = np.random.default_rng(batch)
    texts = [" ".join(random.choice(_WORDS, arguments.tokens_in)) for _ in range(batch)]
    requests = [GenerationRequest(text, parameters, log_probs=False) for text in texts]
    milliseconds = []
    for run_number in range(arguments.runs + 1):
        start = time.perf_counter()
        results = model.generate(requests)
        if run_number:
            milliseconds.append(1e3 * (time.perf_counter() - start))
    assert all(len(result.token_ids) == arguments.tokens_out for result in results)
    return milliseconds


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return number
