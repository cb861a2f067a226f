"""The engines that decode.py compares, each in a process of its own that runs when it is told to.

A process answers lines of JSON: {"batch": 4, "input": 64, "output": 64} runs one generation of
exactly these lengths, greedily, and is answered {"seconds": ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from random_model import FIRST_WORD, TOKENS

Ids = list[list[int]]
Run = Callable[[Ids, int], None]
"""(prompts, tokens to generate) -> None"""

_EOS = 1


class Peer:
    """A running engine process, seen from the benchmark."""

    def __init__(self, engine: str, model: Path, threads: int, max_rows: int) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, __file__, engine, str(model), str(threads), str(max_rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self._answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, batch: int, tokens_in: int, tokens_out: int) -> float:
        """Seconds of one generation."""
        assert self._process.stdin is not None
        task = {"batch": batch, "input": tokens_in, "output": tokens_out}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            sys.exit(f"{self.engine} failed:\n{self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def prepare(engine: str, model: Path, threads: int, max_rows: int) -> None:
    """Let the engine build or convert what it keeps on disk, in a process that ends then."""
    Peer(engine, model, threads, max_rows).close()


def _ours(model: Path, threads: int, max_rows: int, **options: Any) -> Run:
    from handler.engines import init_inference
    from handler.generation import GenerationRequest
    from handler.parameters import GenerationParameters

    loaded = init_inference(
        str(model), backend="onnxruntime", threads=threads, max_rows=max_rows, **options
    )

    def run(prompts: Ids, steps: int) -> None:
        parameters = GenerationParameters(max_new_tokens=steps, ignore_eos_token=True)
        texts = [loaded.tokenizer.decode(ids) for ids in prompts]
        results = loaded.generate([GenerationRequest(text, parameters) for text in texts])
        assert [r.input_tokens for r in results] == [len(ids) for ids in prompts]
        assert all(len(r.token_ids) == steps for r in results)

    return run


def _transformers(model: Path, threads: int, max_rows: int) -> Run:
    import torch
    from transformers import T5ForConditionalGeneration

    torch.set_num_threads(threads)
    loaded = T5ForConditionalGeneration.from_pretrained(model).eval()

    def run(prompts: Ids, steps: int) -> None:
        ids = torch.tensor(prompts)
        lengths = {"max_new_tokens": steps, "min_new_tokens": steps}
        with torch.inference_mode():
            texts = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=1, do_sample=False, **lengths
            )
        assert texts.shape == (len(prompts), steps + 1)

    return run


def _ctranslate2(model: Path, threads: int, max_rows: int, *, form: str) -> Run:
    import ctranslate2

    converted = model / f"ctranslate2-{form}"
    if not converted.is_dir():
        _convert(model, converted, form)
    translator = ctranslate2.Translator(
        str(converted), device="cpu", compute_type=form, inter_threads=1, intra_threads=threads
    )

    def run(prompts: Ids, steps: int) -> None:
        words = [["</s>" if i == _EOS else f"w{i}" for i in ids] for ids in prompts]
        results = translator.translate_batch(
            words, beam_size=1, max_decoding_length=steps, min_decoding_length=steps
        )
        assert all(len(r.hypotheses[0]) == steps for r in results)

    return run


def _convert(model: Path, target: Path, form: str) -> None:
    from transformers import T5ForConditionalGeneration

    spec = ctranslate2_spec(T5ForConditionalGeneration.from_pretrained(model))
    spec.optimize(quantization=None if form == "float32" else form)
    aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    spec.save(str(aside))
    aside.rename(target)


def ctranslate2_spec(loaded: Any) -> Any:
    """CTranslate2's own description of transformers' T5, with the tokens' names for a vocabulary.

    Read with transformers 5, it scales FLAN-T5's logits; the best token stays the best.
    """
    import torch
    from ctranslate2.converters.transformers import T5Loader
    from random_model import VOCABULARY

    with torch.no_grad():
        spec = T5Loader.get_model_spec(T5Loader.__new__(T5Loader), loaded)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(FIRST_WORD, VOCABULARY))]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.bos_token = spec.config.decoder_start_token = "<pad>"
    spec.config.eos_token, spec.config.unk_token = "</s>", "<unk>"
    spec.validate()
    return spec


ENGINES: dict[str, Callable[[Path, int, int], Run]] = {
    "ours-int8": lambda *a: _ours(*a, dtype="int8"),
    "ours-fp32": lambda *a: _ours(*a, dtype="fp32"),
    "ours-int8-per-batch": lambda *a: _ours(*a, dtype="int8", cpu_kernel="per_batch"),
    "transformers-fp32": _transformers,
    "ctranslate2-int8": lambda *a: _ctranslate2(*a, form="int8"),
    "ctranslate2-fp32": lambda *a: _ctranslate2(*a, form="float32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("max_rows", type=int)
    a = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    run = ENGINES[a.engine](a.model, a.threads, a.max_rows)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        random = np.random.default_rng(task["batch"])
        prompts = random.integers(FIRST_WORD, TOKENS, (task["batch"], task["input"]))
        prompts[:, -1] = _EOS
        start = time.perf_counter()
        run(prompts.tolist(), task["output"])
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
