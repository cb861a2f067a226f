"""The Python API: texts in, texts out; results; streams; closing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.engines import Model, init_inference
from handler.engines.onnx_t5.engine import OnnxT5StepEngine
from handler.errors import LoadError, RequestError
from handler.generation import GenerationRequest, GenerationResult, TokenEvent
from handler.parameter_limits import ParameterLimits
from handler.parameters import parse_parameters

PROMPTS = [
    "Write 7 in words.",
    "Which day is 3 days after Monday?",
    "Sort these words: warm, cat, apple",
    "Count from 3 to 9.",
]
WAIT = 60
# At some milliseconds a step, many minutes: nobody waits for its end.
ENDLESS = 1_000_000


def request_of(prompt: str, **parameters: Any) -> GenerationRequest:
    return GenerationRequest(prompt, parse_parameters(parameters))


@pytest.fixture(scope="module")
def patient(demo: Path) -> Iterator[Model]:
    """A model of one row that may run for ever."""
    model = init_inference(
        str(demo), backend="transformers", max_rows=1, max_output_tokens=ENDLESS, max_queue=3
    )
    yield model
    model.close()


def endless_request(**parameters: Any) -> GenerationRequest:
    parameters = {"ignore_eos_token": True, "max_new_tokens": ENDLESS, **parameters}
    limits = ParameterLimits(max_output_tokens=ENDLESS)
    return GenerationRequest("x", parse_parameters(parameters, limits))


# pipeline_generate


def test_texts_come_back_in_their_order(model: Model) -> None:
    answers = model.pipeline_generate(PROMPTS)
    assert answers == [model.pipeline_generate([prompt])[0] for prompt in PROMPTS]
    assert len(set(answers)) == len(PROMPTS)
    assert model.pipeline_generate(PROMPTS[::-1]) == answers[::-1]


def test_no_texts_are_no_answers(model: Model) -> None:
    assert model.pipeline_generate([]) == []


def test_more_texts_than_rows(model: Model) -> None:
    many = PROMPTS * model.limits.max_rows
    assert model.pipeline_generate(many) == model.pipeline_generate(PROMPTS) * model.limits.max_rows


def test_parameters_under_fastertransformers_names(model: Model) -> None:
    theirs = model.pipeline_generate(PROMPTS, max_seq_len=4, runtime_top_k=5, random_seed=1)
    ours = model.pipeline_generate(PROMPTS, max_new_tokens=4, top_k=5, seed=1)
    assert theirs == ours


def test_the_full_text_begins_with_the_input(model: Model) -> None:
    texts = model.pipeline_generate(PROMPTS)
    full = model.pipeline_generate(PROMPTS, return_full_text=True)
    assert full == [prompt + text for prompt, text in zip(PROMPTS, texts)]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temprature": 1}, "did you mean 'temperature'?"),
        ({"top_p": 2}, "'top_p' must be a number from 0 to 1, got 2"),
        ({"max_new_tokens": 513}, r"at most 512 \(option.max_output_tokens\), got 513"),
        ({"num_beams": 17}, r"at most 16 \(option.max_rows\), got 17"),
    ],
    ids=str,
)
def test_wrong_parameters(model: Model, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        model.pipeline_generate(PROMPTS, **parameters)
    assert caught.value.code == 400


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("ab", "inputs must be a list of strings, got 'ab'"),
        ([7], "the input must be a string, got 7"),
        (["ok", "\ud800"], r"inputs\[1\]: the input holds half a surrogate pair"),
        ([" "], "must not be empty or blank"),
    ],
)
def test_wrong_inputs(model: Model, inputs: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        model.pipeline_generate(inputs)


def test_limits_hold_for_requests_made_in_python(model: Model) -> None:
    with pytest.raises(RequestError, match=r"at most 512 \(option.max_output_tokens\)"):
        model.generate([endless_request()])


# generate


def test_each_request_has_its_own_parameters(model: Model) -> None:
    requests = [
        request_of(PROMPTS[0]),
        request_of(PROMPTS[1], max_new_tokens=2),
        request_of(PROMPTS[2], min_new_tokens=30),
        request_of(PROMPTS[3], temperature=2.0, seed=7),
    ]
    together = model.generate(requests)
    alone = [model.generate([request])[0] for request in requests]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert len(together[1].token_ids) == 2
    assert len(together[2].token_ids) >= 30


def test_a_result_tells_how_it_came_about(model: Model) -> None:
    (result,) = model.generate([request_of(PROMPTS[0])])
    tokenizer = model.tokenizer
    assert result.text == tokenizer.decode(result.token_ids)
    assert result.token_ids[-1] == tokenizer.eos_token_id
    assert result.finish_reason == "eos_token"
    assert result.input_tokens == len(tokenizer.encode(PROMPTS[0]))
    assert not result.truncated
    assert len(result.log_probs) == len(result.token_ids)
    assert all(log_prob <= 0 for log_prob in result.log_probs)


def test_a_request_that_wants_no_log_probs_is_answered_the_same_beside_others(
    model: Model,
) -> None:
    wanted = [request_of(PROMPTS[0]), request_of(PROMPTS[1], temperature=2.0, seed=7)]
    unwanted = [replace(request, log_probs=False) for request in wanted]
    results = model.generate([*wanted, *unwanted])
    assert [replace(r, log_probs=()) for r in results[:2]] == results[2:]
    assert all(r.log_probs for r in results[:2])


def test_one_bad_request_is_named_and_none_runs(model: Model) -> None:
    bad = request_of("word " * 2000)
    with pytest.raises(RequestError, match=r"^inputs\[2\]: the input has \d+ tokens"):
        model.generate([request_of(PROMPTS[0]), request_of(PROMPTS[1]), bad])
    assert model.waiting == model.running == 0


def test_threads_get_their_own_answers(model: Model) -> None:
    prompts = [f"Write {number} in words." for number in range(40)]
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda prompt: model.pipeline_generate([prompt]), prompts))
    assert [answer for (answer,) in answers] == model.pipeline_generate(prompts)


# Long inputs


def test_a_longer_input_is_refused_with_its_length(model: Model) -> None:
    with pytest.raises(RequestError) as caught:
        model.pipeline_generate(["word " * 2000])
    tokens = len(model.tokenizer.encode("word " * 2000))
    assert f"the input has {tokens} tokens, allowed are 1024 (option.max_input_tokens)" in str(
        caught.value
    )
    assert caught.value.code == 400


@pytest.mark.parametrize(("truncate", "kept"), [(True, 1024), (5, 5), (1, 1)])
def test_truncate_keeps_the_beginning_and_the_end_of_text(
    model: Model, truncate: bool | int, kept: int
) -> None:
    text = "Count from 3 to 9. " * 400
    (result,) = model.generate([request_of(text, truncate=truncate)])
    assert (result.input_tokens, result.truncated) == (kept, True)
    ids = model.tokenizer.encode_plain(text)[: kept - 1]
    if kept == 5:  # a text of its own, where the cut fell between words
        short = model.tokenizer.decode(ids)
        assert model.tokenizer.encode_plain(short) == ids
        assert model.pipeline_generate([short]) == [result.text]


@pytest.mark.parametrize("separator", [" ", ""])
def test_of_a_huge_input_only_the_beginning_is_read(model: Model, separator: str) -> None:
    huge = separator.join(["word"] * 500_000)
    with pytest.raises(RequestError, match=r"has more than [0-9]+ tokens, allowed are 1024"):
        model.pipeline_generate([huge])
    whole, cut = (request_of(text, truncate=40) for text in (huge[:20_000], huge))
    assert model.generate([whole]) == model.generate([cut])


def test_a_huge_input_of_next_to_no_tokens_is_refused(model: Model) -> None:
    """Tokenizing all of it would take seconds and gigabytes."""
    text = "a" + " " * 20_000_000 + "b"
    with pytest.raises(RequestError, match="the input has 20000002 characters, of which the first"):
        model.generate([GenerationRequest(text)])


def test_truncate_leaves_a_short_input_alone(model: Model) -> None:
    sent = request_of(PROMPTS[0]), request_of(PROMPTS[0], truncate=True)
    plain, cut = model.generate(list(sent))
    assert cut == plain
    assert not cut.truncated


def test_the_longest_input_that_fits(demo: Path) -> None:
    model = init_inference(str(demo), max_input_tokens=10)
    fits = "a " * 9
    assert len(model.tokenizer.encode(fits)) == 10
    model.pipeline_generate([fits])
    with pytest.raises(RequestError, match="has 11 tokens, allowed are 10"):
        model.pipeline_generate([fits + "a"])
    model.close()


# stream_generate


def joined(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"max_new_tokens": 3}, {"temperature": 1.5, "seed": 4}, {"stop": [", 5"]}],
    ids=str,
)
def test_a_stream_is_the_result_in_pieces(model: Model, parameters: dict[str, Any]) -> None:
    request = request_of("Count from 3 to 9.", **parameters)
    events = list(model.stream_generate(request))
    (result,) = model.generate([request])
    assert events[-1].result == result
    assert joined(events) == result.text
    assert tuple(event.token_id for event in events) == result.token_ids
    assert tuple(event.log_prob for event in events) == pytest.approx(result.log_probs, abs=1e-4)
    assert all(event.result is None for event in events[:-1])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.text(min_size=1, max_size=40).filter(str.strip),
    st.lists(st.text("abcdeinorst, 0123456789", min_size=1, max_size=3), max_size=3),
    st.integers(1, 20),
    st.sampled_from([{}, {"temperature": 5.0, "seed": 1}]),
)
def test_any_stream_joins_to_its_text(
    model: Model, prompt: str, stops: list[str], length: int, drawn: dict[str, Any]
) -> None:
    request = request_of(prompt, stop=stops, max_new_tokens=length, **drawn)
    events = list(model.stream_generate(request))
    assert joined(events) == model.generate([request])[0].text
    assert not any(stop in joined(events) for stop in stops)


def test_tokens_come_before_the_end(patient: Model) -> None:
    stream = patient.stream_generate(endless_request())
    assert [next(stream).result for _ in range(3)] == [None] * 3
    stream.close()  # type: ignore[attr-defined]


def test_closing_a_stream_frees_its_row(patient: Model) -> None:
    stream = patient.stream_generate(endless_request())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    # there is one row: this would wait for ever
    (answer,) = patient.submit([request_of(PROMPTS[0])])
    assert answer.result(WAIT).token_ids


def test_a_stream_that_nobody_holds_frees_its_row(patient: Model) -> None:
    for event in patient.stream_generate(endless_request()):
        assert event.result is None
        break
    (answer,) = patient.submit([request_of(PROMPTS[0])])
    assert answer.result(WAIT).token_ids


def test_closing_a_stream_before_its_first_token_frees_its_row(patient: Model) -> None:
    stream = patient.stream_generate(endless_request())
    stream.close()  # type: ignore[attr-defined]
    del stream
    assert len(patient.generate([request_of("x", max_new_tokens=1)])) == 1


def test_streams_beside_each_other(model: Model) -> None:
    streams = [model.stream_generate(request_of(prompt)) for prompt in PROMPTS]
    texts = [joined(list(stream)) for stream in reversed(streams)]
    assert texts[::-1] == model.pipeline_generate(PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "parameters", "words"),
    [
        ("x", {"num_beams": 2}, "a stream needs num_beams 1"),
        ("word " * 2000, {}, "allowed are 1024"),
    ],
)
def test_what_cannot_be_streamed_is_told_at_once(
    model: Model, prompt: str, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        model.stream_generate(request_of(prompt, **parameters))


# submit, cancelling, closing


def test_cancelling_a_future_frees_its_row(patient: Model) -> None:
    (endless,) = patient.submit([endless_request()])
    (answer,) = patient.submit([request_of(PROMPTS[0])])
    assert endless.cancel()
    assert answer.result(WAIT).token_ids


def test_cancelling_beams_frees_their_rows(demo: Path) -> None:
    model = init_inference(str(demo), backend="transformers", max_rows=2, max_output_tokens=ENDLESS)
    (endless,) = model.submit([endless_request(num_beams=2)])
    (answer,) = model.submit([request_of(PROMPTS[0])])
    endless.cancel()
    assert answer.result(WAIT).token_ids
    model.close()


def test_a_full_queue(patient: Model) -> None:
    (endless,) = patient.submit([endless_request()])
    waiting = patient.submit([request_of("x")] * 2)
    with pytest.raises(RequestError, match=r"wait already, allowed are 3 \(option.max_queue") as e:
        patient.submit([request_of("x")] * 3)
    assert e.value.code == 503
    endless.cancel()
    assert [type(future.result(WAIT)) for future in waiting] == [GenerationResult] * 2


def test_closing_finishes_what_runs_and_refuses_the_rest(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = init_inference(str(demo), max_rows=1)
    begun, closed = threading.Event(), threading.Event()
    decode = OnnxT5StepEngine.decode

    def decode_then(*arguments: Any) -> Any:
        begun.set()
        assert closed.wait(WAIT)
        return decode(*arguments)

    monkeypatch.setattr(OnnxT5StepEngine, "decode", decode_then)
    stream = model.stream_generate(request_of("x", ignore_eos_token=True, max_new_tokens=512))
    assert begun.wait(WAIT)
    (waiting,) = model.submit([request_of("x")])
    closing = threading.Thread(target=model.close)
    closing.start()
    refused = waiting.exception(WAIT)
    closed.set()
    events = list(stream)
    closing.join(WAIT)
    assert not closing.is_alive()
    assert events[-1].result is not None
    assert len(events) == 512
    assert isinstance(refused, RequestError)
    assert refused.code == 503

    model.close()  # once more does nothing
    for call in (
        lambda: model.pipeline_generate(["x"]),
        lambda: model.generate([request_of("x")]),
        lambda: model.stream_generate(request_of("x")),
    ):
        with pytest.raises(RequestError, match="is being unloaded") as caught:
            call()
        assert caught.value.code == 503


def test_an_unknown_option(demo: Path) -> None:
    with pytest.raises(LoadError, match=r"unknown option 'max_row'; did you mean 'max_rows'\?"):
        init_inference(str(demo), max_row=3)


def test_what_is_no_model(demo: Path) -> None:
    with pytest.raises(LoadError, match="model must be a folder or a model id, got None"):
        init_inference(None)  # type: ignore[arg-type]


def test_options_under_their_other_names(demo: Path, tmp_path: Path) -> None:
    loaded = init_inference(demo, quantize="int8", cache_dir=tmp_path)  # type: ignore[arg-type]
    assert loaded.pipeline_generate(["Write 7 in words."]) == ["seven"]
    loaded.close()


def test_a_request_that_names_no_length_takes_what_is_allowed(demo: Path) -> None:
    loaded = init_inference(str(demo), max_output_tokens=3)
    (result,) = loaded.generate([GenerationRequest("Write 4312 in words.")])
    assert len(result.token_ids) == 3
    loaded.close()
