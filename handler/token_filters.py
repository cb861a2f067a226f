"""top_k, top_p and typical_p over many rows, and a draw from what they leave.

transformers' formulas: a token stays where those before it in the filter's order hold less than p.
Rows with a small top_k are reduced to those tokens first; for others all tokens count, and only
those around the border of a filter are sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
AnyFloats = npt.NDArray[np.floating[Any]]

_CHUNK = 64  # tokens of which only the best is looked at first
_FEW = 1024  # most tokens of a row that are all sorted
_BINS = 1024
_BIN_RANGE = 40.0  # probabilities e**40 times smaller than the largest need no fine bins
_NEVER = 1e4  # -_NEVER is a score whose exp is 0
_BLOCK = 128  # tokens whose weights are added up before a draw


def best_tokens(logits: Floats, top_k: Places) -> tuple[Places, Places, Floats]:
    """The rows that a small top_k leaves few tokens, and those: (rows, tokens, scores).

    logits: [rows, vocabulary]; tokens, scores: [those rows, most tokens], in the vocabulary's
    order and padded with -inf. All of the k best are there, with a few more.
    """
    size = logits.shape[-1]
    chunk = _CHUNK if size >= _CHUNK * _CHUNK else 1
    chunks = size // chunk
    rows = np.flatnonzero((top_k > 0) & (top_k <= min(chunks // 2, _FEW // 4)))
    none = np.zeros((0, 0), np.intp)
    if not len(rows):
        return rows, none, none.astype(np.float32)
    if len(rows) < len(logits):
        logits = logits[rows]
    # k chunks have a token as good as the k-th best of the chunks' best ones
    best = logits[:, : chunk * chunks].reshape(len(rows), chunk, chunks).max(1)
    last = chunks - top_k[rows]
    reached = np.partition(best, np.unique(last), axis=-1)[np.arange(len(rows)), last]
    places = np.flatnonzero(logits >= reached[:, None])
    row = places // size
    counts = np.bincount(row, minlength=len(rows))
    if counts.max() > _FEW:  # equal scores: too many for this way
        few = counts <= _FEW
        kept = few[row]
        places, row = places[kept], (few.cumsum() - 1)[row[kept]]
        rows, counts = rows[few], counts[few]
        if not len(rows):
            return rows, none, none.astype(np.float32)
    column = np.arange(len(places)) - (counts.cumsum() - counts)[row]
    tokens = np.zeros((len(rows), counts.max()), np.intp)
    scores = np.full(tokens.shape, -np.inf, np.float32)
    tokens[row, column] = places % size
    scores[row, column] = logits.reshape(-1)[places]
    return rows, tokens, scores


def draw_among_few(
    tokens: Places, scores: Floats, top_k: Places, values: Doubles, numbers: Doubles
) -> Places:
    """A token of each row. tokens, scores: [rows, n], padded; values: temperature, top_p and
    typical_p, each [rows]; numbers: [rows]."""
    temperature, top_p, typical_p = values
    scaled = (scores / temperature.astype(np.float32)[:, None]).astype(np.float64)
    kept = keep(scaled, top_k, top_p, typical_p)
    scaled -= scaled.max(-1, keepdims=True)
    place, _ = _pick(np.exp(scaled) * kept, numbers)
    return tokens[np.arange(len(tokens)), place]


def keep(
    scores: Doubles, top_k: Places, top_p: Doubles, typical_p: Doubles, least: int = 1
) -> npt.NDArray[np.bool_]:
    """Which of the scores [rows, n] the filters leave, at least ``least`` of each."""
    # of equals the last places come first, as in a stable ascending sort
    order = np.ascontiguousarray(scores.argsort(-1, kind="stable")[:, ::-1])
    ranked = np.take_along_axis(scores, order, -1)
    size = scores.shape[-1]
    last = np.where(top_k > 0, top_k.clip(least, size), size) - 1
    kept = ranked >= np.take_along_axis(ranked, last[:, None], -1)
    ranked -= ranked[:, :1].copy()
    weights = np.exp(ranked) * kept
    if _on(top_p).any():
        before = _before(weights)
        share = np.where(_on(top_p), top_p, np.inf)
        out = before[:, :-1] >= share[:, None] * before[:, -1:]
        out[:, :least] = False
        kept &= ~out
        weights *= kept
    if _on(typical_p).any():
        keys = _untypical(weights, ranked, _padded_sums)
        keys[weights == 0.0] = np.inf
        by_key = keys.argsort(-1, kind="stable")
        before = _before(np.take_along_axis(weights, by_key, -1))
        last = (before[:, :-1] < typical_p[:, None] * before[:, -1:]).sum(-1) - 1
        border = np.take_along_axis(keys, np.take_along_axis(by_key, last[:, None], -1), -1)
        out = (keys > border) & _on(typical_p)[:, None]
        np.put_along_axis(out, by_key[:, :least], False, -1)
        kept &= ~out
    in_order = np.empty_like(kept)
    np.put_along_axis(in_order, order, kept, -1)
    return in_order


def draw_among_all(logits: Floats, top_k: Places, values: Doubles, numbers: Doubles) -> Places:
    """A token of each row. logits: [rows, vocabulary], overwritten; values as above."""
    temperature, top_p, typical_p = values
    if (temperature != 1.0).any():
        logits /= temperature.astype(np.float32)[:, None]
    logits -= logits.max(-1, keepdims=True)
    size = logits.shape[-1]
    for row in np.flatnonzero((top_k > 0) & (top_k < size)):
        scores = logits[row]
        scores[scores < np.partition(scores, size - top_k[row])[size - top_k[row]]] = -np.inf
    weights = np.exp(logits)
    for row in np.flatnonzero(_on(top_p)):
        _keep_likeliest(weights[row], logits[row], top_p[row])
    for row in np.flatnonzero(_on(typical_p)):
        _keep_typical(weights[row : row + 1], logits[row : row + 1], typical_p[row])
    block, numbers = _pick(_block_sums(weights), numbers)
    places = block[:, None] * _BLOCK + np.arange(_BLOCK)
    inside = np.where(
        places < size, np.take_along_axis(weights, np.minimum(places, size - 1), -1), 0.0
    )
    place, _ = _pick(inside.astype(np.float64), numbers)
    return block * _BLOCK + place


def _on(share: Any) -> Any:
    return (share > 0.0) & (share < 1.0)


def _before(weights: Doubles) -> Doubles:
    """[rows, n + 1]: the sum of all weights before each place, and at the end of all."""
    sums = np.zeros((len(weights), weights.shape[-1] + 1))
    weights.cumsum(-1, out=sums[:, 1:])
    return sums


def _pick(weights: Doubles, numbers: Doubles) -> tuple[Places, Doubles]:
    """The place of each row in which its number from [0, 1) falls, and how far into it."""
    before = _before(weights)
    total = before[:, -1]
    reached = np.minimum(numbers * total, np.nextafter(total, 0.0))
    place = (before[:, 1:] <= reached[:, None]).sum(-1)
    row = np.arange(len(weights))
    return place, (reached - before[row, place]) / weights[row, place]


def _block_sums(weights: Floats) -> Doubles:
    """[rows, blocks] of [rows, vocabulary]; the last block may be shorter."""
    rows, size = weights.shape
    whole = size - size % _BLOCK
    sums = weights[:, :whole].reshape(rows, whole // _BLOCK, _BLOCK).sum(-1)
    if whole < size:
        sums = np.concatenate([sums, weights[:, whole:].sum(-1, keepdims=True)], axis=-1)
    doubles: Doubles = sums.astype(np.float64)
    return doubles


def _keep_likeliest(weights: Floats, scores: Floats, share: float) -> None:
    """top_p of one row, in place: of equal scores the last ones stay."""
    total = float(weights.sum())
    # all that are no larger than this hold, together, no more than what is cut off
    least = np.float32((1.0 - share) * total / len(weights) * 0.999)
    candidates = np.flatnonzero(weights > least)
    if len(candidates) < len(weights) // 4:
        border, equal = _border(-scores[candidates], weights[candidates], share * total)
    else:
        border, equal = _border(-scores, weights, share * total)
    weights *= scores >= -border
    weights[np.flatnonzero(scores == -border)[:-equal]] = 0.0


def _keep_typical(weights: Floats, scores: Floats, share: float) -> None:
    """typical_p of one row, [1, vocabulary], in place: equals of the last one stay."""
    keys = _untypical(weights, scores, _whole_sums)
    border, _ = _border(keys[0], weights[0], share * float(weights.sum()))
    weights *= keys <= border


def _untypical(
    weights: AnyFloats, scores: AnyFloats, sums: Callable[[AnyFloats], AnyFloats]
) -> AnyFloats:
    """How far a token's surprise is from the expected one (arXiv 2202.00666).

    weights: exp(scores), [rows, n], 0 where a token is out already.
    """
    total = sums(weights)
    surprise: AnyFloats = np.log(total) - np.maximum(scores, -_NEVER)
    surprise -= sums(weights * surprise) / total
    return np.abs(surprise, out=surprise)


def _padded_sums(values: AnyFloats) -> AnyFloats:
    """[rows, 1], one element after the other: zeros at the end change nothing."""
    sums: AnyFloats = values.cumsum(-1)[:, -1:]
    return sums


def _whole_sums(values: AnyFloats) -> AnyFloats:
    sums: AnyFloats = values.sum(-1, keepdims=True)
    return sums


def _border(keys: AnyFloats, weights: AnyFloats, reach: float) -> tuple[float, int]:
    """The key of the last element that stays, and how many of that key do.

    In ascending order of key an element stays where those before it weigh less than ``reach``.
    """
    while len(keys) > _FEW:
        low, high = float(keys.min()), float(keys.max())
        if not high - low > 1e-30:
            break
        scale = keys.dtype.type(_BINS / min(high - low, _BIN_RANGE))
        bins = np.minimum((keys - keys.dtype.type(low)) * scale, _BINS - 1).astype(np.intp)
        sums = np.bincount(bins, weights, _BINS).cumsum()
        crossed = min(int(sums.searchsorted(reach)), int(bins.max()))
        inside = np.flatnonzero(bins == crossed)
        reach -= sums[crossed - 1] if crossed else 0.0
        keys, weights = keys[inside], weights[inside]
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    before = np.concatenate([[0.0], weights[order].astype(np.float64).cumsum()[:-1]])
    count = max(int(before.searchsorted(reach)), 1)
    border = ordered[count - 1]
    return float(border), count - int(ordered.searchsorted(border))
