"""Tokenizers: the checkpoint's own tokenizer.json, spiece.model alone, or ByT5's bytes."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from handler.errors import LoadError, shown

logger = logging.getLogger(__name__)

# Pieces for the bytes of a character that has none of its own
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPECIAL = re.compile(r"<.+>")
# Byte-level BPE (GPT-2's, BART's) writes a byte as the character of its number where one sees it,
# the others, the space among them, as those from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {
    **{chr(byte): byte for byte in _VISIBLE},
    **{chr(256 + n): byte for n, byte in enumerate(sorted({*range(256)} - {*_VISIBLE}))},
}
_MOST_EXTRA_IDS = 10_000
_BYT5_SPECIAL = 3  # <pad>, </s>, <unk> come before the bytes


class Tokenizer(Protocol):
    """Text to ids and back. ``encode`` ends with ``</s>``; ``decode`` leaves special tokens out.

    ``size``: ids from 0 to size - 1 have a meaning; a model's vocabulary is padded beyond, and
    those ids must never be chosen. ``unk_token_id`` stands for what the vocabulary lacks.
    """

    size: int
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int | None

    def __hash__(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_target(self, text: str) -> list[int]:
        """The ids with which the model itself would write the text, ``</s>`` included."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Without the closing ``</s>``: ids of a piece of text."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token(self, token_id: int) -> str:
        """The token as the vocabulary writes it, ``▁`` and all."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, in UTF-8; nothing for one that is in no text."""
        ...

    def detokenizer(self) -> Detokenizer: ...


class Detokenizer:
    """Text of a growing list of ids, piece by piece: the pieces join to the text of the whole.

    A token's text depends on its left neighbours (a leading space; a character of several bytes),
    so each step decodes from a little before it and takes what is new. What it decodes from must
    show something: libraries drop blanks at the beginning of a text, and would those within it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0  # where the context of the next piece begins
        self._done = 0  # up to where text was given out

    def add(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._ids.append(token_id)
        known = self._tokenizer.decode(self._ids[self._before : self._done])
        text = self._tokenizer.decode(self._ids[self._before :])
        if len(text) <= len(known) or text.endswith("\ufffd"):
            return ""
        new = text[len(known) :]
        if new.strip():
            self._before = self._done
        self._done = len(self._ids)
        return new

    def fork(self) -> Detokenizer:
        """A copy that goes on by itself."""
        other = copy.copy(self)
        other._ids = self._ids.copy()
        return other


class TokenizerBase:
    """What tokenizers make of their own ``encode_plain``, ``decode`` and ``token``."""

    size: int
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int | None

    def encode(self, text: str) -> list[int]:
        return [*self.encode_plain(text), self.eos_token_id]

    def encode_target(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_plain(self, text: str) -> list[int]:
        raise NotImplementedError

    def token(self, token_id: int) -> str:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        name = self.token(token_id)
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte.group(1), 16)])
        if _SPECIAL.fullmatch(name) and not self.decode([token_id]):
            return b""
        return name.replace("▁", " ").encode()

    def detokenizer(self: Any) -> Detokenizer:
        return Detokenizer(self)


class JsonTokenizer(TokenizerBase):
    """tokenizer.json, by the tokenizers library."""

    def __init__(self, file: Path, eos_token: str = "</s>", pad_token: str = "<pad>") -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(file))
        except BaseException as error:
            # the library raises bare Exceptions, and where its Rust panics not even these
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise LoadError(f"{file} is not a tokenizer.json: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        # encode() would keep Python's lock, and so stop every thread while a long text is read; the
        # fast form (tokenizers 0.20) leaves out the offsets.
        self._encode_batch = getattr(self._library, "encode_batch_fast", self._library.encode_batch)
        # Some files were saved without the post-processor that appends </s>.
        self._closes_texts = self._library.num_special_tokens_to_add(is_pair=False) > 0
        self.size = self._library.get_vocab_size(with_added_tokens=True)
        self.eos_token_id = self._id_of(eos_token, file)
        self.pad_token_id = self._id_of(pad_token, file)
        self.unk_token_id = self._library.token_to_id("<unk>")
        decoder = self._library.decoder
        self._is_byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()

    def _id_of(self, token: str, file: Path) -> int:
        token_id = self._library.token_to_id(token)
        if token_id is None:
            raise LoadError(f"{file} has no token {token!r}")
        return int(token_id)

    def encode(self, text: str) -> list[int]:
        ids = list(self._encode_batch([text])[0].ids)
        return ids if self._closes_texts else [*ids, self.eos_token_id]

    def encode_plain(self, text: str) -> list[int]:
        return list(self._encode_batch([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def token(self, token_id: int) -> str:
        return self._library.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        if self._is_byte_level and self.decode([token_id]):
            return bytes(_BYTE_LEVEL[character] for character in self.token(token_id))
        return super().token_bytes(token_id)


class SentencePieceTokenizer(TokenizerBase):
    """spiece.model alone, by the sentencepiece library, with T5's ``<extra_id_n>`` on top."""

    def __init__(self, file: Path, extra_ids: int | None, vocab_size: int) -> None:
        import sentencepiece

        try:
            self._library = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise LoadError(f"{file} is not a sentencepiece model: {error}") from error
        pieces = self._library.get_piece_size()
        if extra_ids is None:  # T5 has 100 besides its pieces, mT5 none
            extra_ids = 100 if pieces + 100 <= vocab_size else 0
        self.size = pieces + extra_ids
        self.eos_token_id = self._library.eos_id()
        self.pad_token_id = max(self._library.pad_id(), 0)
        self.unk_token_id = self._library.unk_id()
        # T5 counts them down from the end: <extra_id_0> is the last id.
        self._added = {f"<extra_id_{n}>": self.size - 1 - n for n in range(extra_ids)}
        self._special = {
            self._library.id_to_piece(i): i
            for i in {self.pad_token_id, self.eos_token_id, self._library.unk_id()}
        }
        names = sorted([*self._special, *self._added], key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._names = {i: name for name, i in {**self._special, **self._added}.items()}

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            token_id = self._special.get(part, self._added.get(part))
            ids.extend(self._library.encode(part) if token_id is None else [token_id])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode([i for i in ids if i not in self._names]))

    def token(self, token_id: int) -> str:
        if token_id in self._names:
            return self._names[token_id]
        return str(self._library.id_to_piece(token_id)) if token_id < self.size else ""


