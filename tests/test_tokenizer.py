"""Tokenizers give the ids and texts that transformers' own give, from whatever file there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.checkpoints.find import model_config
from handler.errors import LoadError
from handler.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

TEXTS = [
    "Write 7 in words.",
    "two  spaces and a\ttab",
    " leading and trailing ",
    "no newline in the vocabulary:\nsecond line",
    "{braces} <tags> ~tilde `tick`",
    "naïve café — “quotes” 東京 🙂",
    "a </s> in the middle",
    "fill <extra_id_0> and <extra_id_12>.",
]


@pytest.fixture(scope="module")
def vocab_size(demo: Path) -> int:
    return int(model_config(demo)["vocab_size"])


@pytest.fixture(scope="module")
def from_json(demo: Path, vocab_size: int) -> Tokenizer:
    return load_tokenizer(demo, vocab_size)


@pytest.fixture(scope="module")
def from_sentencepiece(
    demo: Path, vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spiece")
    shutil.copy(demo / "spiece.model", folder)
    shutil.copy(demo / "tokenizer_config.json", folder)
    return load_tokenizer(folder, vocab_size)


@pytest.fixture(scope="module")
def of_transformers(demo: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def bytes_of_transformers() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_json_equals_transformers(from_json: Tokenizer, of_transformers: Any, text: str) -> None:
    ids = from_json.encode(text)
    assert ids == of_transformers(text).input_ids
    assert from_json.decode(ids) == of_transformers.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_alone_equals_tokenizer_json(
    from_json: Tokenizer, from_sentencepiece: Tokenizer, text: str
) -> None:
    ids = from_json.encode(text)
    assert from_sentencepiece.encode(text) == ids
    assert from_sentencepiece.decode(ids) == from_json.decode(ids)
    assert from_sentencepiece.size == from_json.size
    assert [from_sentencepiece.token(i) for i in ids] == [from_json.token(i) for i in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_equal_transformers(bytes_of_transformers: Any, text: str) -> None:
    tokenizer = ByteTokenizer()
    # transformers strips the blanks around a special token; ours are the text's own
    if "</s>" not in text:
        assert tokenizer.encode(text) == bytes_of_transformers(text).input_ids
    ids = tokenizer.encode(text)
    expected = bytes_of_transformers.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == expected


def test_bytes_of_all_ids(bytes_of_transformers: Any) -> None:
    assert ByteTokenizer().size == len(bytes_of_transformers) == 384


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["json", "sentencepiece", "bytes"]))
def test_pieces_join_to_the_whole_text(
    from_json: Tokenizer, from_sentencepiece: Tokenizer, text: str, kind: str
) -> None:
    tokenizer = {
        "json": from_json,
        "sentencepiece": from_sentencepiece,
        "bytes": ByteTokenizer(),
    }[kind]
    _assert_pieces_join(tokenizer, tokenizer.encode_plain(text))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["json", "bytes"]))
def test_pieces_of_any_ids_join_to_the_whole_text(
    from_json: Tokenizer, data: st.DataObject, kind: str
) -> None:
    tokenizer = from_json if kind == "json" else ByteTokenizer()
    _assert_pieces_join(
        tokenizer, data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=40))
    )


def _assert_pieces_join(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = tokenizer.detokenizer()
    joined = "".join(pieces.add(i) for i in ids)
    whole = tokenizer.decode(ids)
    # what is unfinished at the end is not given out yet
    assert whole.startswith(joined)
    assert "\ufffd" not in joined or "\ufffd" in whole


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no tokenizer: expected tokenizer.json, spiece.model"):
        load_tokenizer(tmp_path, 100)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer.json", "is not a tokenizer.json"),
        ("spiece.model", "is not a sentencepiece model"),
        ("tokenizer_config.json", "is not JSON"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"\x00damaged")
    with pytest.raises(LoadError, match=words) as caught:
        load_tokenizer(tmp_path, 100)
    assert name in str(caught.value)


def test_byt5_is_told_by_its_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer"})
    )
    assert isinstance(load_tokenizer(tmp_path, 384), ByteTokenizer)


def test_a_file_at_which_the_library_panics_is_named(demo: Path, tmp_path: Path) -> None:
    told = json.loads((demo / "tokenizer.json").read_text())
    told["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "["}
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(LoadError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        load_tokenizer(tmp_path, 640)


@pytest.mark.parametrize("extra_ids", ["125", -1, True, 1 << 40, {}])
def test_extra_ids_are_a_number(tmp_path: Path, extra_ids: Any) -> None:
    told = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": extra_ids}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(LoadError, match="extra_ids must be an integer from 0 to 10000, got "):
        load_tokenizer(tmp_path, 384)


def test_a_tokenizer_json_of_another_time_than_the_library(demo: Path, tmp_path: Path) -> None:
    """2023's library cannot read what today's writes: spiece.model beside it says the same."""
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"model": {"type": "Unigram", "spoken": True}}))
    with pytest.raises(LoadError, match=r"is not a tokenizer.json"):
        load_tokenizer(tmp_path, 640)
    shutil.copy(demo / "spiece.model", tmp_path)
    ids = load_tokenizer(demo, 640).encode("Write 7 in words.")
    assert load_tokenizer(tmp_path, 640).encode("Write 7 in words.") == ids


@given(st.text(max_size=30))
def test_the_bytes_of_byte_level_tokens(byte_level: Tokenizer, text: str) -> None:
    """As BART's: a token may be a part of a character."""
    ids = byte_level.encode_plain(text)
    assert b"".join(map(byte_level.token_bytes, ids)).decode() == text
    assert byte_level.token_bytes(byte_level.eos_token_id) == b""


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, 400)
