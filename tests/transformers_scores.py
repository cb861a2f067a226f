"""What transformers' own processors make of logits, in the order in which ``generate`` has them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from handler.parameters import GenerationParameters

EOS, START = 1, 0
Words = Sequence[Sequence[int]]


class PresenceAndFrequency(LogitsProcessor):
    """OpenAI's and vLLM's formula, which transformers does not have."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The start token is not counted, nor what fills a row that is done."""
        counts = torch.zeros_like(scores)
        generated = input_ids[:, 1:]
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def generate_arguments(p: GenerationParameters, bad_words: Words = ()) -> dict[str, Any]:
    """What ``generate`` is to be called with for a greedy text."""
    ends_late = p.max_new_tokens if p.ignore_eos_token else p.min_new_tokens
    arguments = {
        "max_new_tokens": p.max_new_tokens,
        "min_new_tokens": ends_late or None,
        "repetition_penalty": p.repetition_penalty,
        "no_repeat_ngram_size": p.no_repeat_ngram_size or None,
        "bad_words_ids": [list(word) for word in bad_words] or None,
    }
    if p.presence_penalty or p.frequency_penalty:
        own = PresenceAndFrequency(p.presence_penalty, p.frequency_penalty)
        arguments["logits_processor"] = LogitsProcessorList([own])
    return arguments


def processors(
    p: GenerationParameters, bad_words: Words = (), num_beams: int = 1
) -> LogitsProcessorList:
    own = generate_arguments(p, bad_words).pop("logits_processor", LogitsProcessorList())
    arguments = generate_arguments(p, bad_words)
    arguments.pop("logits_processor", None)
    if p.samples:
        arguments |= {"do_sample": True, "temperature": p.temperature, "top_k": p.top_k}
        arguments |= {"top_p": p.top_p or 1.0, "typical_p": p.typical_p or 1.0}
    configuration = GenerationConfig(**arguments, eos_token_id=EOS, num_beams=num_beams)
    configuration._eos_token_tensor = torch.tensor([EOS])
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=True),
        _merge_criteria_processor_list=lambda known, more: LogitsProcessorList([*known, *more]),
    )
    return GenerationMixin._get_logits_processor(
        model, configuration, input_ids_seq_length=1, logits_processor=own
    )


def transformers_scores(
    logits: npt.NDArray[np.float32],
    p: GenerationParameters,
    generated: Sequence[int] = (),
    bad_words: Words = (),
    num_beams: int = 1,
) -> torch.Tensor:
    """[vocabulary]: the scores of one row after these tokens.

    top_p and typical_p compute in fp64: their sums of many probabilities lose digits in fp32.
    """
    ids = torch.tensor([[START, *generated]])
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors(p, bad_words, num_beams):
        if isinstance(processor, (TopPLogitsWarper, TypicalLogitsWarper)):
            scores = scores.double()
        scores = processor(ids, scores)
    return scores[0]


def rounding_decides(
    logits: npt.NDArray[np.float32], p: GenerationParameters, num_beams: int = 1
) -> bool:
    """Whether a filter's border lies within rounding of a token: then either set is right."""
    ids = torch.tensor([[START]])
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors(p, num_beams=num_beams):
        if isinstance(processor, (TopPLogitsWarper, TypicalLogitsWarper)):
            scores = scores.double()
            log_probs = scores.log_softmax(-1)
            probabilities = log_probs.exp()
            keys, share = -log_probs, p.top_p
            if isinstance(processor, TypicalLogitsWarper):
                entropy = -(log_probs * probabilities).nansum()
                keys, share = (-log_probs - entropy).abs(), p.typical_p
            order = keys[0].argsort(stable=True)
            reached = probabilities[0, order].cumsum(-1)
            border = int((reached < share).sum())
            gaps = keys[0, order].diff()[max(border - 1, 0) : border + 1]
            if ((reached - share).abs() < 1e-6).any() or (gaps < 1e-6).any():
                return True
        scores = processor(ids, scores)
    return False
