"""In-flight batching: who joins and leaves when, and what a failing engine does to whom.

What runs is either the real engine on a small checkpoint, or one that answers each prompt with
itself and does, before any of its calls, what a test has planned for it.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from oracle import Oracle
from step_engines import assert_same, open_engine, run_ahead

from handler.engines.onnx_t5.sessions import open_session, use_threads
from handler.engines.protocol import Sampler, StepEngine
from handler.errors import RequestError
from handler.generation import (
    Generation,
    GenerationRequest,
    GenerationResult,
    ScoreRequest,
    TokenEvent,
)
from handler.inference import Model
from handler.machine import usable_cpus
from handler.parameters import GenerationParameters, parse_parameters
from handler.sampling import HostSampler
from handler.scheduler import Scheduler
from handler.tokenizer import ByteTokenizer, Tokenizer

WAIT = 60


class Handle(list[int]):
    """A prompt that was read."""

    @property
    def nbytes(self) -> int:
        return len(self)


class EchoEngine:
    """Answers a prompt with itself. Refuses tokens and positions that do not belong to a row.

    log: its calls in their order. parts: what ``encode`` does before the prompts are ready.
    """

    tokenizer: Tokenizer = ByteTokenizer()
    sampler: Sampler = HostSampler()
    runs_ahead = False
    decoder_start_token_id = 0
    max_input_tokens = max_output_tokens = 300
    seconds_of_a_step = seconds_of_a_part = 0.0

    def __init__(self, max_rows: int = 2, encode_tokens: int = 1, parts: int = 0) -> None:
        self.max_rows = max_rows
        self.quality_warning = None
        self.encode_tokens = encode_tokens
        self.parts = parts
        self.log: list[tuple[str, Any]] = []
        self.closed = False
        self._rows: dict[int, list[int]] = {}
        self._planned: dict[tuple[str, int], Callable[[], object]] = {}
        self.calls: Counter[str] = Counter()

    def before(self, call: str, nth: int, action: Callable[[], object]) -> None:
        """Do this, on the engine's thread, before the nth call (of encode, part, attach, ...)."""
        self._planned[call, nth] = action

    def of(self, call: str) -> list[Any]:
        """What these calls were about."""
        return [about for name, about in self.log if name == call]

    def encode(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[list[int]] | None]:
        self._called("encode", [self.tokenizer.decode(prompt) for prompt in prompts])
        return self._parts_of(prompts)

    def _parts_of(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[list[int]] | None]:
        for part in range(self.parts):
            self._called("part", part)
            yield None
        self._called("part", self.parts)
        yield [Handle(prompt) for prompt in prompts]

    def attach(self, handle: list[int], row: int) -> None:
        self._called("attach", row)
        self._rows[row] = handle

    def decode(self, n: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self._called("decode", n)
        assert tokens.shape == (n, 1)
        logits = np.zeros((n, 1, self.tokenizer.size), np.float32)
        for row, (token, position) in enumerate(zip(tokens[:, 0], positions)):
            text = self._rows[row]
            assert token == (text[position - 1] if position else self.decoder_start_token_id)
            logits[row, 0, text[position]] = 10.0
        return logits

    def move(self, src: int, dst: int) -> None:
        self._called("move", (src, dst))
        self._rows[dst] = self._rows[src]

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def now(self) -> float:
        """The scheduler's clock. Where it stands still, each step is followed by one part."""
        return (
            self.seconds_of_a_step * self.calls["decode"]
            + self.seconds_of_a_part * self.calls["part"]
        )

    def _called(self, call: str, about: object) -> None:
        self.log.append((call, about))
        self.calls[call] += 1
        self._planned.pop((call, self.calls[call]), lambda: None)()


def generation(
    text: str, on_event: Callable[[TokenEvent], None] | None = None, **parameters: Any
) -> Generation:
    request = GenerationRequest(text, GenerationParameters(**parameters))
    tokenizer = EchoEngine.tokenizer
    return Generation(request, tokenizer.encode(text), tokenizer, on_event=on_event)


def generations(*texts: str) -> list[Generation]:
    return [generation(text) for text in texts]


def answer(generation: Generation) -> str:
    return generation.future.result(WAIT).text


def result_of(generation: Generation) -> GenerationResult | None:
    """None where it was cancelled."""
    try:
        return generation.future.result(WAIT)
    except CancelledError:
        return None


def error_of(generation: Generation) -> RequestError:
    error = generation.future.exception(WAIT)
    assert isinstance(error, RequestError)
    return error


@contextmanager
def scheduler_of(engine: StepEngine, max_queue: int = 1000) -> Iterator[Scheduler]:
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(engine, EchoEngine):
            patch.setattr("handler.scheduler.perf_counter", engine.now)
        scheduler = Scheduler(engine, max_queue)
        try:
            yield scheduler
        finally:
            closing = threading.Thread(target=scheduler.close, daemon=True)
            closing.start()
            closing.join(WAIT)
    assert not closing.is_alive(), "it hangs"
    assert not isinstance(engine, EchoEngine) or engine.closed


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# Joining and leaving


@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("encode_tokens", [1, 12, 1000])
@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_everyone_gets_an_answer_of_their_own(
    max_rows: int, encode_tokens: int, parts: int
) -> None:
    engine = EchoEngine(max_rows, encode_tokens, parts)
    texts = ["", *(str(n) * (1 + n % 7) for n in range(1, 60))]
    sent = generations(*texts)
    with scheduler_of(engine) as scheduler:
        for first in range(0, 60, 5):
            scheduler.submit(sent[first : first + 5])
        assert [answer(g) for g in sent] == texts
    assert max(engine.of("decode")) <= max_rows
    assert Counter(text for texts in engine.of("encode") for text in texts) == Counter(
        answer(g) for g in sent
    )


def test_a_prompt_joins_at_the_next_step_and_a_short_one_is_done_first() -> None:
    engine, done = EchoEngine(), list[str]()
    long, short = generations("l" * 200, "s")
    for one in (long, short):
        one.future.add_done_callback(lambda future: done.append(future.result().text[0]))
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 50, lambda: scheduler.submit([short]))
        scheduler.submit([long])
        assert answer(long) == "l" * 200
    assert done == ["s", "l"]
    assert engine.of("decode") == [1] * 50 + [2] * 2 + [1] * (200 - 52)


