"""The queue: turns between clients, bounds, and prompts that nobody waits for any more."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import RequestError
from handler.generation import Generation, GenerationRequest
from handler.tokenizer import ByteTokenizer
from handler.waiting import WaitingPrompts

TOKENIZER = ByteTokenizer()
WAIT = 60


def prompts(*texts: str) -> list[Generation]:
    return [Generation(GenerationRequest(t), TOKENIZER.encode(t), TOKENIZER) for t in texts]


def queue_of(*lists: Sequence[Generation], most: int = 1000) -> WaitingPrompts:
    queue = WaitingPrompts(most)
    for one in lists:
        queue.submit(one)
    return queue


def texts(generations: Sequence[Generation]) -> list[str]:
    return [TOKENIZER.decode(g.prompt_ids) for g in generations]


def taken_one_by_one(queue: WaitingPrompts) -> list[str]:
    return [text for _ in range(len(queue)) for text in texts(queue.take(1))]


# Turns


def test_first_come_first_served() -> None:
    queue = queue_of(prompts("a"), prompts("b"), prompts("c"))
    assert texts(queue.take(2)) == ["a", "b"]
    assert len(queue) == 1
    assert texts(queue.take(5)) == ["c"]
    assert queue.take(1) == []


def test_a_long_list_gives_one_prompt_in_its_turn() -> None:
    queue = queue_of(prompts("a1", "a2", "a3", "a4"), prompts("b"), prompts("c1", "c2"))
    assert texts(queue.take(10)) == ["a1", "b", "c1", "a2", "c2", "a3", "a4"]


def test_turns_are_kept_from_one_call_to_the_next() -> None:
    queue = queue_of(prompts("a1", "a2", "a3"), prompts("b1", "b2"))
    assert texts(queue.take(1)) == ["a1"]
    queue.submit(prompts("c"))
    assert taken_one_by_one(queue) == ["b1", "a2", "c", "b2", "a3"]


@given(
    st.lists(
        st.one_of(
            st.integers(1, 5).map(lambda count: ("take", count)),
            st.integers(1, 5).map(lambda length: ("submit", length)),
        ),
        max_size=30,
    )
)
def test_nobody_is_overtaken_twice(calls: list[tuple[str, int]]) -> None:
    """Between two prompts of one list, every list that waited all the time gave one."""
    queue = WaitingPrompts(1000)
    submitted: list[int] = []  # list -> how many prompts had been taken by then
    taken: list[tuple[int, int]] = []  # (list, place in it)

    def take(count: int) -> None:
        for text in texts(queue.take(count)):
            one, place = map(int, text.split("."))
            taken.append((one, place))

    for call, count in calls:
        if call == "take":
            take(count)
        else:
            queue.submit(prompts(*(f"{len(submitted)}.{k}" for k in range(count))))
            submitted.append(len(taken))
    take(len(queue))
    lengths = [count for call, count in calls if call == "submit"]
    assert sorted(taken) == [(one, k) for one, n in enumerate(lengths) for k in range(n)]
    places = {one: [i for i, (other, _) in enumerate(taken) if other == one] for one, _ in taken}
    for one, own in places.items():
        assert [taken[i][1] for i in own] == sorted(taken[i][1] for i in own)
        for before, after in zip(own, own[1:]):
            for other, theirs in places.items():
                if other != one and submitted[other] <= before and theirs[-1] > after:
                    assert any(before < i < after for i in theirs), (one, other, taken)


def test_what_is_not_accepted_keeps_its_place() -> None:
    queue = queue_of(prompts("long 1", "a"), prompts("b"), prompts("long 2"))
    accepted = queue.take(5, lambda g: not texts([g])[0].startswith("long"))
    assert texts(accepted) == ["b", "a"]
    assert texts(queue.take(5)) == ["long 2", "long 1"]


# Bounds


def test_a_full_queue_refuses_all_of_a_request() -> None:
    queue = queue_of(prompts("a", "b"), most=3)
    with pytest.raises(RequestError, match="2 prompts wait already, allowed are 3") as caught:
        queue.submit(prompts("c", "d"))
    assert "option.max_queue" in str(caught.value)
    assert caught.value.code == 503
    assert texts(queue.take(5)) == ["a", "b"]


def test_a_full_queue_takes_what_fits() -> None:
    queue = queue_of(prompts("a", "b"), most=3)
    queue.submit(prompts("c"))
    queue.take(2)
    queue.submit(prompts("d", "e"))
    assert texts(queue.take(5)) == ["b", "d", "e"]


def test_a_request_that_never_fits_is_bad() -> None:
    with pytest.raises(RequestError, match="4 texts cannot be queued, allowed are 3") as caught:
        WaitingPrompts(3).submit(prompts(*"abcd"))
    assert caught.value.code == 400


def test_nothing_to_queue_queues_nothing() -> None:
    queue = queue_of([], most=1)
    assert len(queue) == 0
    assert queue.take(1) == []
    queue.submit(prompts("a"))
    assert texts(queue.take(1)) == ["a"]


# Prompts that nobody waits for


def test_a_cancelled_prompt_is_never_taken() -> None:
    first, second = prompts("a", "b"), prompts("c")
    queue = queue_of(first, second)
    first[0].future.cancel()
    second[0].future.cancel()
    assert texts(queue.take(5)) == ["b"]
    assert len(queue) == 0


def test_a_cancelled_prompt_gives_its_place_to_the_next() -> None:
    waiting = prompts("a", "b")
    queue = queue_of(waiting, most=2)
    waiting[0].future.cancel()
    queue.submit(prompts("c"))
    with pytest.raises(RequestError):
        queue.submit(prompts("d"))
    assert texts(queue.take(5)) == ["b", "c"]


# Waiting and closing


def test_wait_ends_when_a_prompt_comes() -> None:
    queue, results = WaitingPrompts(5), list[bool]()
    thread = threading.Thread(target=lambda: results.append(queue.wait()))
    thread.start()
    queue.submit(prompts("a"))
    thread.join(WAIT)
    assert results == [True]


def test_closing_refuses_what_waits_and_what_comes() -> None:
    waiting = [*prompts("a", "b"), *prompts("c")]
    queue = queue_of(waiting[:2], waiting[2:])
    assert queue.wait()
    queue.close()
    assert not queue.wait()
    assert not queue.wait()
    for generation in waiting:
        error = generation.future.exception(0)
        assert isinstance(error, RequestError)
        assert error.code == 503
    with pytest.raises(RequestError, match="being unloaded") as caught:
        queue.submit(prompts("d"))
    assert caught.value.code == 503
    queue.close()


def test_closing_ends_a_wait() -> None:
    queue, results = WaitingPrompts(5), list[bool]()
    thread = threading.Thread(target=lambda: results.append(queue.wait()))
    thread.start()
    queue.close()
    thread.join(WAIT)
    assert results == [False]
