"""A step that begins before the last one's tokens are known: what the scheduler makes of it.

AheadEngine stands for a device. That the real one gives the same answers, test_scheduler.py and
test_tensor_parallel.py show.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_scheduler import (
    EchoEngine,
    answer,
    error_of,
    generation,
    generations,
    parts_between_steps,
    raising,
    scheduler_of,
)

from handler.generation import TokenEvent
from handler.sampling import Chosen, HostSampler, choose_tokens


class AheadEngine(EchoEngine):
    """The same on a device: a token is known there when it is chosen, and here when it is told."""

    runs_ahead = True

    def __init__(self, *arguments: int, **named: int) -> None:
        super().__init__(*arguments, **named)
        self.sampler = LateSampler(self)
        self.chosen: list[int] = []
        self._done = 0  # steps

    def decode(self, n: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """A row that is over may run once more; it must not be listened to."""
        assert max(positions) < self.max_output_tokens
        known = tokens.copy()
        over = []
        for row, (token, position) in enumerate(zip(tokens[:, 0].tolist(), positions.tolist())):
            if token < 0:
                known[row] = self.chosen[-1 - token]
                text = self._rows[row]
                if position == len(text) or known[row] == text[position] != text[position - 1]:
                    over.append(row)
        for row in over:
            known[row], positions[row] = self.decoder_start_token_id, 0
        logits = super().decode(n, known, positions)
        logits[over] = np.eye(self.tokenizer.size)[ord("?") + 3] * 20
        return logits

    def wait(self) -> None:
        self._called("wait", None)
        self._done = self.calls["decode"]

    def now(self) -> float:
        """A step takes time where it is waited for."""
        return self.seconds_of_a_step * self._done + self.seconds_of_a_part * self.calls["part"]


class LateSampler(HostSampler):
    def __init__(self, engine: AheadEngine) -> None:
        self._engine = engine

    def choose(self, logits: np.ndarray, *arguments: Any) -> Callable[[], Chosen]:
        engine, logits = self._engine, logits.copy()
        engine.chosen = logits.argmax(-1).tolist()
        engine._called("choose", len(logits))
        step = engine.calls["decode"]

        def tell() -> Chosen:
            engine._called("tell", len(logits))
            engine._done = max(engine._done, step)
            return choose_tokens(logits, *arguments)

        return tell


def calls(engine: EchoEngine) -> str:
    """d, c, t: a step begins, its tokens are chosen, and told."""
    return "".join(call[0] for call, _ in engine.log if call in ("decode", "choose", "tell"))


def test_a_step_begins_before_the_last_tokens_are_told() -> None:
    engine = AheadEngine()
    with scheduler_of(engine) as scheduler:
        sent = generation("12345", max_new_tokens=5)
        scheduler.submit([sent])
        assert answer(sent) == "12345"
    # none after the longest text's end, which is known before
    assert calls(engine) == "d" + "cdt" * 4 + "ct"


def test_a_row_that_has_ended_runs_once_more_for_nothing() -> None:
    engine = AheadEngine()
    long, short = generations("long" * 5, "short")
    with scheduler_of(engine) as scheduler:
        scheduler.submit([short, long])
        assert [answer(short), answer(long)] == ["short", "long" * 5]
    assert engine.of("decode") == [2] * 7 + [1] * 15
    # of its last step too, as the logits lie: a device would have to be told which rows are wanted
    assert engine.of("choose") == engine.of("tell") == [2] * 7 + [1] * 14


def test_who_listens_hears_nothing_of_that() -> None:
    engine = AheadEngine()
    events: list[TokenEvent] = []
    cancelled, other = generation("1" * 50, events.append), generation("2" * 20)
    with scheduler_of(engine) as scheduler:
        engine.before("choose", 10, cancelled.future.cancel)
        scheduler.submit([cancelled, other])
        assert answer(other) == "2" * 20
    assert [event.text for event in events] == ["1"] * 9


def test_what_was_chosen_counts_where_the_next_step_fails() -> None:
    """The step that begins before it is told."""
    engine = AheadEngine()
    done, hit = generation("1234", max_new_tokens=4), generation("12345678")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 5, raising(RuntimeError("no such kernel")))
        scheduler.submit([done, hit])
        assert error_of(hit).code == 424
        assert answer(done) == "1234"
    assert hit.token_ids == done.token_ids


def test_no_step_is_kept_for_rows_that_have_all_ended() -> None:
    """Its logits may be memory of the device, and what was asked for hangs on it."""
    engine = AheadEngine()
    with scheduler_of(engine) as scheduler:
        sent = generation("12345")
        scheduler.submit([sent])
        assert answer(sent) == "12345"
    assert engine.of("decode") == [1] * 7  # the last one for nothing
    kept = weakref.ref(sent)
    del sent
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_everyone_gets_an_answer_of_their_own(max_rows: int, parts: int) -> None:
    """Some end by </s>, some by their length, some by a stop sequence."""
    engine = AheadEngine(max_rows, encode_tokens=12, parts=parts)
    ends: list[dict[str, Any]] = [{}, {"max_new_tokens": 3}, {"stop_sequences": ("4", "x")}]
    sent = [generation("1234" * (1 + n % 7), **ends[n % 3]) for n in range(60)]
    expected = ["1234" * (1 + n % 7) if n % 3 == 0 else "123" for n in range(60)]
    with scheduler_of(engine) as scheduler:
        for first in range(0, 60, 5):
            scheduler.submit(sent[first : first + 5])
        assert [answer(g) for g in sent] == expected
    assert max(engine.of("decode")) <= max_rows
    assert Counter(engine.calls)["encode"] > 0


def test_a_row_that_has_ended_stays_within_the_engines_limit() -> None:
    """Its longest answer, beside one that goes on."""
    engine = AheadEngine()
    engine.max_output_tokens = 12
    first, second = (generation("1234567890abcdef", max_new_tokens=12) for _ in range(2))
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 3, lambda: scheduler.submit([second]))
        scheduler.submit([first])
        assert [answer(first), answer(second)] == ["1234567890ab"] * 2


def test_who_joins_has_the_next_step() -> None:
    engine = AheadEngine()
    long, short = generations("l" * 200, "s")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 50, lambda: scheduler.submit([short]))
        scheduler.submit([long])
        assert [answer(long), answer(short)] == ["l" * 200, "s"]
    assert engine.of("decode") == [1] * 50 + [2] * 3 + [1] * (200 - 53)


@pytest.mark.parametrize(("seconds_of_a_part", "most"), [(20.0, 1), (10.0, 1), (4.0, 3)])
def test_rows_that_run_wait_for_about_one_step(seconds_of_a_part: float, most: int) -> None:
    """What a step still takes when encoding begins is a part of that step's 10 s."""
    parts = parts_between_steps(AheadEngine(max_rows=8, parts=5), seconds_of_a_part)
    assert sum(parts) == 20 * 6
    assert {count for count in parts if count} == {most}


