#!/usr/bin/env python3
"""Train the demo: a small T5 1.1 on the tasks of tasks.py, from nothing, on a CPU or a GPU.

    python examples/demo/train.py                    writes examples/demo/model; 2 cores: an hour
    python examples/demo/train.py --evaluate-only    held-out exact match of the model there is

Needs torch, transformers, sentencepiece and tqdm. What it writes has the form of a published T5 1.1
checkpoint: gated-gelu, a head of its own, spiece.model, tokenizer.json, safetensors.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from tasks import HELD_OUT_SHARE, TASKS, Example, held_out_examples, training_examples
from tqdm import tqdm
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, T5Tokenizer

HERE = Path(__file__).resolve().parent
PIECES, EXTRA_IDS = 532, 100
CONFIG = {
    "vocab_size": 640,  # rows of the embedding: pieces and extra ids, padded as T5's are
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 240,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
IGNORED = -100  # a label that does not count in the loss
BATCHES_SORTED_TOGETHER = 32  # by length, so that little of a batch is padding

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def train_tokenizer(folder: Path, examples: int = 60_000) -> None:
    """spiece.model and tokenizer.json, T5's settings but digits one by one."""
    texts = (
        text
        for example in itertools.islice(training_examples(seed=1), examples)
        for text in (example.prompt, example.target)
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=model,
        vocab_size=PIECES,
        model_type="unigram",
        split_digits=True,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    T5Tokenizer.from_pretrained(folder, extra_ids=EXTRA_IDS).save_pretrained(folder)


def batches(tokenizer: object, batch_size: int, seed: int) -> Iterator[Batch]:
    """(input ids, attention mask, labels) for ever, each [batch_size, longest]."""
    examples = training_examples(seed)
    order = torch.Generator().manual_seed(seed)
    while True:
        drawn = list(itertools.islice(examples, batch_size * BATCHES_SORTED_TOGETHER))
        inputs = tokenizer([e.prompt for e in drawn]).input_ids
        labels = tokenizer([e.target for e in drawn]).input_ids
        pairs = sorted(zip(inputs, labels), key=lambda pair: (len(pair[1]), len(pair[0])))
        for k in torch.randperm(BATCHES_SORTED_TOGETHER, generator=order).tolist():
            rows = pairs[k * batch_size : (k + 1) * batch_size]
            ids = padded([row[0] for row in rows], 0)
            yield ids, (ids != 0).long(), padded([row[1] for row in rows], IGNORED)


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def new_model() -> T5ForConditionalGeneration:
    """With random weights."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**CONFIG))
    # The library draws the head as wide as the embedding: logits far too large to learn from.
    torch.nn.init.normal_(model.lm_head.weight, std=CONFIG["d_model"] ** -0.5)
    return model


def train(
    model: T5ForConditionalGeneration,
    tokenizer: object,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """AdamW, a short warm-up, then the learning rate falls to nothing along a cosine."""
    device = model.device
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = min(500, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    drawn = itertools.islice(batches(tokenizer, batch_size, seed=2), steps)
    recent: collections.deque[float] = collections.deque(maxlen=100)
    progress = tqdm(drawn, total=steps, mininterval=10)
    for ids, mask, labels in progress:
        loss = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
    model.eval()


def save(model: T5ForConditionalGeneration, folder: Path) -> None:
    """config.json and model.safetensors with the names and settings of published checkpoints."""
    shared = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    weights = {
        name: weight.detach().cpu().contiguous().clone()
        for name, weight in model.state_dict().items()
        if name not in shared
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **CONFIG,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-06,
        "is_encoder_decoder": True,
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.inference_mode()
def exact_match(
    model: T5ForConditionalGeneration, tokenizer: object, examples: Sequence[Example]
) -> dict[str, float]:
    """Share of targets reproduced to the letter, by task."""
    hits: dict[str, list[bool]] = {task: [] for task in TASKS}
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        ids = padded(tokenizer([e.prompt for e in part]).input_ids, 0).to(model.device)
        output = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=128)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for example, text in zip(part, texts):
            hits[example.task].append(text == example.target)
            if text != example.target and os.environ.get("SHOW_MISSES"):
                print(f"{example.prompt!r}\n  wanted {example.target!r}\n  got    {text!r}")
    return {task: sum(hit) / len(hit) for task, hit in hits.items()}


def write_card(folder: Path, scores: dict[str, float], steps: int, count: int) -> None:
    overall = sum(scores.values()) / len(scores)
    examples = {e.task: e for e in held_out_examples(10 * len(TASKS))}
    rows = "\n".join(
        f"| {task} | {examples[task].prompt} | {examples[task].target} | {100 * score:.1f} |"
        for task, score in scores.items()
    )
    parameters = sum(
        math.prod(tensor["shape"])
        for name, tensor in _safetensors_header(folder / "model.safetensors").items()
        if name != "__metadata__"
    )
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text2text-generation
---
# Demo: a small T5 1.1

{parameters:,} parameters, fp32. It is there so that a fresh checkout serves something real: it
follows the instructions below and nothing else, in English only. Its architecture, files and names
are those of a published T5 1.1 or FLAN-T5 checkpoint.

- **Training**: `examples/demo/train.py`, {steps:,} steps from random weights on text that
  `examples/demo/tasks.py` makes by rule. No text of anybody's is in it.
- **Evaluation**: exact match on {count:,} held-out prompts (one prompt in {HELD_OUT_SHARE}, told
  by its hash, is never trained on), greedy: **{100 * overall:.1f} %** over all,
  {100 * min(scores.values()):.1f} % on the worst task. `train.py --evaluate-only` measures again.

| task | prompt | answer | exact match, % |
|---|---|---|---|
{rows}
"""
    )


def _safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=100 * len(TASKS), metavar="COUNT")
    parser.add_argument("--evaluate-only", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.output
    if not arguments.evaluate_only:
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(folder)
        model = new_model().to(_device())
        train(
            model,
            AutoTokenizer.from_pretrained(folder),
            arguments.steps,
            arguments.batch_size,
            arguments.learning_rate,
        )
        save(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder).to(_device()).eval()
    examples = held_out_examples(arguments.held_out)
    scores = exact_match(model, tokenizer, examples)
    for task, score in scores.items():
        print(f"{task:20} {100 * score:5.1f}")
    print(f"{'over all':20} {100 * sum(scores.values()) / len(scores):5.1f}")
    if not arguments.evaluate_only:
        write_card(folder, scores, arguments.steps, len(examples))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
