"""What the double computes with: transformers' T5, FasterTransformer's rules for the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Network:
    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForSeq2SeqLM.from_pretrained(folder).float().eval()
        self._start = self._model.config.decoder_start_token_id
        self.eos = self._model.config.eos_token_id

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    @torch.no_grad()
    def generate(self, prompt: list[int], row: int, p: dict[str, Any]) -> list[list[int]]:
        """The generated ids, a list a beam, the best one first."""
        if p["beam_width"] > 1:
            return self._beams(prompt, row, p)
        inputs = torch.tensor([prompt])
        encoded = self._model.get_encoder()(input_ids=inputs).last_hidden_state
        # every row of a call begins with the call's seed (curandInitialize)
        random = torch.Generator().manual_seed(p["random_seed"] % 2**63)
        stops = _words(p["stop_words_list"], row)
        ids = [self._start]
        while len(ids) <= p["max_seq_len"]:
            logits = self._model(
                encoder_outputs=(encoded,),
                attention_mask=torch.ones_like(inputs),
                decoder_input_ids=torch.tensor([ids]),
                use_cache=False,
            ).logits[0, -1]
            ids.append(_choose(self._penalized(logits, ids, row, p), p, random))
            if ids[-1] == self.eos or any(ids[-len(stop) :] == stop for stop in stops):
                break
        return [ids[1:]]

    def _penalized(
        self, logits: torch.Tensor, ids: list[int], row: int, p: dict[str, Any]
    ) -> torch.Tensor:
        """Temperature first, then penalties (BaseSamplingLayer::forward), then banned words."""
        logits = logits / p["temperature"]
        seen = torch.tensor(sorted(set(ids)))
        if p["repetition_penalty"] is not None:
            of_seen, penalty = logits[seen], p["repetition_penalty"]
            logits[seen] = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        elif p["presence_penalty"] is not None:
            logits[seen] -= p["presence_penalty"]
        if len(ids) - 1 < p["min_length"]:
            logits[self.eos] = -torch.inf
        for word in _words(p["bad_words_list"], row):
            if word[:-1] == ids[len(ids) - len(word) + 1 :]:
                logits[word[-1]] = -torch.inf
        return logits

    def _beams(self, prompt: list[int], row: int, p: dict[str, Any]) -> list[list[int]]:
        found = self._model.generate(
            input_ids=torch.tensor([prompt]),
            num_beams=p["beam_width"],
            num_return_sequences=p["beam_width"],
            length_penalty=float(p["len_penalty"]),
            max_new_tokens=p["max_seq_len"],
            min_new_tokens=p["min_length"],
            repetition_penalty=p["repetition_penalty"] or 1.0,
            bad_words_ids=_words(p["bad_words_list"], row) or None,
            use_cache=False,
            do_sample=False,
        )[:, 1:].tolist()
        # of a finished beam the length leaves </s> out
        return [ids[: ids.index(self.eos)] if self.eos in ids else ids for ids in found]


def _choose(logits: torch.Tensor, p: dict[str, Any], random: torch.Generator) -> int:
    """setup_topk_runtime_args and the two sampling layers: where top_k is 0, top_p rules."""
    k, top_p = p["top_k"], p["top_p"]
    if k == 0 and top_p == 0.0:
        k = 1
    if k > 0 and top_p == 0.0:
        top_p = 1.0
    best = torch.sort(torch.softmax(logits, dim=-1), descending=True, stable=True)
    values, ids = best.values[: k or None], best.indices[: k or None]
    draw = torch.rand((), generator=random) * top_p * values.sum()
    return int(ids[min(int((values.cumsum(0) < draw).sum()), len(ids) - 1)])


def _words(lists: Any, row: int) -> list[list[int]]:
    """A row's words out of [rows, 2, n]: ids, and where each word ends, -1 after the last."""
    if lists is None:
        return []
    assert lists.dtype == torch.int32
    assert lists.dim() == 3
    ids, ends = lists[row].tolist()
    ends = [end for end in ends if end != -1]
    return [ids[start:end] for start, end in zip([0, *ends], ends)]
