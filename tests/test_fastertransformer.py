"""The fastertransformer engine on a double of its wheel (tests/fastertransformer_double)."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from random_checkpoints import write_checkpoint

from handler import engines
from handler.checkpoints.partition import partition
from handler.config import configuration_of
from handler.engines import Model, init_inference
from handler.errors import LoadError, RequestError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import parse_parameters
from handler.responses import Reply, StreamReply
from handler.service import Service

DOUBLE = Path(__file__).with_name("fastertransformer_double")
PROMPTS = ["Write 1999 in words.", "Count from 3 to 9.", "Sort these words: warm, cat, apple"]
# Where token ids are told: the wheel's own object. Triton's tells texts.
OWN, TRITON, STREAMING = "0.21", "triton", "streaming"

WAIT = 120

Start = Callable[..., Model]


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[Any]]]:
    """The double can be imported; gives the calls that it got so far: [name, arguments...]."""
    log = tmp_path / "calls"
    monkeypatch.setenv("FT_DOUBLE_LOG", str(log))
    monkeypatch.syspath_prepend(DOUBLE)
    for name in ("fastertransformer", "fastertransformer._model"):
        sys.modules.pop(name, None)

    def calls() -> list[Any]:
        return [json.loads(line)["call"] for line in log.open()] if log.exists() else []

    yield calls
    for name in ("fastertransformer", "fastertransformer._model"):
        sys.modules.pop(name, None)


@pytest.fixture
def start(wheel: object, demo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    started: list[Model] = []

    def starts(form: str = OWN, model: Path = demo, **options: Any) -> Model:
        monkeypatch.setenv("FT_DOUBLE_FORM", form)
        if form == STREAMING:
            options["enable_streaming"] = True
        started.append(init_inference(str(model), backend="fastertransformer", **options))
        return started[-1]

    yield starts
    for model in started:
        model.close()


@pytest.fixture(scope="module")
def oracle(demo: Path) -> Oracle:
    return Oracle(demo)


@pytest.fixture(scope="module")
def checkpoint(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLAN-T5's form with random weights: it likes ids that stand for no token."""
    return write_checkpoint(tmp_path_factory.mktemp("flan"), "flan-t5", demo, d_kv=32)


def ask(model: Model, prompts: str | list[str], **parameters: Any) -> list[GenerationResult]:
    parsed = parse_parameters(parameters)
    texts = [prompts] if isinstance(prompts, str) else prompts
    return model.generate([GenerationRequest(text, parsed) for text in texts])


def arguments_of(calls: list[Any]) -> dict[str, Any]:
    """Those of the last call."""
    found = calls[-1][-1]
    assert isinstance(found, dict)
    return found


# Texts


@pytest.mark.parametrize("form", [OWN, TRITON, STREAMING])
def test_greedy_texts_are_transformers(start: Start, oracle: Oracle, form: str) -> None:
    expected = [oracle.text(oracle.generate(p, max_new_tokens=60)) for p in PROMPTS]
    assert start(form).pipeline_generate(PROMPTS, max_new_tokens=60) == expected


def test_tokens_are_transformers(start: Start, oracle: Oracle) -> None:
    for prompt, result in zip(PROMPTS, ask(start(), PROMPTS, max_new_tokens=60)):
        assert result.token_ids == oracle.generate(prompt, max_new_tokens=60)
        assert result.finish_reason == "eos_token"
        assert result.log_probs == ()


def test_ids_that_stand_for_no_token_are_never_chosen(start: Start, checkpoint: Path) -> None:
    oracle = Oracle(checkpoint)
    model = start(model=checkpoint)
    for prompt, result in zip(PROMPTS, ask(model, PROMPTS, max_new_tokens=30)):
        assert result.token_ids == oracle.generate(prompt, max_new_tokens=30)


