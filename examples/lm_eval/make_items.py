"""Writes the items of the tasks here: prompts of the demo that it was never trained on."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "demo"))

from tasks import TASKS, is_held_out  # noqa: E402

ITEMS = 50
FILES = {"sentiment": "sentiment.jsonl", "number to words": "number_to_words.jsonl"}


def items(task: str) -> dict[str, str]:
    """prompt -> answer, the same at every call."""
    r = random.Random(f"lm-eval {task}")
    found: dict[str, str] = {}
    while len(found) < ITEMS:
        prompt, answer = TASKS[task](r)
        if is_held_out(prompt):
            found[prompt] = answer
    return found


def lines(task: str) -> str:
    pairs = items(task).items()
    return "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in pairs)


if __name__ == "__main__":
    for task, name in FILES.items():
        (FOLDER / name).write_text(lines(task), encoding="utf-8")