@pytest.mark.parametrize(("seconds_of_a_part", "most"), [(20.0, 1), (10.0, 1), (4.0, 3)])
def test_rows_that_run_wait_for_about_one_step(seconds_of_a_part: float, most: int) -> None:
    """Encoding between two steps takes as long as a step of 10 s, and ends the part it is in."""
    parts = parts_between_steps(EchoEngine(max_rows=8, parts=5), seconds_of_a_part)
    assert sum(parts) == 20 * 6
    assert max(parts) == most


def parts_between_steps(engine: EchoEngine, seconds_of_a_part: float) -> list[int]:
    """How many, of 20 prompts of 6 parts that come while one row runs steps of 10 s."""
    engine.seconds_of_a_step, engine.seconds_of_a_part = 10.0, seconds_of_a_part
    sent = generations("first" * 40, *(f"prompt {n}" for n in range(20)))
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 1, lambda: scheduler.submit(sent[1:]))
        scheduler.submit(sent[:1])
        assert answer(sent[0]) == "first" * 40
    calls = "".join(call[0] for call, _ in engine.log if call in ("part", "decode"))
    running = calls[calls.index("d") :].strip("d")
    return [len(parts) for parts in running.split("d")]


@pytest.mark.parametrize(("seconds_of_a_part", "together"), [(0.01, 16), (0.11, 2), (9.0, 1)])
def test_where_nothing_ran_prompts_begin_together(seconds_of_a_part: float, together: int) -> None:
    """They gather for half a second; a prompt here takes two parts."""
    engine = EchoEngine(max_rows=16, encode_tokens=1, parts=1)
    engine.seconds_of_a_part = seconds_of_a_part
    sent = generations(*("text" * 5 for _ in range(20)))
    with scheduler_of(engine) as scheduler:
        scheduler.submit(sent)
        assert [answer(g) for g in sent] == ["text" * 5] * 20
    assert engine.of("decode")[0] == together


