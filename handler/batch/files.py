"""The input, read line by line, and files that grow: plain, or with gzip by their suffix."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO, cast

from handler.errors import LoadError

STANDARD = Path("-")
# As long a body as the server takes.
_LONGEST_LINE = 64 << 20
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Line:
    """number: from 1. content: None of one that is too long. end: bytes of input up to its end."""

    number: int
    content: bytes | None
    end: int

    @property
    def is_blank(self) -> bool:
        return self.content is not None and not self.content.strip()


@dataclass(frozen=True)
class Content:
    """What is in an input: its lines, blank ones too, and its SHA-256, both unpacked."""

    lines: int
    sha256: str


class Source:
    """The input. Raises LoadError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if path == STANDARD and sys.stdin is None:
            raise LoadError("standard input is closed")
        if path != STANDARD and not path.exists():
            raise LoadError(f"{path}: no such file")
        self.can_be_read_again = path != STANDARD and path.is_file()
        self._stamp = self._stamped()

    def content(self) -> Content:
        """Reads all of it."""
        sha, newlines, last = hashlib.sha256(), 0, b"\n"
        with self._opened() as stream:
            while block := stream.read(_BLOCK):
                sha.update(block)
                newlines += block.count(b"\n")
                last = block[-1:]
        return Content(newlines + (last != b"\n"), sha.hexdigest())

    def lines(self, after: int = 0, offset: int = 0) -> Iterator[Line]:
        """From the one after ``after`` lines, which end at ``offset``. Raises LoadError at the end
        where somebody has written to the file meanwhile."""
        with self._opened() as stream:
            if offset:
                stream.seek(offset)
            number = after
            while content := stream.readline(_LONGEST_LINE):
                number += 1
                offset += len(content)
                too_long = len(content) == _LONGEST_LINE and not content.endswith(b"\n")
                while too_long and not content.endswith(b"\n"):
                    content = stream.readline(_BLOCK)
                    offset += len(content)
                    if not content:
                        break
                yield Line(number, None if too_long else content.rstrip(b"\r\n"), offset)
        if self._stamped() != self._stamp:
            raise LoadError(f"{self._path} has changed while it was read")

    def _stamped(self) -> tuple[int, int] | None:
        """What changes when somebody writes to the file."""
        if not self.can_be_read_again:
            return None
        now = self._path.stat()
        return now.st_size, now.st_mtime_ns

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        if self._path == STANDARD:
            yield sys.stdin.buffer
            return
        try:
            if self._path.suffix == ".gz":
                with gzip.open(self._path) as unpacked:
                    yield cast("IO[bytes]", unpacked)
            else:
                with self._path.open("rb") as stream:
                    yield stream
        except (OSError, EOFError, zlib.error) as error:
            raise LoadError(f"{self._path} cannot be read: {error}") from error


class GrowingFile:
    """What was written before the last ``sync`` stays, whatever happens then.

    It belongs to one process at a time. Raises LoadError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed = path.suffix == ".gz"
        self._packer: gzip.GzipFile | None = None
        with self._telling():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise LoadError(f"{path} is no plain file; - is standard output")
        self._raw: IO[bytes] = os.fdopen(descriptor, "r+b")
        self._lock()

    @property
    def size(self) -> int:
        return os.fstat(self._raw.fileno()).st_size

    def cut(self, size: int) -> None:
        """Go on after the first ``size`` bytes."""
        with self._telling():
            self._raw.truncate(size)
            self._raw.seek(size)

    def write(self, line: bytes) -> None:
        with self._telling():
            if self._packed and self._packer is None:
                self._packer = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)
            (self._packer or self._raw).write(line)

    def sync(self) -> int:
        """Bring all that was written to the disk; how many bytes that is. A packed file is whole
        then: it ends a member."""
        with self._telling():
            self._end_member()
            self._raw.flush()
            os.fsync(self._raw.fileno())
            return self._raw.tell()

    def close(self) -> None:
        with self._telling():
            self._end_member()
            self._raw.close()

    def _end_member(self) -> None:
        if self._packer is not None:
            self._packer.close()
            self._packer = None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._raw.close()
            raise LoadError(f"{self._path} is being written by another process") from None

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LoadError(f"{self._path} cannot be written: {error.strerror}") from error


class StandardStream:
    """A GrowingFile's like for a pipe or a terminal: nothing of it stays."""

    size = 0

    def __init__(self, stream: TextIO | None) -> None:
        if stream is None:
            raise LoadError("standard output and standard error must not be closed")
        self._stream = stream.buffer

    def cut(self, size: int) -> None:
        pass

    def write(self, line: bytes) -> None:
        with self._telling():
            self._stream.write(line)

    def sync(self) -> int:
        with self._telling():
            self._stream.flush()
        return 0

    def close(self) -> None:
        pass

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # so that Python does not try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise LoadError("nobody reads the output any more") from None
            raise LoadError(f"standard output cannot be written: {error.strerror}") from error
