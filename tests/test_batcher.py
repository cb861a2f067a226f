"""Who runs with whom, what a failing engine does, and what a full queue does."""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from handler import batcher as batcher_module
from handler.batcher import Batcher, Lockstep
from handler.errors import RequestError
from handler.generation import Generation, GenerationRequest
from handler.parameters import GenerationParameters
from handler.ranks import World
from handler.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
WAIT = 60


class OutOfMemoryError(RuntimeError):
    """As torch.cuda names its own."""


class GatedEngine:
    """Answers a prompt with itself, each batch when told to."""

    name = "gated"
    tokenizer = TOKENIZER
    max_rows = 4
    quality_warning = None
    scores = False
    draws_seeds = False
    supported_parameters = frozenset({"max_new_tokens", "temperature", "do_sample", "num_beams"})

    def __init__(self, failure: BaseException | None = None) -> None:
        self.gate = threading.Semaphore(0)
        self.started = threading.Semaphore(0)
        self.batches: list[list[str]] = []
        self.closed = False
        self._failure = failure

    def batch_key(self, generation: Generation) -> Hashable | None:
        p = generation.parameters
        return None if p.samples else p.max_new_tokens

    def generate(self, batch: Sequence[Generation]) -> None:
        self.batches.append([TOKENIZER.decode(g.prompt_ids) for g in batch])
        self.started.release()
        assert self.gate.acquire(timeout=WAIT)
        if self._failure is not None:
            raise self._failure
        for generation in batch:
            for token_id in generation.prompt_ids:
                if generation.done or generation.append(token_id, 0.0):
                    break

    def close(self) -> None:
        self.closed = True


def generation(text: str, **parameters: object) -> Generation:
    request = GenerationRequest(text, GenerationParameters(**parameters))  # type: ignore[arg-type]
    return Generation(request, TOKENIZER.encode(text), TOKENIZER)


@contextmanager
def batcher_of(engine: GatedEngine, max_queue: int = 100) -> Iterator[Batcher]:
    batcher = Batcher(engine, max_queue)
    try:
        yield batcher
    finally:
        for _ in range(100):
            engine.gate.release()
        batcher.close()
    assert engine.closed


def occupied(engine: GatedEngine, batcher: Batcher) -> Generation:
    """Let a first request run, so that what comes next waits."""
    first = generation("first")
    batcher.submit([first])
    assert engine.started.acquire(timeout=WAIT)
    return first


def test_equal_requests_run_together_in_their_order_up_to_max_rows() -> None:
    engine = GatedEngine()
    with batcher_of(engine) as batcher:
        occupied(engine, batcher)
        waiting = [generation(text) for text in "abcdef"]
        batcher.submit([waiting[0], generation("other", max_new_tokens=7), *waiting[1:]])
        for _ in range(100):
            engine.gate.release()
        assert [g.future.result(WAIT).text for g in waiting] == list("abcdef")
    assert engine.batches == [["first"], list("abcd"), ["other"], ["e", "f"]]


def test_what_has_no_key_runs_alone() -> None:
    engine = GatedEngine()
    with batcher_of(engine) as batcher:
        occupied(engine, batcher)
        batcher.submit([generation(text, do_sample=True) for text in "ab"])
    assert ["a", "b"] not in engine.batches


def test_beams_count_as_rows() -> None:
    engine = GatedEngine()
    with batcher_of(engine) as batcher:
        occupied(engine, batcher)
        waiting = [generation(text, num_beams=2) for text in "abc"]
        batcher.submit(waiting)
        for _ in range(100):
            engine.gate.release()
        [g.future.result(WAIT) for g in waiting]
    assert engine.batches[1:] == [["a", "b"], ["c"]]


def test_a_request_waits_until_its_batch_begins() -> None:
    engine = GatedEngine()
    with batcher_of(engine) as batcher:
        first = occupied(engine, batcher)
        waiting = generation("waiting", max_new_tokens=7)
        batcher.submit([waiting])
        engine.gate.release()
        first.future.result(WAIT)
        engine.gate.release()
        assert waiting.future.result(WAIT).timing.waited > 0


