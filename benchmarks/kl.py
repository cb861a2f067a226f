"""What fewer bits change: each engine's distribution over the next token beside that in fp32.

Greedy texts of fp32 are given to every other form, token by token, so that all of them think about
the same beginnings. KL is D(p_fp32 || p) in nats (Kullback and Leibler 1951); agreement is how
often the likeliest token is the same. Needs the extras of both engines.

    python benchmarks/kl.py                   the demo, which was trained
    python benchmarks/kl.py --model base      flan-t5-base's shapes, random weights

Random weights are random_model.py's, with queries d_kv**-0.5 as large, as T5 initializes them: else
attention sees one key alone, and the last bits of fp32 already change which.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
from random_model import CACHE, FIRST_WORD, SHAPES, TOKENS, checkpoint
from safetensors.numpy import load_file, save_file

from handler.config import configuration_of
from handler.engines.protocol import StepEngine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

Array = npt.NDArray[np.float32]
MODULES = {"torch": "handler.engines.torch_t5", "onnxruntime": "handler.engines.onnx_t5"}
REFERENCE = ("torch", "fp32")
COMPARED = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("torch", "bf16"),
    ("torch", "fp16"),
    ("torch", "int8"),
]
EOS = 1
INPUT_TOKENS = 64  # of the random model's prompts


def initialized() -> Path:
    """The folder of a flan-t5-base with T5's first queries; written when it is not there yet."""
    source, folder = checkpoint("base"), CACHE / "flan-t5-base-initialized"
    if not folder.is_dir():
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=CACHE))
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(source / name, aside)
        weights = load_file(source / "model.safetensors")
        for name, tensor in weights.items():
            if name.endswith("Attention.q.weight"):
                tensor *= SHAPES["base"]["d_kv"] ** -0.5
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        aside.rename(folder)
    return folder


def opened(backend: str, dtype: str, folder: Path, rows: int, tokens: int) -> StepEngine:
    c = configuration_of(
        str(folder), backend=backend, dtype=dtype, max_rows=rows, max_output_tokens=tokens
    )
    engine: StepEngine = import_module(MODULES[backend]).load(folder, c)
    return engine


def prompts_of(model: str, count: int, engine: StepEngine) -> list[list[int]]:
    if model == "demo":
        from tasks import held_out_examples

        return [engine.tokenizer.encode(e.prompt) for e in held_out_examples(count)]
    draw = random.Random(0)
    words = range(FIRST_WORD, TOKENS)
    return [[*draw.choices(words, k=INPUT_TOKENS - 1), EOS] for _ in range(count)]


def attach(engine: StepEngine, prompts: Sequence[Sequence[int]]) -> None:
    for row, prompt in enumerate(prompts):
        *_, handles = engine.encode([prompt])
        assert handles is not None
        engine.attach(handles[0], row)


def logits_of(engine: StepEngine, read: npt.NDArray[np.int64], step: int) -> Array:
    """[rows, vocabulary]"""
    logits = engine.decode(len(read), read[:, [step]], np.full(len(read), step))
    return engine.sampler.on_host(logits)[:, 0]


def greedy(
    engine: StepEngine, prompts: Sequence[Sequence[int]], tokens: int
) -> npt.NDArray[np.int64]:
    """What the decoder reads, [rows, tokens]: the start and the text, ``</s>`` for ever behind."""
    attach(engine, prompts)
    n = len(prompts)
    read = np.full((n, tokens), EOS)
    read[:, 0] = engine.decoder_start_token_id
    ended = np.zeros(n, bool)
    for step in range(tokens - 1):
        logits = logits_of(engine, read, step)
        chosen = logits[:, : engine.tokenizer.size].argmax(-1)
        read[:, step + 1] = np.where(ended, EOS, chosen)
        ended |= chosen == EOS
    return read


def log_probs(
    engine: StepEngine, prompts: Sequence[Sequence[int]], read: npt.NDArray[np.int64]
) -> Array:
    """[places, vocabulary]: before every token of the texts, each to its ``</s>``."""
    attach(engine, prompts)
    logits = np.stack([logits_of(engine, read, k).copy() for k in range(read.shape[1])], axis=1)
    ended = np.cumsum(read == EOS, axis=1) > 0
    scores = logits[~ended][:, : engine.tokenizer.size].astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    found: Array = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["demo", "base"], default="demo")
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="of each text, at most")
    arguments = parser.parse_args()
    folder = ROOT / "examples" / "demo" / "model" if arguments.model == "demo" else initialized()
    size = (arguments.prompts, arguments.tokens)
    engine = opened(*REFERENCE, folder, *size)
    prompts = prompts_of(arguments.model, arguments.prompts, engine)
    read = greedy(engine, prompts, arguments.tokens)
    right = log_probs(engine, prompts, read)
    engine.close()
    print(f"{arguments.model}: {len(right)} places in {len(prompts)} texts of torch fp32")
    print("| engine, dtype | mean KL, nats | 99 % of KL below | the same likeliest token |")
    print("|---|---|---|---|")
    for backend, dtype in COMPARED:
        engine = opened(backend, dtype, folder, *size)
        found = log_probs(engine, prompts, read)
        engine.close()
        kl = (np.exp(right) * (right - found)).sum(-1)
        same = (right.argmax(-1) == found.argmax(-1)).mean()
        print(
            f"| {backend} {dtype} | {kl.mean():.1e} | {np.quantile(kl, 0.99):.1e} | {same:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