@pytest.mark.parametrize("nth", range(3, 8))
def test_a_cancelled_row_is_free_at_the_step_after_the_next(nth: int) -> None:
    engine = AheadEngine(max_rows=3)
    first, second, third, fourth = generations("first" * 5, "second" * 5, "third" * 5, "fourth")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", nth, first.future.cancel)
        scheduler.submit([first, second, third, fourth])
        others = [answer(second), answer(third), answer(fourth)]
    assert others == ["second" * 5, "third" * 5, "fourth"]
    assert engine.of("move")[0] == (2, 0)
    assert engine.of("decode")[: nth + 1] == [3] * (nth + 1)


def test_all_rows_cancelled_at_once() -> None:
    engine = AheadEngine(max_rows=4)
    sent, after = generations(*("text" * 5 for _ in range(4))), generation("after")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 6, lambda: [g.future.cancel() for g in sent])
        scheduler.submit([*sent, after])
        assert answer(after) == "after"


@pytest.mark.parametrize(
    ("call", "nth"), [("wait", 1), *((c, n) for c in ("decode", "choose", "tell") for n in (2, 9))]
)
def test_a_failure_hits_the_rows_that_run(call: str, nth: int) -> None:
    engine = AheadEngine(max_rows=4, parts=2)
    hit, after = generations("one" * 9, "two" * 9), generations("after", "that")
    with scheduler_of(engine) as scheduler:
        engine.before(call, nth, raising(RuntimeError("no such kernel")))
        scheduler.submit(hit)
        assert {error_of(g).code for g in hit} == {424}
        scheduler.submit(after)
        assert [answer(g) for g in after] == ["after", "that"]