@pytest.mark.parametrize("length_penalty", [-2.0, 1.0, 3.0])
def test_beams_and_the_meaning_of_length_penalty(
    start: Start, checkpoint: Path, length_penalty: float
) -> None:
    oracle, model = Oracle(checkpoint), start(model=checkpoint)
    parameters = {"num_beams": 3, "length_penalty": length_penalty, "max_new_tokens": 12}
    for prompt, result in zip(PROMPTS, ask(model, PROMPTS, **parameters)):
        assert result.token_ids == oracle.generate(prompt, **parameters)


@pytest.mark.parametrize("form", [OWN, TRITON])
def test_repetition_penalty(start: Start, oracle: Oracle, form: str) -> None:
    parameters = {"repetition_penalty": 5.0, "max_new_tokens": 20}
    expected = oracle.text(oracle.generate(PROMPTS[1], **parameters))
    assert start(form).pipeline_generate([PROMPTS[1]], **parameters) == [expected]
    assert expected != oracle.text(oracle.generate(PROMPTS[1], max_new_tokens=20))


@pytest.mark.parametrize("form", [OWN, TRITON])
def test_lengths(start: Start, form: str) -> None:
    model = start(form)
    (short,) = ask(model, PROMPTS[1], max_new_tokens=3)
    assert short.finish_reason == "length"
    (whole,) = ask(model, PROMPTS[0])
    (longer,) = ask(model, PROMPTS[0], min_new_tokens=30, max_new_tokens=40)
    assert len(longer.text) > len(whole.text)
    (longest,) = ask(model, PROMPTS[0], ignore_eos_token=True, max_new_tokens=40)
    if form == OWN:
        assert (len(longest.token_ids), longest.finish_reason) == (40, "length")


# Sampling


@pytest.mark.parametrize("form", [OWN, TRITON])
def test_the_articles_temperature_samples(
    start: Start, wheel: Callable[[], list[Any]], form: str
) -> None:
    """The wheel's own defaults, top_k 1, would not; top_k 0 beside top_p 0 would not either."""
    model = start(form)
    sent = {"temperature": 3.0, "max_new_tokens": 20}
    texts = {model.pipeline_generate([PROMPTS[0]], **sent)[0] for _ in range(8)}
    assert len(texts) > 1
    prefix = "" if form == OWN else "runtime_"
    told = arguments_of(wheel())
    assert (told[f"{prefix}top_k"], told[f"{prefix}top_p"]) == (0, 1.0)
    assert told["temperature"] == 3.0


def test_temperature_0_is_greedy(start: Start, oracle: Oracle) -> None:
    expected = oracle.text(oracle.generate(PROMPTS[0]))
    assert start().pipeline_generate([PROMPTS[0]], temperature=0, top_p=0.9) == [expected]


@pytest.mark.parametrize("form", [OWN, TRITON])
@pytest.mark.parametrize(
    "seed", [7, 2**64 - 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 2**63))]
)
def test_a_seed_alone_decides_the_text(start: Start, form: str, seed: int) -> None:
    model = start(form)
    parameters = {"temperature": 2.0, "seed": seed, "max_new_tokens": 20}
    together = model.pipeline_generate(PROMPTS, **parameters)
    assert together == [model.pipeline_generate([p], **parameters)[0] for p in PROMPTS]


def test_requests_without_a_seed_share_a_call_unless_their_prompts_are_equal(
    start: Start, wheel: Callable[[], list[Any]]
) -> None:
    """The rows of a call draw the same numbers: equal prompts would get equal texts."""
    model = start()
    results = ask(model, [*PROMPTS, PROMPTS[0], PROMPTS[0]], temperature=5.0, max_new_tokens=20)
    calls = wheel()[1:]
    assert [len(call[1]) for call in calls] in ([1, 2, 1, 1], [3, 1, 1])
    assert len({arguments_of([call])["random_seed"] for call in calls}) == len(calls)
    assert len({r.text for r in (results[0], results[3], results[4])}) == 3


