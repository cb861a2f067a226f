"""The rules that end a generation, and what a stream gives out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.continuation import Continuation
from handler.errors import RequestError
from handler.generation import Generation, GenerationRequest, GenerationResult, TokenEvent
from handler.parameters import GenerationParameters
from handler.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_id


def run(
    text: str | Sequence[int], parameters: GenerationParameters, end: bool = True
) -> tuple[Generation, list[TokenEvent]]:
    """Append the bytes of ``text`` and ``</s>`` until the generation says it is done."""
    events: list[TokenEvent] = []
    request = GenerationRequest("x", parameters)
    generation = Generation(request, [3, EOS], TOKENIZER, on_event=events.append)
    ids = TOKENIZER.encode_plain(text) if isinstance(text, str) else list(text)
    for token_id in [*ids, EOS] if end else ids:
        if generation.append(token_id, -0.5):
            break
    return generation, events


def result_of(text: str, **parameters: object) -> GenerationResult:
    generation, _ = run(text, GenerationParameters(**parameters))  # type: ignore[arg-type]
    return generation.future.result(timeout=0)


def test_the_end_of_the_text() -> None:
    result = result_of("abc")
    assert (result.text, result.finish_reason) == ("abc", "eos_token")
    assert result.token_ids == (*TOKENIZER.encode_plain("abc"), EOS)
    assert result.log_probs == (-0.5,) * 4
    assert result.input_tokens == 2


def test_length() -> None:
    result = result_of("abcdef", max_new_tokens=3)
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("abc", "length", 3)


def test_ignore_eos_token_goes_on() -> None:
    generation, _ = run("a", GenerationParameters(ignore_eos_token=True))
    assert not generation.done


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("b", "a"),
        ("cd", "ab"),
        (["x", "e"], "abcd"),
        ("é", "abcdef"),
        ("a", ""),
        ("abcdefé", ""),
        (["bcd", "c"], "ab"),
    ],
)
def test_a_stop_sequence_is_cut_off(stop: object, text: str) -> None:
    result = result_of("abcdefé", stop_sequences=stop)
    assert (result.text, result.finish_reason) == (text, "stop_sequence")


def test_a_stop_sequence_of_ids_is_cut_off() -> None:
    ids = TOKENIZER.encode_plain("cd")
    result = result_of("abcdef", stop_sequences=[ids, [2, -1]])
    assert (result.text, result.finish_reason) == ("ab", "stop_sequence")


def test_without_the_stop_sequence_nothing_is_cut() -> None:
    result = result_of("abcab", stop_sequences="abd")
    assert (result.text, result.finish_reason) == ("abcab", "eos_token")


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_a_stream_joins_to_the_text_and_never_takes_back(text: str, stops: list[str]) -> None:
    generation, events = run(text, GenerationParameters(stop_sequences=stops))  # type: ignore[arg-type]
    result = generation.future.result(timeout=0)
    assert "".join(event.text for event in events) == result.text
    assert events[-1].result == result
    assert [event.token_id for event in events] == list(result.token_ids)
    assert not any(stop in result.text for stop in stops)


@given(st.lists(st.integers(3, 258), max_size=30))
def test_a_stream_of_any_bytes_joins_to_the_text(ids: list[int]) -> None:
    generation, events = run(ids, GenerationParameters())
    assert "".join(e.text for e in events) == generation.future.result(timeout=0).text


def test_numbers_that_are_none_fail_the_generation() -> None:
    generation = Generation(GenerationRequest("x"), [3, EOS], TOKENIZER)
    assert generation.append(5, float("nan"))
    error = generation.future.exception(timeout=0)
    assert isinstance(error, RequestError)
    assert error.code == 424


def test_a_cancelled_generation_is_done() -> None:
    generation, _ = run("abc", GenerationParameters(), end=False)
    assert not generation.done
    assert generation.future.cancel()
    assert generation.done
    generation.append(EOS, 0.0)
    generation.fail(RuntimeError())
    assert generation.future.cancelled()


@given(st.lists(st.sampled_from([3 + ord(c) for c in "ab"]), max_size=12), st.data())
def test_a_stream_never_shows_what_a_stop_of_ids_takes_away(
    ids: list[int], data: st.DataObject
) -> None:
    stop = data.draw(st.lists(st.sampled_from([3 + ord(c) for c in "ab"]), min_size=1, max_size=4))
    parameters = GenerationParameters(stop_sequences=(tuple(stop),))
    generation, events = run(ids, parameters)
    result = generation.future.result(timeout=0)
    assert "".join(event.text for event in events) == result.text
    assert (result.finish_reason == "stop_sequence") == any(
        ids[i : i + len(stop)] == stop for i in range(len(ids))
    )


def test_what_many_stop_sequences_hold_back_takes_no_time() -> None:
    stops = ["ab" * 127 + chr(97 + i // 26) + chr(97 + i % 26) for i in range(256)]
    parameters = GenerationParameters(stop_sequences=stops, max_new_tokens=600)  # type: ignore[arg-type]
    begin = time.thread_time()
    _, events = run("ab" * 120 + "c" * 200, parameters)
    assert time.thread_time() - begin < 1.0
    assert [event.text for event in events].index("ab" * 120 + "c") == 240


def test_the_longest_stop_of_ids_is_cut() -> None:
    stops = tuple(tuple(3 + ord(c) for c in text) for text in ("c", "bc"))
    for ordered in (stops, stops[::-1]):
        assert result_of("abc", stop_sequences=ordered).text == "a"


def test_a_stop_of_ids_that_ends_with_the_end_of_the_text() -> None:
    stop = ((3 + ord("b"), EOS),)
    result = result_of("ab", stop_sequences=stop)
    assert (result.text, result.finish_reason) == ("a", "stop_sequence")


@given(
    st.lists(st.sampled_from([*TOKENIZER.encode_plain("abé"), EOS, 0]), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=2),
    st.booleans(),
)
def test_a_whole_text_is_over_where_the_growing_one_ended(
    ids: list[int], stops: list[str], ignore_eos_token: bool
) -> None:
    parameters = GenerationParameters(
        max_new_tokens=9, stop_sequences=tuple(stops), ignore_eos_token=ignore_eos_token
    )
    growing = Continuation(parameters, TOKENIZER)
    for count, token_id in enumerate(ids, 1):
        ended = growing.append(token_id, None) is not None
        assert growing.is_over(ids[:count]) == ended
        if ended:
            break


# Engines that tell texts


def of_pieces(pieces: Sequence[str], **parameters: object) -> tuple[str, GenerationResult]:
    """What was streamed, and the result."""
    events: list[TokenEvent] = []
    request = GenerationRequest("x", GenerationParameters(**parameters))  # type: ignore[arg-type]
    generation = Generation(request, [3, EOS], TOKENIZER, on_event=events.append)
    for piece in pieces:
        if generation.append_text(piece, last=False):
            break
    else:
        generation.append_text("", last=True)
    return "".join(event.text for event in events), generation.future.result(timeout=0)


@pytest.mark.parametrize(
    ("pieces", "parameters", "text", "reason"),
    [
        (["ab", "c"], {}, "abc", "eos_token"),
        (["ab", "c"], {"max_new_tokens": 3}, "abc", "length"),
        (["ab", "cd"], {"stop_sequences": ("bc",)}, "a", "stop_sequence"),
        (["ab"], {"stop_sequences": ("bc",)}, "ab", "eos_token"),
        ([], {}, "", "eos_token"),
    ],
)
def test_texts_in_pieces(
    pieces: list[str], parameters: dict[str, object], text: str, reason: str
) -> None:
    streamed, result = of_pieces(pieces, **parameters)
    assert (streamed, result.text, result.finish_reason) == (text, text, reason)
    assert result.token_ids == result.log_probs == ()