def test_prompts_are_encoded_together_up_to_the_engines_limit() -> None:
    engine = EchoEngine(max_rows=16, encode_tokens=12)
    held = generations("held" * 5)
    sent = generations("12345", "123", "1234", "12", "more than the limit", "1", "2", "3")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 1, lambda: [scheduler.submit(sent[:4]), scheduler.submit(sent[4:])])
        scheduler.submit(held)
        assert [answer(g) for g in sent] == [
            EchoEngine.tokenizer.decode(g.prompt_ids) for g in sent
        ]
    # in turn, "123" is the third; with the closing token a text has one more
    assert engine.of("encode") == [
        ["held" * 5],
        ["12345"],
        ["more than the limit"],
        ["123", "1", "1234"],
        ["2", "12", "3"],
    ]


def test_a_clients_long_list_does_not_hold_up_a_single_prompt() -> None:
    engine = EchoEngine(max_rows=2)
    many, single = generations(*(f"one of many {n}" for n in range(50))), generation("single")
    encoded_before, done_before = list[int](), list[int]()
    single.future.add_done_callback(lambda _: done_before.append(sum(g.done for g in many)))
    with scheduler_of(engine) as scheduler:

        def send() -> None:
            encoded_before.append(len(engine.of("encode")))
            scheduler.submit([single])

        engine.before("decode", 5, send)
        scheduler.submit(many)
        assert answer(single) == "single"
        assert [answer(g) for g in many] == [f"one of many {n}" for n in range(50)]
    assert engine.of("encode").index(["single"]) <= encoded_before[0] + 1
    assert done_before[0] <= 3


def test_it_tells_how_many_wait_and_run() -> None:
    engine, seen = EchoEngine(max_rows=2), list[tuple[int, int]]()
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 4, lambda: seen.append((scheduler.running, scheduler.waiting)))
        sent = generations("abcdefgh", "abcdefgh", "c", "d", "e")
        scheduler.submit(sent)
        assert [answer(g) for g in sent[2:]] == ["c", "d", "e"]
    assert seen == [(2, 3)]
    assert (scheduler.running, scheduler.waiting) == (0, 0)


# Cancelling


def test_a_cancelled_row_is_free_at_the_next_step() -> None:
    engine = EchoEngine(max_rows=3)
    first, second, third = generations("first" * 5, "second" * 5, "third" * 5)
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 7, first.future.cancel)
        scheduler.submit([first, second, third])
        assert [answer(second), answer(third)] == ["second" * 5, "third" * 5]
    assert engine.of("decode")[:8] == [3, 3, 3, 3, 3, 3, 3, 2]
    assert engine.of("move")[0] == (2, 0)


def test_a_waiting_prompt_takes_the_row_of_a_cancelled_one() -> None:
    engine = EchoEngine(max_rows=1)
    first, second = generations("first" * 20, "second")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 5, first.future.cancel)
        scheduler.submit([first, second])
        assert answer(second) == "second"
    assert len(engine.of("decode")) == 5 + len("second") + 1


def test_all_rows_cancelled_at_once() -> None:
    engine = EchoEngine(max_rows=4)
    sent, after = generations(*("text" * 5 for _ in range(4))), generation("after")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 6, lambda: [g.future.cancel() for g in sent])
        scheduler.submit([*sent, after])
        assert answer(after) == "after"
    assert len(engine.of("decode")) == 6 + len("after") + 1
    assert engine.of("move") == []


def test_a_prompt_cancelled_while_it_waits_is_never_encoded() -> None:
    engine = EchoEngine(max_rows=1)
    first, second, third = generations("first", "second", "third")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 3, second.future.cancel)
        scheduler.submit([first, second, third])
        assert answer(third) == "third"
    assert engine.of("encode") == [["first"], ["third"]]