def held_call(gate: Path) -> None:
    """Return when the double is in a call that it does not end while the file ``gate`` is there."""
    deadline = time.monotonic() + WAIT
    while not Path(f"{gate}.0").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sampled_requests_of_a_batch_of_djls_share_a_call(
    wheel: Callable[[], list[Any]], demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are told the seed that repeats them."""
    gate = tmp_path / "gate"
    monkeypatch.setenv("FT_DOUBLE_FORM", OWN)
    monkeypatch.setenv("FT_DOUBLE_GATE", str(gate))
    options: dict[str, Any] = {"backend": "fastertransformer", "response_schema": "tgi"}
    service = Service()
    service.load(configuration_of(str(demo), **options))

    def body(text: str, **parameters: Any) -> bytes:
        sampled = {"temperature": 3.0, "max_new_tokens": 20, "details": True, **parameters}
        return json.dumps({"inputs": text, "parameters": sampled}).encode()

    gate.touch()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(service.answer, body("x", max_new_tokens=1))
        held_call(gate)  # so that the others are all there when it ends
        replies = threads.submit(service.answer_batch, list(map(body, PROMPTS)))
        deadline = time.monotonic() + WAIT
        while service.model.waiting < len(PROMPTS):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        gate.unlink()
        assert isinstance(first.result(), Reply)
        answers = [json.loads(reply.body)[0] for reply in replies.result()]
    assert [len(call[1]) for call in wheel()[1:]] == [1, len(PROMPTS)]
    (seed,) = {answer["details"]["seed"] for answer in answers}
    for text, answer in zip(PROMPTS, answers):
        again = service.answer(body(text, seed=seed))
        assert isinstance(again, Reply)
        assert json.loads(again.body)[0]["generated_text"] == answer["generated_text"]
    service.close()


# What the wheel is told


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({}, {"max_seq_len": 200, "top_k": 1, "top_p": 0.0, "len_penalty": 1.0, "beam_width": 1}),
        ({"top_k": 5}, {"top_k": 5, "top_p": 1.0, "temperature": 1.0}),
        ({"top_p": 0.5}, {"top_k": 0, "top_p": 0.5}),
        ({"temperature": 0.1, "top_k": 3}, {"temperature": 0.1, "top_k": 3}),
        ({"seed": 2**64 - 1, "top_p": 0.5}, {"random_seed": -1}),
        ({"seed": 9, "top_p": 0.5}, {"random_seed": 9}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5, "repetition_penalty": None}),
        (
            {"presence_penalty": 0.5, "temperature": 0.25},  # ours is before the division
            {"presence_penalty": 2.0, "temperature": 0.25},
        ),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5, "presence_penalty": None}),
        ({"min_length": 4}, {"min_length": 4}),
        ({"max_tokens": 6, "ignore_eos_token": True}, {"min_length": 6, "max_seq_len": 6}),
        ({"stop": [[4, 5, 6], [1, 3, -1]]}, {"stop_words_list": [[[4, 5, 6], [1, 3, -1]]]}),
        ({"stop": "."}, {"stop_words_list": None}),
    ],
    ids=str,
)
def test_parameters_as_the_wheel_names_them(
    start: Start, wheel: Callable[[], list[Any]], sent: dict[str, Any], told: dict[str, Any]
) -> None:
    ask(start(), PROMPTS[0], **sent)
    arguments = arguments_of(wheel())
    assert {name: arguments.get(name) for name in told} == told


def test_bad_words_as_the_wheel_has_them(start: Start, wheel: Callable[[], list[Any]]) -> None:
    """Beside the ids that stand for no token; once a row."""
    model = start()
    ask(model, PROMPTS[:1] * 2, bad_words_list=[[[4, 5, 6], [2, 3, -1]]])
    padding = list(range(model.tokenizer.size, 640))
    ids, ends = arguments_of(wheel())["bad_words_list"][-1]
    assert ids == [4, 5, 6, *padding]
    assert ends == [2, *range(3, 4 + len(padding)), -1]


def test_requests_that_differ_are_not_mixed(start: Start) -> None:
    model = start()
    each = [{"max_new_tokens": 4}, {"num_beams": 2}, {"seed": 3, "temperature": 2.0}, {}]
    requests = [GenerationRequest(PROMPTS[0], parse_parameters(p)) for p in each]
    assert model.generate(requests) == [model.generate([request])[0] for request in requests]


# Stop sequences and bad words


@pytest.mark.parametrize("form", [OWN, TRITON, STREAMING])
def test_a_stop_sequence_cuts_the_text(start: Start, form: str) -> None:
    model = start(form)
    (whole,) = ask(model, PROMPTS[1])
    (cut,) = ask(model, PROMPTS[1], stop=[", 6"])
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(", 6")], "stop_sequence")


def test_stop_ids_end_the_call(start: Start, wheel: Callable[[], list[Any]]) -> None:
    model = start()
    (whole,) = ask(model, PROMPTS[1])
    stop = list(whole.token_ids[4:6])
    (cut,) = ask(model, PROMPTS[1], stop=[stop, [2, -1]])
    assert cut.token_ids == whole.token_ids[:6]
    assert cut.finish_reason == "stop_sequence"


def test_bad_words_are_never_generated(start: Start) -> None:
    model = start()
    (free,) = ask(model, PROMPTS[1])
    (bound,) = ask(model, PROMPTS[1], bad_words_list=["5"])
    assert "5" in free.text
    assert "5" not in bound.text


# Streams


def test_pieces_of_a_stream_join_to_the_text(start: Start) -> None:
    model = start(STREAMING)
    for parameters in ({}, {"stop": [", 6"]}, {"max_new_tokens": 3}):
        (whole,) = ask(model, PROMPTS[1], **parameters)
        events = list(
            model.stream_generate(GenerationRequest(PROMPTS[1], parse_parameters(parameters)))
        )
        assert len(events) > 2
        assert "".join(event.text for event in events) == whole.text
        assert events[-1].result == whole


def test_a_stream_of_the_wheels_own_object_tells_tokens(start: Start) -> None:
    model = start()
    events = list(model.stream_generate(GenerationRequest(PROMPTS[1])))
    result = events[-1].result
    assert result is not None
    assert tuple(event.token_id for event in events) == result.token_ids
    assert "".join(event.text for event in events) == result.text


@pytest.mark.parametrize("form", [OWN, STREAMING])
def test_a_stream_as_clients_get_it(
    wheel: object, demo: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Triton tells no tokens: their ids and log-probabilities are null."""
    monkeypatch.setenv("FT_DOUBLE_FORM", form)
    service = Service()
    service.load(
        configuration_of(str(demo), backend="fastertransformer", enable_streaming=form == STREAMING)
    )
    answer = service.answer(json.dumps({"inputs": PROMPTS[1], "stream": True}).encode())
    assert isinstance(answer, StreamReply)
    records = [json.loads(line) for line in b"".join(answer.stream).splitlines()]
    service.close()
    assert "".join(r["token"]["text"] for r in records) == records[-1]["generated_text"]
    assert len(records) > 2
    assert {r["token"]["log_prob"] for r in records} == {None}
    assert ({r["token"]["id"] for r in records} == {None}) == (form == STREAMING)


# Refused requests


@pytest.mark.parametrize(
    ("form", "parameters", "words"),
    [
        (OWN, {"typical_p": 0.5}, "'typical_p' is not supported by backend fastertransformer"),
        (OWN, {"return_log_probs": True}, "'return_log_probs' is not supported"),
        (OWN, {"early_stopping": True}, "'early_stopping' is not supported"),
        (OWN, {"num_beams": 2, "n": 2}, "'num_return_sequences' is not supported"),
        (OWN, {"presence_penalty": 1, "repetition_penalty": 2}, "cannot be combined by backend"),
        (OWN, {"num_beams": 2, "top_p": 0.5}, "'num_beams' must be 1 when the request samples"),
        (OWN, {"top_k": 1025}, "'top_k' must be at most 1024 on backend fastertransformer"),
        (OWN, {"bad_words_list": [[[99999], [1]]]}, "'bad_words_list' must hold words of this"),
        (TRITON, {"details": True}, "'details' is not supported"),
        (TRITON, {"truncate": True}, "'truncate' is not supported"),
        (TRITON, {"bad_words_list": ["a"]}, "'bad_words_list' is not supported"),
        (TRITON, {"stop": [[4], [1]]}, "'stop_sequences' must be texts"),
        (STREAMING, {"num_beams": 2}, "must be 1 with option.enable_streaming=true"),
    ],
    ids=str,
)
def test_what_the_wheel_cannot_do_is_refused_by_name(
    start: Start, form: str, parameters: dict[str, Any], words: str
) -> None:
    model = start(form)
    with pytest.raises(RequestError) as caught:
        ask(model, PROMPTS[0], **parameters)
    assert words in str(caught.value)
    assert caught.value.code == 400
    assert len(ask(model, PROMPTS[0])) == 1


# Loading


@pytest.mark.parametrize(
    ("variant", "changes", "options", "words"),
    [
        ("mt5", {}, {}, "model type mt5 is not served by backend fastertransformer, only t5"),
        ("umt5", {}, {}, "model type umt5 is not served"),
        ("flan-t5", {}, {"dtype": "int8"}, "option.dtype=int8 is not supported"),
        ("flan-t5", {}, {"dtype": "int4"}, "option.dtype=int4 is not supported"),
        ("flan-t5", {}, {"merge_adapter": "x"}, "option.merge_adapter=x is not supported"),
        ("odd", {}, {}, "relative_attention_max_distance is 50"),
        ("flan-t5", {"layer_norm_epsilon": 1e-5}, {}, "layer_norm_epsilon is 1e-05"),
        ("flan-t5", {"feed_forward_proj": "gelu"}, {}, "feed_forward_proj is gelu"),
        ("flan-t5", {"d_kv": 40}, {}, "d_kv is 40, FasterTransformer computes with 32, 48, 64"),
        (
            "flan-t5",
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            {},
            "set tie_word_embeddings to false",
        ),
        ("flan-t5", {}, {"tensor_parallel_degree": 2}, "needs 2 MPI ranks with this"),
        ("flan-t5", {}, {"enable_streaming": True}, "option.enable_streaming=true needs Triton"),
    ],
    ids=str,
)
def test_what_would_fail_or_answer_wrong_is_refused_before_it_is_loaded(
    start: Start,
    wheel: Callable[[], list[Any]],
    demo: Path,
    tmp_path: Path,
    variant: str,
    changes: dict[str, Any],
    options: dict[str, Any],
    words: str,
) -> None:
    folder = write_checkpoint(tmp_path / "model", variant, demo, **{"d_kv": 32, **changes})
    with pytest.raises(LoadError) as caught:
        start(model=folder, **options)
    assert words in str(caught.value)
    assert wheel() == []


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tensor_parallel_degree": 3}, "does not divide num_heads=4"),
        ({"tensor_parallel_degree": 1, "pipeline_parallel_degree": 4}, "num_layers 2 is not"),
        (
            {"tensor_parallel_degree": 4, "pipeline_parallel_degree": 2},
            "tensor_parallel_degree x pipeline_parallel_degree=8 does not divide num_heads=4",
        ),
        ({"tensor_parallel_degree": "many"}, 'must be an integer of at least 1, or "max"'),
    ],
    ids=str,
)
def test_degrees_that_do_not_divide_the_network(
    start: Start, checkpoint: Path, degrees: dict[str, Any], words: str
) -> None:
    with pytest.raises(LoadError) as caught:
        start(TRITON, model=checkpoint, **degrees)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "degrees"),
    [
        ({"num_heads": 6}, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, {}),
    ],
    ids=str,
)
def test_what_the_wheel_itself_would_convert_wrong_is_served_when_it_was_partitioned(
    start: Start, demo: Path, tmp_path: Path, changes: dict[str, Any], degrees: dict[str, int]
) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_kv=32, **changes)
    with pytest.raises(LoadError):
        start(TRITON, model=source, **degrees)
    folder = tmp_path / "out"
    told = configuration_of(str(source), model_path_on_host=str(folder), **degrees)
    partition(told, "fastertransformer", folder)
    shutil.copy(source / "model.safetensors", folder)  # what the double computes with
    assert len(ask(start(TRITON, model=folder, **degrees), PROMPTS)) == len(PROMPTS)


