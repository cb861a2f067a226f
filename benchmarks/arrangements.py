"""The servers that serve.py compares, each in a process of its own.

It is the shipped server, ``python -m handler serve``; for ``static`` its scheduler is exchanged,
for ``transformers`` its engine. On SIGTERM it writes what it noted: for each text the moment when
its prompt was accepted and the moments when its tokens were known, on the clock that all processes
of a machine share.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import handler.cli
import handler.engines
import handler.inference
from handler.batcher import Batcher
from handler.generation import Generation
from handler.parameters import GenerationParameters
from handler.sampling import RowSampling, choose_tokens
from handler.scheduler import SUPPORTED_PARAMETERS

if TYPE_CHECKING:
    from handler.engines.protocol import StepEngine

BACKENDS = {"in flight": "onnxruntime", "static": "onnxruntime", "transformers": "transformers"}
"""arrangement -> backend"""

_START_SECONDS, _END_SECONDS = 300, 60

Moments = list[float]
"""When a prompt was accepted, then when each of its tokens was known."""


class Server:
    """A running server, seen from the benchmark."""

    def __init__(self, arrangement: str, model: Path, options: dict[str, Any]) -> None:
        self.arrangement = arrangement
        arguments = [str(model), "--port", "0"]
        # rounds ask the same prompts again, which only one of the arrangements would remember
        own = {"backend": BACKENDS[arrangement], "encoder_cache": 0}
        for name, value in {**options, **own}.items():
            arguments += ["--option", f"{name}={value}"]
        descriptor, self._times_file = tempfile.mkstemp(suffix=".json")
        os.close(descriptor)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        threads = {"OMP_NUM_THREADS": str(options["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, arrangement, self._times_file, *arguments],
            stderr=self._log,
            env={**os.environ, **threads},
        )
        self.port = self._wait_for_port()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> list[Moments]:
        """End it; what it noted of every text."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_END_SECONDS)
        texts: list[Moments] = json.loads(Path(self._times_file).read_text())
        return texts

    def close(self) -> None:
        """Whatever happened before."""
        self._process.kill()
        self._process.wait()
        self._log.close()
        os.unlink(self._times_file)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _wait_for_port(self) -> int:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            told = re.search(r"serving .* on http://\S+:(\d+)", self.log())
            if told:
                return int(told.group(1))
            time.sleep(0.1)
        log = self.log()
        self.close()
        sys.exit(f"the server {self.arrangement!r} did not start:\n{log[-2000:]}")


class StaticBatches:
    """A step engine as one that runs whole batches, for the shipped Batcher.

    A batch of max_rows runs to the end of its longest text, and its rows stay in it so long. Each
    text is answered at its own end, which is kinder than DJLServing's dynamic batches: those are
    answered together.
    """

    supported_parameters = SUPPORTED_PARAMETERS
    draws_seeds = False

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self.tokenizer = engine.tokenizer
        self.max_rows = engine.max_rows
        self.quality_warning = engine.quality_warning

    def batch_key(self, parameters: GenerationParameters) -> str:
        return "all alike"

    def generate(self, batch: Sequence[Generation]) -> None:
        engine, n, step = self._engine, len(batch), 0
        for row, generation in enumerate(batch):
            *_, handles = engine.encode([generation.prompt_ids])
            assert handles is not None
            engine.attach(handles[0], row)
        sampling = [
            RowSampling(g.parameters, engine.decoder_start_token_id, g.bad_words) for g in batch
        ]
        tokens = [engine.decoder_start_token_id] * n
        while not all(generation.done for generation in batch):
            logits = engine.decode(n, np.array(tokens)[:, None], np.full(n, step))
            tokens, log_probs = choose_tokens(
                logits[:, 0],
                sampling,
                [step] * n,
                engine.tokenizer.eos_token_id,
                engine.tokenizer.size,
            )
            for generation, token, log_prob in zip(batch, tokens, log_probs):
                if not generation.done:
                    generation.append(token, log_prob)
            step += 1

    def close(self) -> None:
        self._engine.close()


class _TimedGeneration(Generation):
    """Notes when it was made and when each of its tokens was known."""

    noted: list[Moments] = []  # noqa: RUF012  one list for the process

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._moments = [time.perf_counter()]
        self.noted.append(self._moments)

    def append(self, *arguments: Any) -> bool:
        self._moments.append(time.perf_counter())
        return super().append(*arguments)


def _static_batcher(engine: StepEngine, max_queue: int, encoder_cache: int) -> Batcher:
    return Batcher(StaticBatches(engine), max_queue)


def main() -> None:
    arrangement, times_file, *arguments = sys.argv[1:]
    vars(handler.inference)["Generation"] = _TimedGeneration
    if arrangement == "static":
        vars(handler.engines)["Scheduler"] = _static_batcher
    try:
        handler.cli.main(["serve", *arguments])
    finally:
        Path(times_file).write_text(json.dumps(_TimedGeneration.noted))


if __name__ == "__main__":
    main()
