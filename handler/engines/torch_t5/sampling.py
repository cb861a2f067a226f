"""Choosing tokens where the logits are: handler/sampling.py's specification, on a GPU.

A row's random number is made on the host from its seed and its step, as there; what was chosen
comes back in one copy, the only thing in a step that the host waits for, with the next step begun.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from handler.engines.torch_t5.inputs import on_device
from handler.sampling import Chosen, Floats, Planned, RowSampling, filters_of, planned


class DeviceSampler:
    """See Sampler: for logits that are torch's, on the device of ``chosen``.

    chosen [max_rows]: where the tokens are left for who reads them there.
    """

    def __init__(self, chosen: Tensor) -> None:
        self._chosen = chosen
        on_gpu = chosen.device.type == "cuda"
        self._copied = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._told = torch.empty(len(chosen), 2, dtype=torch.float64, pin_memory=on_gpu)

    def on_host(self, logits: Tensor) -> Floats:
        copied: Floats = logits.cpu().numpy()
        return copied

    def choose(
        self,
        logits: Tensor,
        rows: Sequence[RowSampling],
        steps: Sequence[int],
        eos_token_id: int,
        tokens_in_use: int | None = None,
    ) -> Callable[[], Chosen]:
        """See Sampler. ``logits`` [rows, vocabulary] are not changed."""
        tokens, log_probs = _choose(logits, rows, steps, eos_token_id, tokens_in_use)
        n = len(rows)
        self._chosen[:n] = tokens
        # begun now: what the device is given next need not be waited for
        told = torch.stack([tokens.double(), log_probs.double()], dim=1)
        self._told[:n].copy_(told, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return lambda: self._tell(rows)

    def _tell(self, rows: Sequence[RowSampling]) -> Chosen:
        if self._copied is not None:
            self._copied.synchronize()
        told = self._told[: len(rows)].numpy().T
        picked: list[int] = told[0].astype(np.int64).tolist()
        for sampling, token in zip(rows, picked):
            sampling.append(token)
        log_probs = [
            p if sampling.log_probs or not math.isfinite(p) else None
            for sampling, p in zip(rows, told[1].tolist())
        ]
        return Chosen(picked, log_probs)


def _choose(
    logits: Tensor,
    rows: Sequence[RowSampling],
    steps: Sequence[int],
    eos_token_id: int,
    tokens_in_use: int | None,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities [rows], by what the host knows and the device's logits."""
    size = logits.shape[-1]
    scores = logits.clone()
    if tokens_in_use is not None:
        scores[:, tokens_in_use:] = -torch.inf
    plan = planned(rows, steps, eos_token_id, size)
    if plan is not None:
        _change(scores.view(-1), plan)
    allowed, tokens = scores.max(-1)
    drawing = [row for row, sampling in enumerate(rows) if sampling.samples]
    if drawing:
        numbers = np.array([rows[row].uniform(steps[row]) for row in drawing])
        top_k, values = filters_of([rows[row] for row in drawing])
        there = on_device(np.array(drawing), logits.device)
        drawn = _draw(scores[there], top_k, values, numbers)
        # a row without any token to choose, or of no numbers, is told apart below
        tokens[there] = torch.where(allowed[there].isfinite(), drawn, tokens[there])
    log_probs = torch.zeros_like(allowed)
    if any(sampling.log_probs for sampling in rows):
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        log_probs = (chosen - logits.logsumexp(-1)).clamp(max=0.0)
    log_probs = torch.where(allowed == -torch.inf, allowed, log_probs)
    return tokens, torch.where(logits.amax(-1).isfinite(), log_probs, torch.nan)


def _change(flat: Tensor, plan: Planned) -> None:
    if len(plan.penalized):
        places = on_device(plan.penalized, flat.device)
        counts = on_device(plan.counts, flat.device)
        repetition, presence, frequency = on_device(plan.penalties, flat.device).T
        scores = flat[places]
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        flat[places] = scores - frequency * counts - presence * (counts > 0)
    # [...] = -inf is the same, but older torches copy the number there, and wait for it
    flat.index_fill_(0, on_device(plan.banned, flat.device), -torch.inf)


def _draw(
    scores: Tensor,
    top_k: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    numbers: npt.NDArray[np.float64],
) -> Tensor:
    """A token of each row. scores [rows, n]; values: temperature, top_p, typical_p [rows] each.

    Of a filter's order and its border see handler/token_filters.py, of which this is the plain
    form: everything is sorted.
    """
    device = scores.device
    temperature, top_p, typical_p = on_device(values, device)
    scaled = scores / temperature.float()[:, None]
    if not (top_k.any() or values[1:].any()):
        weights = (scaled - scaled.amax(-1, keepdim=True)).double().exp()
        return _pick(weights, on_device(numbers, device))
    # of equals the last places come first, as in a stable ascending sort
    ranked, order = (each.flip(-1) for each in scaled.sort(dim=-1, stable=True))
    ranked = ranked.double()
    size = ranked.shape[-1]
    last = np.where(top_k > 0, np.clip(top_k, 1, size), size) - 1
    border = ranked.gather(1, on_device(last, device)[:, None])
    weights = (ranked - ranked[:, :1]).exp() * (ranked >= border)
    if values[1].any():
        before, total = _before(weights)
        out = before >= (torch.where(_is_on(top_p), top_p, torch.inf) * total)[:, None]
        out[:, 0] = False
        weights *= ~out
    if values[2].any():
        weights *= _typical(weights, ranked, typical_p)
    return _pick(torch.zeros_like(weights).scatter_(1, order, weights), on_device(numbers, device))


def _typical(weights: Tensor, ranked: Tensor, share: Tensor) -> Tensor:
    """Which stay: those whose surprise is nearest to the expected one (arXiv 2202.00666), and so
    their score to the expected score."""
    scores = (ranked - ranked[:, :1]).clamp(min=-1e4)
    expected = (weights * scores).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    distance = (scores - expected).abs()
    distance[weights == 0] = torch.inf
    by_key, order = distance.sort(dim=-1, stable=True)
    before, total = _before(weights.gather(1, order))
    last = (before < (share * total)[:, None]).sum(-1).clamp(min=1) - 1
    is_typical: Tensor = distance <= by_key.gather(1, last[:, None])
    return is_typical | ~_is_on(share)[:, None]


def _pick(weights: Tensor, numbers: Tensor) -> Tensor:
    """The place of each row in which its number from [0, 1) falls."""
    sums = weights.cumsum(-1)
    total = sums[:, -1]
    reached = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))
    return (sums <= reached[:, None]).sum(-1).clamp(max=weights.shape[-1] - 1)


def _before(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the weights before each place [rows, n], and of all [rows]."""
    sums = weights.cumsum(-1)
    return F.pad(sums[:, :-1], (1, 0)), sums[:, -1]


def _is_on(share: Tensor) -> Tensor:
    return (share > 0.0) & (share < 1.0)
