"""Whether files are what S3 said they are, and still what was downloaded."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from handler.checkpoints.s3_tools import S3Details, S3Object
from handler.machine import usable_cpus

logger = logging.getLogger(__name__)

MANIFEST = ".s3-manifest.json"
_CHUNK = 1 << 22
_MIB = 1 << 20
# Sizes that uploaders use for parts: aws and boto3 8 MiB, s5cmd 50, consoles 16, libraries 5 ...
_USUAL_PART_SIZES = [
    n * _MIB for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 500, 512, 1024)
]


class CheckedFile(NamedTuple):
    """A file's line in the manifest. compared: what its content was compared with."""

    size: int
    etag: str
    crc32: int
    compared: str


def check(file: Path, told: S3Object, details: Callable[[], S3Details]) -> CheckedFile | None:
    """Compare a file with what S3 tells; None when it is missing or damaged.

    Its size always; its MD5 with an ETag that is one; the MD5 of its parts' MD5s with the ETag of a
    multi-part upload, for the usual part sizes and the one that ``details`` knows (boto3 asks for
    it, s5cmd cannot). Content whose ETag is of another kind (SSE-KMS, SSE-C, an unknown part size)
    is compared by size alone, and by the CRC-32 of what came at later starts.
    """
    if not file.is_file() or file.stat().st_size != told.size:
        return None
    sizes = _part_sizes(told)
    crc32, etags = _digests(file, sizes)
    if told.etag in etags:
        return CheckedFile(told.size, told.etag, crc32, "ETag")
    known = details()
    if known.etag_is_md5 and _is_md5(told.etag):
        return None
    if known.etag_is_md5 and _parts(told.etag) and known.part_size:
        _, etags = _digests(file, [known.part_size])
        return CheckedFile(told.size, told.etag, crc32, "ETag") if told.etag in etags else None
    logger.warning("%s: only its size is checked, the ETag %s is of no use", file, told.etag)
    return CheckedFile(told.size, told.etag, crc32, "size")


def damaged_files(folder: Path, told: Iterable[S3Object]) -> list[str] | None:
    """Names of the files that are not (any more) what the manifest says; None without one.

    Reads every file, so that damage that leaves the size is found, too.
    """
    manifest = _manifest(folder)
    if manifest is None:
        return None

    def is_damaged(entry: S3Object) -> bool:
        try:
            line, file = manifest[entry.name], folder / entry.name
            return (
                (line.size, line.etag) != (entry.size, entry.etag)
                or file.stat().st_size != line.size
                or _crc32(file) != line.crc32
            )
        except (OSError, KeyError):
            return True

    entries = list(told)
    with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
        return [e.name for e, bad in zip(entries, pool.map(is_damaged, entries)) if bad]


def recorded(folder: Path) -> list[S3Object] | None:
    """What the manifest says was downloaded; None without one."""
    manifest = _manifest(folder)
    if manifest is None:
        return None
    return [S3Object(name, line.size, line.etag) for name, line in manifest.items()]


def write_manifest(folder: Path, files: Mapping[str, CheckedFile]) -> None:
    (folder / MANIFEST).write_text(json.dumps({n: f._asdict() for n, f in files.items()}, indent=1))


def _manifest(folder: Path) -> dict[str, CheckedFile] | None:
    try:
        stored: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())
        return {name: CheckedFile(**line) for name, line in stored.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged: %s", folder / MANIFEST, error)
        return None


def _is_md5(etag: str) -> bool:
    return len(etag) == 32 and not set(etag.lower()) - set("0123456789abcdef")


def _parts(etag: str) -> int:
    """The number of parts that an ETag tells; 0 for one of another kind."""
    digest, _, count = etag.partition("-")
    return int(count) if _is_md5(digest) and count.isdigit() else 0


def _part_sizes(told: S3Object) -> list[int]:
    """Part sizes that give as many parts as the ETag tells."""
    count = _parts(told.etag)
    if not count:
        return []
    smallest = -(-told.size // (count * _MIB)) * _MIB  # in whole MiB
    sizes = {smallest, *_USUAL_PART_SIZES}
    return sorted(size for size in sizes if size and -(-told.size // size) == count)


def _crc32(file: Path) -> int:
    crc32 = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _digests(file: Path, part_sizes: Iterable[int]) -> tuple[int, set[str]]:
    """(CRC-32, ETags that S3 would give it): uploaded whole, or in parts of these sizes."""
    crc32, whole = 0, hashlib.md5(usedforsecurity=False)
    parts = [_Parts(size) for size in part_sizes]
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
            whole.update(chunk)
            for each in parts:
                each.update(chunk)
    return crc32, {whole.hexdigest(), *(each.etag() for each in parts)}


class _Parts:
    """The ETag of a multi-part upload: MD5 of the parts' MD5s, a dash, their number."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._room = size
        self._part = hashlib.md5(usedforsecurity=False)
        self._digests: list[bytes] = []

    def update(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            taken = rest[: self._room]
            self._part.update(taken)
            self._room -= len(taken)
            rest = rest[len(taken) :]
            if not self._room:
                self._close()

    def etag(self) -> str:
        if self._room < self._size:
            self._close()
        joined = hashlib.md5(b"".join(self._digests), usedforsecurity=False)
        return f"{joined.hexdigest()}-{len(self._digests)}"

    def _close(self) -> None:
        self._digests.append(self._part.digest())
        self._part = hashlib.md5(usedforsecurity=False)
        self._room = self._size