class ByteTokenizer(TokenizerBase):
    """ByT5's: a byte b of the UTF-8 text is the id b + 3; ``<extra_id_n>`` come after the bytes."""

    eos_token_id = 1
    pad_token_id = 0
    unk_token_id: int | None = None  # bytes write everything

    def __init__(self, extra_ids: int = 125) -> None:
        self.size = _BYT5_SPECIAL + 256 + extra_ids
        self._special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
        self._special.update({f"<extra_id_{n}>": _BYT5_SPECIAL + 256 + n for n in range(extra_ids)})
        names = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._names = {i: name for name, i in self._special.items()}

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._split.split(text):
            special = self._special.get(part)
            ids.extend(
                [byte + _BYT5_SPECIAL for byte in part.encode()] if special is None else [special]
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        data = bytes(i - _BYT5_SPECIAL for i in ids if i not in self._names and i < self.size)
        return data.decode("utf-8", errors="ignore")

    def token(self, token_id: int) -> str:
        name = self._names.get(token_id)
        if name is not None:
            return name
        return self.token_bytes(token_id).decode("latin-1")

    def token_bytes(self, token_id: int) -> bytes:
        byte = token_id - _BYT5_SPECIAL
        return bytes([byte]) if 0 <= byte < 256 else b""


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that lies in a checkpoint folder. Raises LoadError where none does.

    ``vocab_size`` is the model's, padding included.
    """
    settings = _settings(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        try:
            return JsonTokenizer(
                folder / "tokenizer.json",
                eos_token=_token_text(settings.get("eos_token"), "</s>"),
                pad_token=_token_text(settings.get("pad_token"), "<pad>"),
            )
        except LoadError as error:
            # whole, but of another time than the library: 2023's cannot read what today's writes
            if not (folder / "spiece.model").is_file() or not _is_whole(folder / "tokenizer.json"):
                raise
            logger.warning("%s; spiece.model beside it is used", error)
    if (folder / "spiece.model").is_file():
        return SentencePieceTokenizer(
            folder / "spiece.model", _extra_ids(settings, None, folder), vocab_size
        )
    if str(settings.get("tokenizer_class", "")).startswith("ByT5"):
        return ByteTokenizer(_extra_ids(settings, 125, folder))
    raise LoadError(
        f"{folder} has no tokenizer: expected tokenizer.json, spiece.model, or a "
        "tokenizer_config.json that names ByT5Tokenizer"
    )


def _extra_ids(settings: dict[str, Any], default: int | None, folder: Path) -> Any:
    """How many; ``default`` where it is not told. Raises LoadError."""
    told = settings.get("extra_ids")
    if told is None:
        return default
    if type(told) is not int or not 0 <= told <= _MOST_EXTRA_IDS:
        raise LoadError(
            f"{folder / 'tokenizer_config.json'}: extra_ids must be an integer from 0 to "
            f"{_MOST_EXTRA_IDS}, got {shown(told)}"
        )
    return told


def _is_whole(file: Path) -> bool:
    try:
        return "model" in _settings(file)
    except LoadError:
        return False


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise LoadError(f"{file} is not a JSON object")
    return settings


def _token_text(value: Any, default: str) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else default
