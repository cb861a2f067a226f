"""Plain transformers in fp32, one prompt at a time: what engines are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


class Oracle:
    """``generate`` as transformers' own documentation calls it, without a cache.

    Ids beyond the tokenizer are suppressed: random weights choose them, and they are no text.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder = folder
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder).to(dtype).eval()
        told = json.loads((folder / "config.json").read_text())
        if told["model_type"] == "umt5":  # transformers 5 scales its logits, whatever it tells
            self.model.config.tie_word_embeddings = told.get("tie_word_embeddings", True)
        self._logits: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.padding = list(range(len(self.tokenizer), self.model.config.vocab_size))

    def generate(self, prompt: str, **arguments: Any) -> tuple[int, ...]:
        """The ids after the decoder's start token."""
        suppressed = [*self.padding, *arguments.pop("suppress_tokens", ())]
        ids = self.model.generate(
            **self.tokenizer(prompt, return_tensors="pt"),
            use_cache=False,
            suppress_tokens=suppressed or None,
            **arguments,
        )
        return tuple(ids[0, 1:].tolist())

    def text(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def logits(self, prompt: str, ids: tuple[int, ...]) -> torch.Tensor:
        """[len(ids), vocabulary]: what the model thought before each of ``ids``.

        Kept, since engines are to come to the same ids.
        """
        if (prompt, ids) not in self._logits:
            self._logits[prompt, ids] = self._computed(prompt, ids)
        return self._logits[prompt, ids]

    @torch.inference_mode()
    def _computed(self, prompt: str, ids: tuple[int, ...]) -> torch.Tensor:
        start = self.model.config.decoder_start_token_id
        given = torch.tensor([[start, *ids[:-1]]])
        inputs = self.tokenizer(prompt, return_tensors="pt")
        return self.model(**inputs, decoder_input_ids=given, use_cache=False).logits[0].float()

    def log_probs(self, prompt: str, ids: tuple[int, ...]) -> list[float]:
        chosen = torch.log_softmax(self.logits(prompt, ids), dim=-1)
        return [row[token_id].item() for row, token_id in zip(chosen, ids)]