def test_a_cancelled_request_never_runs() -> None:
    engine = GatedEngine()
    with batcher_of(engine) as batcher:
        occupied(engine, batcher)
        kept, dropped = generation("kept"), generation("dropped")
        batcher.submit([dropped, kept])
        dropped.future.cancel()
        for _ in range(100):
            engine.gate.release()
        assert kept.future.result(WAIT).text == "kept"
    assert engine.batches == [["first"], ["kept"]]


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (RuntimeError("boom\nline"), 424, "the engine failed: RuntimeError: boom line"),
        (MemoryError("big"), 507, "option.max_rows"),
        (OutOfMemoryError("CUDA"), 507, "option.max_rows"),
        (RequestError("too odd", 400), 400, "too odd"),
        (SystemExit(3), 424, "SystemExit"),
    ],
)
def test_a_failing_engine_fails_its_batch_and_serves_on(
    failure: BaseException, code: int, words: str
) -> None:
    engine = GatedEngine(failure)
    with batcher_of(engine) as batcher:
        first = occupied(engine, batcher)
        engine.gate.release()
        error = first.future.exception(WAIT)
        assert isinstance(error, RequestError)
        assert error.code == code
        assert words in str(error)
        engine._failure = None
        after = generation("after")
        batcher.submit([after])
        engine.gate.release()
        assert after.future.result(WAIT).text == "after"


def test_a_full_queue_refuses_all_of_a_request() -> None:
    engine = GatedEngine()
    with batcher_of(engine, max_queue=3) as batcher:
        occupied(engine, batcher)
        waiting = [generation(text) for text in "ab"]
        batcher.submit(waiting)
        with pytest.raises(RequestError, match="2 prompts wait already") as caught:
            batcher.submit([generation("c"), generation("d")])
        assert caught.value.code == 503
        assert batcher.waiting == 2
        waiting[0].future.cancel()  # its place is free at once
        batcher.submit([generation("c"), generation("d")])


def test_a_request_that_never_fits_is_bad() -> None:
    engine = GatedEngine()
    with batcher_of(engine, max_queue=3) as batcher:
        with pytest.raises(
            RequestError, match=r"4 texts .*allowed are 3 \(option.max_queue\)"
        ) as e:
            batcher.submit([generation(text) for text in "abcd"])
        assert e.value.code == 400


def test_closing_finishes_what_runs_and_fails_what_waits() -> None:
    engine = GatedEngine()
    batcher = Batcher(engine, 10)
    running, waiting = occupied(engine, batcher), generation("waiting")
    batcher.submit([waiting])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    error = waiting.future.exception(WAIT)  # else it could be taken before
    engine.gate.release()
    closing.join(WAIT)
    assert running.future.result(0).text == "first"
    assert isinstance(error, RequestError)
    assert error.code == 503
    with pytest.raises(RequestError, match="being unloaded"):
        batcher.submit([generation("late")])


# One rank of several


def lockstep(engine: GatedEngine) -> Lockstep:
    for _ in range(100):
        engine.gate.release()
    return Lockstep(engine, 100, World(1, 2), random.Random(5))


def test_nothing_runs_before_a_call_is_complete() -> None:
    """And then the batches follow from what was submitted alone."""
    engine = GatedEngine()
    batcher = lockstep(engine)
    sent = [generation(text) for text in "abcdef"]
    batcher.submit(sent[:1])
    batcher.submit([generation("other", max_new_tokens=7)])
    batcher.submit(sent[1:])
    assert engine.batches == []
    batcher.run_submitted()
    assert [g.future.result(0).text for g in sent] == list("abcdef")
    assert engine.batches == [["a", "b", "c", "d"], ["other"], ["e", "f"]]
    batcher.close()
    assert engine.closed


def test_ranks_draw_equal_seeds() -> None:
    first, second = (lockstep(GatedEngine()) for _ in range(2))
    assert [first.new_seed() for _ in range(3)] == [second.new_seed() for _ in range(3)]


def test_a_rank_runs_in_the_thread_that_calls() -> None:
    threads = []

    class Noting(GatedEngine):
        def generate(self, batch: Sequence[Generation]) -> None:
            threads.append(threading.current_thread())
            super().generate(batch)

    batcher = lockstep(Noting())
    batcher.submit([generation("a")])
    batcher.run_submitted()
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize(
    ("failure", "ends"), [(RuntimeError("NCCL"), True), (RequestError("refused"), False)], ids=str
)
def test_a_rank_whose_engine_fails_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, ends: bool
) -> None:
    """A refused request is refused by all of them."""
    ended: list[BaseException] = []
    monkeypatch.setattr(batcher_module, "end_job", lambda world, error: ended.append(error))
    batcher = lockstep(GatedEngine(failure))
    batcher.submit([generation("a")])
    batcher.run_submitted()
    assert ended == ([failure] if ends else [])
