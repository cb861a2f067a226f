"""top_k, top_p and typical_p over many rows, and a draw from what they leave.

transformers' formulas: a token stays where those before it in the filter's order hold less than p.
Rows of which few tokens stay are reduced to those first: that they are all is certain with a small
top_k, and with top_p where they hold its share of the whole. For other rows all tokens count, and
only those around the border of a filter are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
AnyFloats = npt.NDArray[np.floating[Any]]

_CHUNK = 64  # tokens of which only the best is looked at first
_FEW = 1024  # most tokens of a row that are all sorted
_LIKELIEST = 128  # tokens, at least, among which top_p is looked for first
_SAMPLE = 256  # tokens of a row that tell where the border of a filter about lies
_AROUND = 16  # of these, on either side, between which it nearly always does
_NEVER = 1e4  # -_NEVER is a score whose exp is 0
_BLOCK = 128  # tokens whose weights are added up before a draw


def rows_of(values: Any, rows: Sequence[int] | Places) -> Any:
    """values[rows], without a copy where these are all; ``rows`` ascend."""
    return values if len(rows) == len(values) else values[rows]


def draw(logits: Floats, top_k: Places, values: Doubles, numbers: Doubles) -> Places:
    """A token of each row.

    logits: [rows, vocabulary]; values: temperature, top_p and typical_p, each [rows]; numbers:
    [rows], from [0, 1).
    """
    few, best, scores = best_tokens(logits, top_k)
    if not len(few):
        return _draw_among_all(logits, top_k, values, numbers)
    tokens = np.empty(len(logits), np.intp)
    scaled = scores / values[0, few].astype(np.float32)[:, None]
    tokens[few] = _draw_among_few(best, scaled, top_k[few], values[:, few], numbers[few])
    if len(few) < len(logits):
        rest = np.setdiff1d(np.arange(len(logits)), few)
        tokens[rest] = _draw_among_all(logits[rest], top_k[rest], values[:, rest], numbers[rest])
    return tokens


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
    logits = rows_of(logits, rows)
    # k chunks have a token as good as the k-th best of the chunks' best ones
    best = logits[:, : chunk * chunks].reshape(len(rows), chunk, chunks).max(1)
    last = chunks - top_k[rows]
    reached = np.partition(best, sorted(set(last.tolist())), axis=-1)[np.arange(len(rows)), last]
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


def keep(
    scores: Doubles, top_k: Places, top_p: Doubles, typical_p: Doubles, least: int = 1
) -> npt.NDArray[np.bool_]:
    """Which of the scores [rows, n] the filters leave, at least ``least`` of each."""
    places, kept, _ = _filtered(scores, top_k, top_p, typical_p, np.zeros(len(scores)), least)
    in_order = np.empty(scores.size, np.bool_)
    in_order[places] = kept
    return in_order.reshape(scores.shape)


def _filtered(
    scores: Doubles,
    top_k: Places,
    top_p: Doubles,
    typical_p: Doubles,
    totals: Doubles,
    least: int = 1,
) -> tuple[Places, npt.NDArray[np.bool_], Doubles]:
    """The scores [rows, n] in descending order: where in the flat scores each is, whether it stays,
    and its weight, exp(score - largest), which is 0 after top_k and top_p for those that do not.

    totals: what the weights of a row sum to where there are more of them than these; else 0.
    """
    rows, size = scores.shape
    begins = np.arange(rows)[:, None] * size
    # of equals the last places come first, as in a stable ascending sort
    places = scores.argsort(-1, kind="stable")[:, ::-1] + begins
    ranked = scores.reshape(-1)[places]
    last = np.where(top_k > 0, np.minimum(np.maximum(top_k, least), size), size) - 1
    kept = ranked >= ranked[np.arange(rows), last][:, None]
    ranked -= ranked[:, :1].copy()
    weights = np.exp(ranked)
    weights *= kept
    if _on(top_p).any():
        before = _before(weights)
        share = np.where(_on(top_p), top_p, np.inf)
        reach = share * np.where(totals > 0.0, totals, before[:, -1])
        out = before[:, :-1] >= reach[:, None]
        out[:, :least] = False
        kept &= ~out
        weights *= kept
    if _on(typical_p).any():
        keys = _untypical(weights, ranked, _padded_sums)
        keys[weights == 0.0] = np.inf
        by_key = keys.argsort(-1, kind="stable")
        before = _before(weights.reshape(-1)[by_key + begins])
        last = (before[:, :-1] < typical_p[:, None] * before[:, -1:]).sum(-1) - 1
        border = keys[np.arange(rows), by_key[np.arange(rows), last]]
        out = (keys > border[:, None]) & _on(typical_p)[:, None]
        np.put_along_axis(out, by_key[:, :least], False, -1)
        kept &= ~out
    return places, kept, weights


def _draw_among_few(
    tokens: Places,
    scores: Floats,
    top_k: Places,
    values: Doubles,
    numbers: Doubles,
    totals: Doubles | None = None,
) -> Places:
    """A token of each row.

    tokens, scores: [rows, n], padded, after the temperature; totals: as in _filtered.
    """
    _, top_p, typical_p = values
    if totals is None:
        totals = np.zeros(len(tokens))
    doubles = scores.astype(np.float64)
    places, kept, ranked = _filtered(doubles, top_k, top_p, typical_p, totals)
    weights = np.empty(doubles.size)
    weights[places] = ranked * kept
    place, _ = _pick(weights.reshape(doubles.shape), numbers)
    return tokens[np.arange(len(tokens)), place]


def _draw_among_all(logits: Floats, top_k: Places, values: Doubles, numbers: Doubles) -> Places:
    """A token of each row of logits [rows, vocabulary]."""
    temperature, top_p, _ = values
    scores, weights = _weights(logits, temperature)
    tokens = np.empty(len(logits), np.intp)
    left = np.ones(len(logits), np.bool_)
    by_share = (top_k == 0) & _on(top_p)
    if by_share.any():
        totals = weights.sum(-1).astype(np.float64)
        reach = top_p * totals
        by_share &= reach <= _LIKELIEST  # a weight is 1 at most
        few, best, largest = best_tokens(scores, np.where(by_share, _LIKELIEST, 0))
        held = np.exp(largest.astype(np.float64)).cumsum(-1)[:, -1] if len(few) else reach[few]
        enough = np.flatnonzero(held >= reach[few])
        if len(enough):
            few, best, largest = few[enough], best[enough], largest[enough]
            tokens[few] = _draw_among_few(
                best, largest, top_k[few], values[:, few], numbers[few], totals[few]
            )
            left[few] = False
    if left.any():
        rest = np.flatnonzero(left)
        tokens[rest] = _draw_widely(
            rows_of(scores, rest),
            rows_of(weights, rest),
            top_k[rest],
            values[:, rest],
            numbers[rest],
        )
    return tokens


def _weights(logits: Floats, temperature: Doubles) -> tuple[Floats, Floats]:
    """Of each row the scores, the largest of them 0, and their exp: both [rows, vocabulary]."""
    if (temperature != 1.0).any():
        scores = logits / temperature.astype(np.float32)[:, None]
        scores -= scores.max(-1, keepdims=True)
    else:
        scores = logits - logits.max(-1, keepdims=True)
    return scores, np.exp(scores)


def _draw_widely(
    scores: Floats, weights: Floats, top_k: Places, values: Doubles, numbers: Doubles
) -> Places:
    """A token of each row. scores, weights: [rows, vocabulary], of _weights; overwritten."""
    _, top_p, typical_p = values
    size = scores.shape[-1]
    for row in np.flatnonzero((top_k > 0) & (top_k < size)):
        least = np.partition(scores[row], size - top_k[row])[size - top_k[row]]
        weights[row] *= scores[row] >= least
        scores[row, scores[row] < least] = -np.inf
    for row in np.flatnonzero(_on(top_p)):
        _keep_likeliest(weights[row], scores[row], top_p[row])
    for row in np.flatnonzero(_on(typical_p)):
        _keep_typical(weights[row : row + 1], scores[row : row + 1], typical_p[row])
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
    likely = weights > np.float32((1.0 - share) * total / len(weights) * 0.999)
    if np.count_nonzero(likely) < len(weights) // 4:
        candidates = np.flatnonzero(likely)
        few = weights[candidates]
        border, equal = _border(-scores[candidates], few, share * total, float(few.sum()))
    else:
        border, equal = _border(-scores, weights, share * total, total)
    weights *= scores >= -border
    weights[np.flatnonzero(scores == -border)[:-equal]] = 0.0


def _keep_typical(weights: Floats, scores: Floats, share: float) -> None:
    """typical_p of one row, [1, vocabulary], in place: equals of the last one stay."""
    keys = _untypical(weights, scores, _whole_sums)
    total = float(weights.sum())
    border, _ = _border(keys[0], weights[0], share * total, total)
    weights *= keys <= border


def _untypical(
    weights: AnyFloats, scores: AnyFloats, sums: Callable[[AnyFloats], AnyFloats]
) -> AnyFloats:
    """How far a token's surprise is from the expected one (arXiv 2202.00666), which is how far its
    score is from the expected score: without the logarithm of a sum, beside which the differences
    of a flat distribution are lost in rounding.

    weights: exp(scores), [rows, n], 0 where a token is out already.
    """
    distance: AnyFloats = np.maximum(scores, -_NEVER)
    distance -= sums(weights * distance) / sums(weights)
    return np.abs(distance, out=distance)


def _padded_sums(values: AnyFloats) -> AnyFloats:
    """[rows, 1], one element after the other: zeros at the end change nothing."""
    sums: AnyFloats = values.cumsum(-1)[:, -1:]
    return sums


def _whole_sums(values: AnyFloats) -> AnyFloats:
    sums: AnyFloats = values.sum(-1, keepdims=True)
    return sums


def _border(keys: AnyFloats, weights: AnyFloats, reach: float, total: float) -> tuple[float, int]:
    """The key of the last element that stays, and how many of that key do.

    In ascending order of key an element stays where those before it weigh less than ``reach``;
    all weigh ``total``.
    """
    while len(keys) > _FEW:
        kept, lighter, total = _around(keys, weights, reach, total)
        if len(kept) == len(keys):  # nearly all are equal
            break
        keys, weights, reach = keys[kept], weights[kept], reach - lighter
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    before = np.concatenate([[0.0], weights[order].astype(np.float64).cumsum()[:-1]])
    count = max(int(before.searchsorted(reach)), 1)
    border = ordered[count - 1]
    return float(border), count - int(ordered.searchsorted(border))


def _around(
    keys: AnyFloats, weights: AnyFloats, reach: float, total: float
) -> tuple[Places, float, float]:
    """Places of all keys in a range in which the border of ``reach`` lies, what those of smaller
    keys weigh, and what these do. A sample tells where to look, exact sums whether it was there."""
    step = len(keys) // _SAMPLE
    sampled = keys[::step].argsort()
    sums = weights[::step][sampled].cumsum(dtype=np.float64)
    at = int(sums.searchsorted(reach / total * sums[-1]))
    low = keys[sampled[at - _AROUND] * step] if at > _AROUND else -np.inf
    high = keys[sampled[at + _AROUND] * step] if at + _AROUND < len(sampled) else np.inf
    below = keys < low
    lighter = float((weights * below).sum())
    if lighter >= reach:
        return np.flatnonzero(below), 0.0, lighter
    inside = np.flatnonzero(~below & (keys <= high))
    between = float(weights[inside].sum())
    if lighter + between < reach:
        above = np.flatnonzero(keys > high)
        if len(above):
            return above, lighter + between, total - lighter - between
    return inside, lighter, between