@pytest.mark.parametrize("part", [1, 3])
def test_a_prompt_cancelled_while_it_is_encoded_is_dropped(part: int) -> None:
    engine = EchoEngine(parts=2)
    first, second = generations("first", "second")
    with scheduler_of(engine) as scheduler:
        engine.before("part", part, first.future.cancel)
        scheduler.submit([first, second])
        assert answer(second) == "second"
    assert engine.of("part") == [*range(part), 0, 1, 2]
    assert engine.of("attach") == [0]
    assert len(engine.of("decode")) == len("second") + 1


def test_one_of_several_cancelled_while_they_are_encoded() -> None:
    engine = EchoEngine(max_rows=4, encode_tokens=1000, parts=2)
    sent = generations("a", "b", "c")
    with scheduler_of(engine) as scheduler:
        engine.before("part", 2, sent[1].future.cancel)
        scheduler.submit(sent)
        assert [answer(sent[0]), answer(sent[2])] == ["a", "c"]
    assert engine.of("attach") == [0, 1]


# A failing engine

boom = raising(RuntimeError("boom\nline"))


@pytest.mark.parametrize(
    ("call", "nth"), [("encode", 2), ("part", 4), ("part", 5), ("part", 6), ("attach", 2)]
)
def test_a_failure_before_decoding_hits_its_own_prompt(call: str, nth: int) -> None:
    engine = EchoEngine(max_rows=4, parts=2)
    running, hit, waiting = generations("running" * 5, "hit", "waiting")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 1, lambda: scheduler.submit([hit, waiting]))
        engine.before(call, nth, boom)
        scheduler.submit([running])
        assert str(error_of(hit)) == "the engine failed: RuntimeError: boom line"
        assert error_of(hit).code == 424
        assert [answer(running), answer(waiting)] == ["running" * 5, "waiting"]


def test_a_failing_encoding_hits_all_that_are_encoded_together() -> None:
    engine = EchoEngine(max_rows=8, encode_tokens=1000, parts=2)
    running, hit, after = generation("running" * 5), generations("a", "b"), generation("after")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 1, lambda: scheduler.submit(hit))
        engine.before("part", 5, boom)
        scheduler.submit([running])
        assert [error_of(g).code for g in hit] == [424, 424]
        scheduler.submit([after])
        assert [answer(running), answer(after)] == ["running" * 5, "after"]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_row_that_cannot_be_attached_is_nobody_elses_matter(nth: int) -> None:
    engine = EchoEngine(max_rows=8, encode_tokens=1000)
    sent = generations("aaa", "bbb", "ccc")
    with scheduler_of(engine) as scheduler:
        engine.before("attach", nth, boom)
        scheduler.submit(sent)
        assert error_of(sent.pop(nth - 1)).code == 424
        assert len({answer(g) for g in sent}) == 2


def test_a_failing_step_hits_the_rows_that_run() -> None:
    engine = EchoEngine(max_rows=4, parts=2)
    hit, encoding = generations("one" * 9, "two" * 9), generation("encoding")
    after = generation("after")
    with scheduler_of(engine) as scheduler:
        engine.before("decode", 1, lambda: scheduler.submit([encoding]))
        engine.before("part", 8, lambda: engine.before("decode", engine.calls["decode"] + 1, boom))
        scheduler.submit(hit)
        assert [error_of(g).code for g in hit] == [424, 424]
        scheduler.submit([after])
        assert [answer(encoding), answer(after)] == ["encoding", "after"]
    assert max(engine.of("decode")) == 2


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failing_move_hits_the_row_that_moves(failures: int) -> None:
    engine = EchoEngine(max_rows=4)
    sent = generations("short", "second" * 5, "third" * 5, "fourth" * 5)
    after = generation("after")
    with scheduler_of(engine) as scheduler:
        for nth in range(failures):
            engine.before("move", nth + 1, boom)
        scheduler.submit(sent)
        hit = sent[-failures:]
        assert [error_of(g).code for g in hit] == [424] * failures
        scheduler.submit([after])
        assert answer(after) == "after"
        assert [answer(g) for g in sent[:-failures]] == [
            EchoEngine.tokenizer.decode(g.prompt_ids) for g in sent[:-failures]
        ]


