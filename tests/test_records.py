"""JSON on one line, whoever splits it, and tokens as texts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.engines import Model
from handler.schemas.records import (
    accepts,
    is_special,
    json_line,
    server_sent_event,
    text_alone,
    token_texts,
)
from handler.tokenizer import ByteTokenizer


@given(st.text(st.characters(codec="utf-8")))
def test_a_record_is_one_line(text: str) -> None:
    """Also to Python's splitlines, by which httpx and with it huggingface_hub reads."""
    (line,) = json_line({"text": text}).decode().splitlines()
    assert json.loads(line) == {"text": text}
    line, blank = server_sent_event({"text": text}).decode().splitlines()
    assert line.startswith("data: {")
    assert blank == ""


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "a\u2029b", "a\nb\rc\x0bd\x0ce\x1cf"])
def test_line_ends_that_json_leaves_alone(text: str) -> None:
    assert len(json_line(text).decode().splitlines()) == 1


def test_letters_stay_as_they_are() -> None:
    assert "東京".encode() in json_line("東京")


def test_accept() -> None:
    assert accepts("text/event-stream", "text/event-stream")
    assert accepts("application/json, TEXT/Event-Stream ;q=0.5", "text/event-stream")
    assert not accepts("*/*", "text/event-stream")
    assert not accepts("", "text/event-stream")


@given(st.text(st.characters(codec="utf-8")))
def test_token_texts_join_to_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert "".join(token_texts(tokenizer.encode(text), tokenizer)) == tokenizer.decode(
        tokenizer.encode(text)
    )


def test_tokens_of_the_demo(model: Model) -> None:
    tokenizer = model.tokenizer
    ids = tokenizer.encode("Sort these words: warm, cat")
    assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)
    assert is_special(tokenizer.eos_token_id, tokenizer)
    assert is_special(tokenizer.pad_token_id, tokenizer)
    assert not any(is_special(token_id, tokenizer) for token_id in ids[:-1])
    assert text_alone(tokenizer.eos_token_id, tokenizer) == "</s>"
    assert text_alone(ids[0], tokenizer)[0] == " "
