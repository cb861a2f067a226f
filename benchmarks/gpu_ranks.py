"""Two ranks on one device: the demo's texts of TP 2 beside those of TP 1. Part of gpu.py.

NCCL refuses two ranks on one GPU, so that they meet over gloo, in the host's memory, and without
CUDA graphs. What is shown is that the parts make the whole on this device; the time is gloo's.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from handler.cli.common import DEMO
from handler.config import Configuration, configuration_of
from handler.engines.torch_ranks import loading
from handler.engines.torch_t5.part import load_part
from handler.generation import GenerationRequest
from handler.inference import Model
from handler.parameters import GenerationParameters
from handler.ranks import World
from handler.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

_RANKS = 2
_PROMPTS, _TOKENS_OUT, _RUNS = 64, 64, 5
_END_SECONDS = 60


def compare_ranks(device: torch.device, dtype: str) -> dict[str, Any]:
    """Prints how many texts are equal, and ms a step; returns the same."""
    c = _configuration(dtype)
    part = load_part(DEMO, c, device=device)
    one, one_ms = _measured(part.engine(part.rows))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    arguments = [sys.executable, __file__, str(device), dtype]
    other = subprocess.Popen(arguments, env={**os.environ, **place})
    try:
        os.environ.update(place)
        two, two_ms = _measured(loading.lead(DEMO, c, World(0, _RANKS), device))
        other.wait(_END_SECONDS)
    finally:
        other.kill()
    equal = sum(a == b for a, b in zip(one, two))
    print(
        f"the demo in {dtype}, {len(one)} rows: TP 1 {one_ms:.2f} ms a step, TP {_RANKS} over gloo "
        f"on one device {two_ms:.2f}; {equal} of {len(one)} texts are equal"
    )
    return {"dtype": dtype, "equal": equal, "texts": len(one), "ms": {"1": one_ms, "2": two_ms}}


def _configuration(dtype: str) -> Configuration:
    return configuration_of(
        str(DEMO),
        backend="torch",
        dtype=dtype,
        tensor_parallel_degree=_RANKS,
        max_rows=_PROMPTS,
        max_input_tokens=256,
        max_output_tokens=128,
    )


def _measured(engine: Any) -> tuple[list[str], float]:
    """Its texts, and ms a step with all rows running; closes it."""
    from tasks import held_out_examples

    prompts = [example.prompt for example in held_out_examples(_PROMPTS)]
    limits = {"max_input_tokens": 256, "max_output_tokens": 128}
    model = Model(Scheduler(engine, max_queue=1000), backend="torch", **limits)
    texts = model.pipeline_generate(prompts)
    endless = GenerationParameters(max_new_tokens=_TOKENS_OUT, ignore_eos_token=True)
    requests = [GenerationRequest(prompt, endless) for prompt in prompts]
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        model.generate(requests)
        seconds.append(time.perf_counter() - start)
    model.close()
    return texts, 1e3 * statistics.median(seconds) / _TOKENS_OUT


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def main(device: str, dtype: str) -> None:
    """The other rank."""
    world = World(_RANKS - 1, _RANKS)
    loading.follow(DEMO, _configuration(dtype), world, torch.device(device)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