def test_a_client_that_cannot_be_told_is_nobody_elses_matter() -> None:
    engine = EchoEngine(max_rows=4)

    def gone(event: TokenEvent) -> None:
        raise ConnectionError("the event loop is closed")

    hit, others = generation("hit" * 5, on_event=gone), generations("one" * 5, "two" * 5)
    with scheduler_of(engine) as scheduler:
        scheduler.submit([others[0], hit, others[1]])
        assert [answer(g) for g in others] == ["one" * 5, "two" * 5]
        assert error_of(hit).code == 424


def _ort_out_of_memory() -> Exception:
    """As ONNX Runtime itself reports it, for a buffer that no machine has."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    shape = helper.make_tensor_value_info("shape", TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])], "g", [x, shape], [y]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    use_threads(usable_cpus())
    session = open_session(model.SerializeToString())
    with pytest.raises(Exception, match="allocate") as caught:
        session.run(None, {"x": np.ones(1, np.float32), "shape": np.array([1 << 29, 1 << 29])})
    return caught.value


def _numpy_out_of_memory() -> Exception:
    with pytest.raises(MemoryError) as caught:
        np.ones((1 << 29, 1 << 29))
    return caught.value


@pytest.mark.parametrize("call", ["encode", "part", "attach", "decode"])
@pytest.mark.parametrize("failure", [_ort_out_of_memory, _numpy_out_of_memory, MemoryError])
def test_out_of_memory_is_507(failure: Callable[[], Exception], call: str) -> None:
    engine = EchoEngine()
    hit, after = generations("hit", "after")
    with scheduler_of(engine) as scheduler:
        engine.before(call, 1, raising(failure()))
        scheduler.submit([hit])
        error = error_of(hit)
        assert error.code == 507
        assert "option.max_rows" in str(error)
        scheduler.submit([after])
        assert answer(after) == "after"


@pytest.mark.parametrize("call", ["encode", "part", "attach", "decode", "move"])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_nothing_that_an_engine_raises_ends_the_service(error: BaseException, call: str) -> None:
    engine = EchoEngine()
    sent, after = generations("a", "bb" * 5), generation("after")
    with scheduler_of(engine) as scheduler:
        engine.before(call, 1, raising(error))
        scheduler.submit(sent)
        assert any(g.future.exception(WAIT) for g in sent)
        scheduler.submit([after])
        assert answer(after) == "after"


# The queue, and the end


def test_a_full_queue_refuses_all_of_a_request() -> None:
    engine, refused = EchoEngine(max_rows=1), list[RequestError]()
    running, waiting, late = generation("running"), generations("a", "b"), generations("c", "d")

    def send() -> None:
        scheduler.submit(waiting)
        with pytest.raises(RequestError, match=r"2 prompts wait .* 3 \(option.max_queue\)") as e:
            scheduler.submit(late)
        refused.append(e.value)
        scheduler.submit(late[:1])

    with scheduler_of(engine, max_queue=3) as scheduler:
        engine.before("decode", 2, send)
        scheduler.submit([running])
        assert [answer(g) for g in (running, *waiting, late[0])] == ["running", "a", "b", "c"]
    assert [error.code for error in refused] == [503]
    assert len(engine.of("encode")) == 4


def test_closing_finishes_what_runs_and_refuses_what_waits() -> None:
    engine = EchoEngine(max_rows=2, parts=3)
    running, encoding, waiting, late = generations("running" * 9, "encoding", "waiting", "late")
    scheduler = Scheduler(engine, 10)
    closing = threading.Thread(target=scheduler.close)

    def close() -> None:
        closing.start()
        error_of(waiting)

    engine.before("decode", 1, lambda: scheduler.submit([encoding, waiting]))
    engine.before("part", 5, close)
    scheduler.submit([running])
    assert error_of(waiting).code == 503
    closing.join(WAIT)
    assert not closing.is_alive()
    assert engine.closed
    assert [g.future.result(0).text for g in (running, encoding)] == ["running" * 9, "encoding"]
    with pytest.raises(RequestError, match="being unloaded") as caught:
        scheduler.submit([late])
    assert caught.value.code == 503
    scheduler.close()


def test_what_runs_is_cancelled_when_python_ends() -> None:
    """Every text of a request, and so the request."""
    engine = EchoEngine()
    scheduler = Scheduler(engine, 10)
    model = Model(scheduler, backend="", max_input_tokens=300, max_output_tokens=300)
    ending = threading.Thread(target=scheduler.abandon)
    asked: Future[Future[GenerationResult]] = Future()

    def end() -> None:
        ending.start()
        with pytest.raises(CancelledError):
            asked.result(WAIT).result(WAIT)

    engine.before("decode", 3, end)
    asked.set_result(model.submit([ScoreRequest("text", ("text", "text"))])[0])
    with pytest.raises(CancelledError):
        asked.result().result(WAIT)
    ending.join(WAIT)
    assert engine.closed


def test_closing_with_nothing_to_do() -> None:
    engine = EchoEngine()
    with scheduler_of(engine):
        pass
    assert engine.log == []


# The real engine


class Scripted:
    """The real engine; what a script says is done between its steps, on its own thread.

    A script is a list of actions, and of numbers of steps to wait between them.
    """

    max_rows: int

    def __init__(self, engine: StepEngine) -> None:
        self.inner: Any = engine
        self._script: deque[Callable[[], object] | int] = deque()
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, *arguments: Any) -> Any:
        with self._lock:
            if self._script and isinstance(self._script[0], int):
                self._script[0] -= 1
            self.go_on()
        return self.inner.decode(*arguments)

    def close(self) -> None:
        """The next test needs it."""

    def write(self, script: Sequence[Callable[[], object] | int]) -> None:
        with self._lock:
            self._script = deque(script)

    def go_on(self, *, skip: bool = False) -> bool:
        """Do what is due, and with ``skip`` what comes after the next wait; False at the end."""
        with self._lock:
            if skip and self._script and isinstance(self._script[0], int):
                self._script[0] = 0
            while self._script:
                due = self._script[0]
                if isinstance(due, int):
                    if due > 0:
                        break
                    self._script.popleft()
                else:
                    self._script.popleft()
                    due()
            return bool(self._script)


class Bench:
    """A real engine of four rows, and what each request is answered when it is alone."""

    def __init__(self, backend: str, engine: StepEngine) -> None:
        self.backend, self.engine = backend, Scripted(engine)
        self._alone: dict[GenerationRequest, GenerationResult] = {}

    def generation(self, request: GenerationRequest) -> Generation:
        tokenizer = self.engine.tokenizer
        return Generation(request, tokenizer.encode(request.input), tokenizer)

    def alone(self, request: GenerationRequest) -> GenerationResult:
        if request not in self._alone:
            one = self.generation(request)
            with scheduler_of(self.engine) as scheduler:
                scheduler.submit([one])
                self._alone[request] = one.future.result(WAIT)
        return self._alone[request]


@pytest.fixture(
    scope="module",
    params=["onnxruntime", pytest.param("torch", marks=pytest.mark.long), "torch, ahead"],
)
def bench(request: pytest.FixtureRequest, oracle_of: Callable[[str], Oracle]) -> Iterator[Bench]:
    limits = {"max_rows": 4, "max_input_tokens": 200, "max_output_tokens": 200}
    backend, *ahead = request.param.split(", ")
    engine = open_engine(backend, oracle_of("flan-t5").folder, **limits)
    if ahead:
        run_ahead(engine)
    yield Bench(backend, engine)
    engine.close()


PROMPTS = [
    "",
    "x",
    "a b c",
    "Write 7 in words.",
    "Count from 3 to 9.",
    "Sort these: " + "cat, " * 40,
]
requests = st.builds(
    lambda text, values: GenerationRequest(text, parse_parameters(json.loads(values))),
    st.sampled_from(PROMPTS),
    st.sampled_from(
        [
            '{"max_new_tokens": 1}',
            '{"max_new_tokens": 7}',
            '{"max_new_tokens": 14}',
            '{"max_new_tokens": 9, "ignore_eos_token": true}',
            '{"max_new_tokens": 14, "min_new_tokens": 10}',
            '{"max_new_tokens": 14, "stop": "e"}',
            '{"max_new_tokens": 8, "temperature": 2.0, "seed": 1}',
            '{"max_new_tokens": 12, "temperature": 1.1, "top_k": 9, "seed": 2}',
            '{"max_new_tokens": 5, "top_p": 0.9, "seed": 3}',
            '{"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2}',
            '{"max_new_tokens": 6, "num_beams": 4, "do_sample": true, "seed": 4}',
        ]
    ),
)
scripts = st.lists(
    st.one_of(
        st.lists(requests, min_size=1, max_size=6).map(lambda sent: ("send", sent)),
        st.integers(1, 8).map(lambda steps: ("wait", steps)),
        st.integers(0, 30).map(lambda which: ("cancel", which)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts)
def test_no_schedule_changes_an_answer(bench: Bench, script: list[tuple[str, Any]]) -> None:
    play(bench, script)


@pytest.mark.long
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts)
def test_none_of_many_schedules_changes_one(bench: Bench, script: list[tuple[str, Any]]) -> None:
    play(bench, script)


def play(bench: Bench, script: list[tuple[str, Any]]) -> None:
    """Whoever joins, leaves and cancels when: the same tokens and log-probabilities as alone."""
    expected = {
        request: bench.alone(request)
        for action, sent in script
        if action == "send"
        for request in sent
    }
    sent: list[tuple[GenerationRequest, Generation]] = []

    def send(wanted: Sequence[GenerationRequest]) -> None:
        pairs = [(request, bench.generation(request)) for request in wanted]
        sent.extend(pairs)
        scheduler.submit([generation for _, generation in pairs])

    def cancel(which: int) -> None:
        if sent:
            sent[which % len(sent)][1].future.cancel()

    actions: dict[str, Callable[[Any], None]] = {"send": send, "cancel": cancel}
    with scheduler_of(bench.engine) as scheduler:
        bench.engine.write(
            [
                about if action == "wait" else partial(actions[action], about)
                for action, about in script
            ]
        )
        more = bench.engine.go_on()
        while more:  # what the script does while nothing runs is done here
            for _, generation in list(sent):
                result_of(generation)
            more = bench.engine.go_on(skip=True)
        for request, generation in sent:
            result = result_of(generation)
            if result is not None:
                assert_same(bench.backend, [result], [expected[request]])


def test_a_short_answer_overtakes_a_long_one(bench: Bench) -> None:
    parameters = [{"max_new_tokens": n, "ignore_eos_token": True} for n in (200, 2)]
    long, short = (
        bench.generation(GenerationRequest("x", parse_parameters(p))) for p in parameters
    )
    with scheduler_of(bench.engine) as scheduler:
        bench.engine.write([20, lambda: scheduler.submit([short])])
        scheduler.submit([long])
        assert len(short.future.result(WAIT).token_ids) == 2
        assert not long.done
        assert len(long.future.result(WAIT).token_ids) == 200


def test_the_engine_takes_its_own_limits(bench: Bench) -> None:
    """The longest prompt and the longest answer, in every row."""
    tokenizer = bench.engine.tokenizer
    text = next(text for n in range(500) if len(tokenizer.encode(text := "a" + " cat" * n)) >= 199)
    parameters = parse_parameters({"max_new_tokens": 200, "ignore_eos_token": True})
    request = GenerationRequest(text, parameters)
    sent = [bench.generation(request) for _ in range(5)]
    with scheduler_of(bench.engine) as scheduler:
        scheduler.submit(sent)
        results = [g.future.result(WAIT) for g in sent]
    assert {r.token_ids for r in results} == {results[0].token_ids}
    assert len(results[0].token_ids) == 200