def test_triton_takes_several_gpus_without_mpi(start: Start) -> None:
    assert start(TRITON, tensor_parallel_degree="2").pipeline_generate([PROMPTS[0]]) != [""]


def test_max_is_the_gpus_that_are_given(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    start(TRITON, tensor_parallel_degree="max")
    with pytest.raises(LoadError, match="needs 8 GPUs, there are 4"):
        start(TRITON, tensor_parallel_degree=4, pipeline_parallel_degree=2)


def test_what_the_wheel_itself_refuses_is_told(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_DOUBLE_FAIL", "0:load")
    with pytest.raises(LoadError, match=r"could not be loaded by fastertransformer.*CUDA error"):
        start()


def test_without_the_wheel(demo: Path) -> None:
    with pytest.raises(LoadError, match="needs the package fastertransformer, which only"):
        init_inference(str(demo), backend="fastertransformer")


# fp16


@pytest.fixture(scope="module")
def wide(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as FLAN-T5 large."""
    folder = tmp_path_factory.mktemp("wide")
    return write_checkpoint(folder, "flan-t5", demo, d_model=1024, d_kv=32, num_layers=1)


def test_fp16_on_a_wide_gated_model_is_warned_about(
    start: Start, wide: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = start(model=wide, dtype="fp16")
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("handler.engines.f")]
    assert warning == model.quality_warning
    assert "set option.dtype to bf16 or fp32" in warning
    for dtype in ("bf16", "fp32", "auto"):
        assert start(model=wide, dtype=dtype).quality_warning is None


def test_strict_dtype_refuses_it(start: Start, wide: Path, checkpoint: Path) -> None:
    with pytest.raises(LoadError, match=r"option\.dtype=fp16 spoils the answers"):
        start(model=wide, dtype="fp16", strict_dtype=True)
    assert start(model=checkpoint, dtype="fp16", strict_dtype=True).quality_warning is None


# Which engine

# 2023's torch is too old for backend torch.
OTHER_ON_GPU = "torch" if sys.version_info >= (3, 10) else "transformers"


@pytest.mark.parametrize(
    ("there_is_a_gpu", "options", "expected"),
    [
        (True, {}, "fastertransformer"),
        (True, {"dtype": "bf16"}, "fastertransformer"),
        (True, {"dtype": "fp16"}, OTHER_ON_GPU),  # which keeps what wo reads in fp32
        (True, {"dtype": "int8"}, OTHER_ON_GPU),
        (False, {}, "onnxruntime" if sys.version_info >= (3, 10) else "transformers"),
    ],
    ids=str,
)
def test_auto_takes_it_where_it_answers_right(
    wheel: object,
    wide: Path,
    monkeypatch: pytest.MonkeyPatch,
    there_is_a_gpu: bool,
    options: dict[str, str],
    expected: str,
) -> None:
    monkeypatch.setattr(engines, "gpu_is_there", lambda: there_is_a_gpu)
    configuration = configuration_of(str(wide), **options)
    assert engines.choose_backend(configuration, wide)[0] == expected


def test_auto_takes_it_under_mpi(
    wheel: object, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as the one rank of a job, and whatever else would be taken without a GPU."""
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert engines.choose_backend(configuration_of(str(wide)), wide)[0] == "fastertransformer"


def test_auto_does_not_take_it_without_the_wheel(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "gpu_is_there", lambda: True)
    assert engines.choose_backend(configuration_of(str(wide)), wide)[0] == OTHER_ON_GPU
