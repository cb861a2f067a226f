"""The workload of AWS's article of 2023: four different tasks in one batch, latency of the batch.

Of FLAN-T5's tasks a translation, a question, a review's sentiment and a summary, each as long as
its text is, are answered greedily with a fixed number of tokens each; the time is from handing over
the texts to having all four answers. Any model, dtype and degree; without --model one of random
weights in the shape that --shape names, which takes as long as a trained one.

P50, P90, P99: percentiles of a batch's latency over the runs, in ms.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from machine import describe, print_description
from random_model import FIRST_WORD, SHAPES, TOKENS, checkpoint
from report import print_table, write_json

from handler.engines import Model, init_inference
from handler.generation import GenerationRequest
from handler.machine import usable_cpus
from handler.parameters import GenerationParameters

_TASKS = (
    ("Translate to German: My name is Arthur, and I have lived in this town for eleven years."),
    (
        "Answer the following question by reasoning step by step. The cafeteria had 23 apples. "
        "If they used 20 for lunch and bought 6 more, how many apples do they have?"
    ),
    (
        "Is this review positive, negative or neutral? The service was slow, but what came to "
        "the table in the end was the best meal that we have had in this city for a long time, "
        "and at a price which nobody can complain about."
    ),
    (
        "Summarize the following conversation. Jeff: Can I train a model on the platform and "
        "then put it behind an endpoint? Philipp: Sure you can. You write a script, name the "
        "type of instance and start the job. Jeff: And how do I find out what is supported? "
        "Philipp: There is a page with everything that works, and examples for the tasks that "
        "people ask for most. Jeff: Nice, then I will begin with the summaries, which our "
        "customers have wanted since last summer."
    ),
)
_LENGTHS = (22, 45, 52, 98)  # tokens of these texts in FLAN-T5's vocabulary, about


def main() -> None:
    a = _arguments()
    machine = describe(usable_cpus())
    print_description(machine)
    folder = str(a.model or checkpoint(a.shape))
    rows, measured = [], []
    for degree in a.degree:
        model = init_inference(
            folder, degree, dtype=a.dtype, backend=a.backend, encoder_cache=0, max_rows=a.batch
        )
        milliseconds = _run(model, a)
        percentiles = [float(np.percentile(milliseconds, p)) for p in (50, 90, 99)]
        name = Path(folder).name
        head = [name, model.backend, a.dtype, str(degree), str(a.batch), str(a.tokens_out)]
        rows.append([*head, *(f"{p:.1f}" for p in percentiles)])
        measured.append({"milliseconds": milliseconds, "degree": degree, "backend": model.backend})
        model.close()
    print(f"\n{a.runs} batches, after {a.warm_up} to warm up; ms a batch")
    titles = ["model", "backend", "dtype", "tensor parallel", "batch", "tokens out"]
    print_table([*titles, "P50", "P90", "P99"], rows)
    write_json(a.json, {"machine": machine, "measured": measured})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, help="a checkpoint folder")
    which.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--degree", nargs="+", type=int, default=[1], help="tensor parallel")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens-out", type=int, default=50)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def _run(model: Model, a: argparse.Namespace) -> list[float]:
    parameters = GenerationParameters(max_new_tokens=a.tokens_out, ignore_eos_token=True)
    texts = [_TASKS[i % 4] if a.model else _words(_LENGTHS[i % 4], i) for i in range(a.batch)]
    requests = [GenerationRequest(text, parameters) for text in texts]
    milliseconds = []
    for run in range(a.warm_up + a.runs):
        start = time.perf_counter()
        results = model.generate(requests)
        taken = time.perf_counter() - start
        assert all(len(result.token_ids) == a.tokens_out for result in results)
        if run >= a.warm_up:
            milliseconds.append(1e3 * taken)
    return milliseconds


def _words(count: int, seed: int) -> str:
    """A prompt of so many tokens for a model of random_model.py."""
    ids = np.random.default_rng(seed).integers(FIRST_WORD, TOKENS, count - 1)
    return " ".join(f"w{i}" for i in ids)


if __name__ == "__main__":
    main()
