"""What ``generate`` gets beside its own: the penalties and forms that transformers does not have,
and what notices that a text has ended or cannot go on.

They are called at every step with all rows; the beams of a generation lie beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from handler.generation import Generation, not_a_number, nothing_left

if TYPE_CHECKING:
    import torch

    from handler.guided import Guide

# The score of </s> where no token is left: transformers cannot choose among none. No real score is
# as low, also when it is divided by a temperature or by a power of a length.
_HOPELESS = -1e30


class CountPenalties:
    """presence_penalty and frequency_penalty of each row, as OpenAI's API and vLLM define them."""

    def __init__(self, batch: Sequence[Generation], device: torch.device) -> None:
        import torch

        parameters = [g.parameters for g in batch for _ in range(g.rows)]
        values = [(p.presence_penalty, p.frequency_penalty) for p in parameters]
        self._presence: torch.Tensor
        self._frequency: torch.Tensor
        self._presence, self._frequency = torch.tensor(values, device=device).T[:, :, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: [rows, steps + 1], the decoder's start token, which is not counted, first."""
        import torch

        generated = input_ids[:, 1:]
        ones = torch.ones_like(generated, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, generated, ones)
        scores = scores - self._frequency * counts
        return scores - self._presence * (counts > 0)


class _Place(NamedTuple):
    """Where a text is in its form, and the tokens that may come next."""

    guide: Guide
    allowed: frozenset[int]


class Forms:
    """regex and choices of each generation.

    forced: the steps at which the checkpoint's rules choose the token, which is then no part of the
    form.
    """

    def __init__(self, batch: Sequence[Generation], forced: frozenset[int]) -> None:
        self._batch = batch
        self._forced = forced
        self._places: list[dict[tuple[int, ...], _Place]] = [{} for _ in batch]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        places: list[dict[tuple[int, ...], _Place]] = [{} for _ in self._batch]
        for row, ids in enumerate(input_ids[:, 1:].tolist()):
            item = row // self._batch[0].rows
            generation = self._batch[item]
            if generation.guide is None or generation.done:
                continue
            place = places[item][tuple(ids)] = self._next(item, generation.guide, ids)
            if len(ids) not in self._forced:
                left = sorted(place.allowed)
                allowed = scores[row, left]
                scores[row] = -torch.inf
                scores[row, left] = allowed
        self._places = places
        return scores

    def _next(self, item: int, beginning: Guide, ids: list[int]) -> _Place:
        guide = beginning.fork()
        if ids:
            before = self._places[item].get(tuple(ids[:-1]))
            if before is None or self._batch[item].continuation.is_over(ids):
                return _Place(guide, frozenset())  # goes on only beside others that do
            guide = before.guide.fork()
            if ids[-1] in before.allowed:
                guide.append(ids[-1])
        return _Place(guide, frozenset(guide.allowed().tolist()))


class OneTextEach:
    """Fails a generation of one text that has no token left, or whose logits are no numbers.

    Its neighbours in the batch go on.
    """

    def __init__(self, batch: Sequence[Generation]) -> None:
        self._batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, best in enumerate(scores.amax(-1).tolist()):
            if not math.isfinite(best):
                step = input_ids.shape[1] - 1
                lost = nothing_left(step) if best == -math.inf else not_a_number()
                self._batch[row].fail(lost)
                scores[row] = 0.0
        return scores


class BeamRules:
    """Which beams can go on, and which texts of a search are real.

    Where a rule forbids a text, transformers gives it a score of -inf but may still go on with it,
    or fill an answer with it; so may it with the end of a text that has ended already.

    ended: of each generation the texts that ended, and whether they were among the best beams.
    nothing_after: generation -> the step at which it had no token left.
    """

    def __init__(self, batch: Sequence[Generation], eos_token_id: int) -> None:
        self.ended: list[dict[tuple[int, ...], bool]] = [{} for _ in batch]
        self.nothing_after: dict[int, int] = {}
        self._batch = batch
        self._eos_token_id = eos_token_id
        self._rows: dict[tuple[int, ...], int] = {}
        self._scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        beams = self._batch[0].rows
        texts = input_ids[:, 1:].tolist()
        if self._scores is None:  # all begin alike: the first beam alone goes on
            alive = [row % beams == 0 for row in range(len(texts))]
        else:
            alive = [
                possible and tuple(text) not in self.ended[row // beams]
                for row, (text, possible) in enumerate(zip(texts, self.possible(texts)))
            ]
        scores[[row for row, lives in enumerate(alive) if not lives]] = -torch.inf
        best = scores.amax(-1).view(-1, beams).tolist()
        for item, generation in enumerate(self._batch):
            if not all(number < math.inf for number in best[item]):  # NaN is not less
                generation.fail(not_a_number())
            elif max(best[item]) > -math.inf:
                continue
            self.nothing_after.setdefault(item, len(texts[0]))
            rows = slice(item * beams, (item + 1) * beams)
            scores[rows] = -torch.inf
            scores[rows, self._eos_token_id] = _HOPELESS
        self._rows = {(row // beams, *text): row for row, text in enumerate(texts) if alive[row]}
        self._scores = scores
        return scores

    def is_real(self, item: int, text: tuple[int, ...]) -> bool:
        """Whether this is a text that the search of a generation found."""
        return self.ended[item].get(text, False) or (bool(text) and not sees_every_end())

    def possible(self, texts: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each text is a beam of the last step and a token that was allowed after it."""
        assert self._scores is not None
        each = len(texts) // len(self._batch)
        parents = [self._rows.get((i // each, *text[:-1]), -1) for i, text in enumerate(texts)]
        scores = self._scores[parents, [text[-1] for text in texts]].tolist()
        return [parent >= 0 and score > _HOPELESS for parent, score in zip(parents, scores)]


class BeamEnds:
    """A stopping criterion: ends single beams, and a search that nobody waits for.

    Where not ``sees_every_end``, only the latter: a stop sequence then cuts a text when the search
    is over.
    """

    def __init__(self, batch: Sequence[Generation], rules: BeamRules) -> None:
        self._batch = batch
        self._rules = rules

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: [candidates of all generations, steps + 1], a generation's best ones first."""
        import torch

        if not sees_every_end():
            every = all(generation.done for generation in self._batch)
            return torch.full(input_ids.shape[:1], every, device=input_ids.device)
        texts = input_ids[:, 1:].tolist()
        each = len(texts) // len(self._batch)
        done = []
        for row, (text, possible) in enumerate(zip(texts, self._rules.possible(texts))):
            item, place = divmod(row, each)
            generation = self._batch[item]
            over = generation.continuation.is_over(text)
            if over and possible:
                among_the_best = place < generation.rows
                self._rules.ended[item].setdefault(tuple(text), among_the_best)
            done.append(over or generation.done or item in self._rules.nothing_after)
        return torch.tensor(done, device=input_ids.device)


def sees_every_end() -> bool:
    """Whether transformers' beam search asks stopping criteria about each text: the older one, to
    4.49, asks only whether to stop as a whole."""
    from transformers import GenerationMixin

    return hasattr(GenerationMixin, "_update_finished_beams")
