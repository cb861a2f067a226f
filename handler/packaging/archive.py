"""A model.tar.gz: written so that every DJLServing unpacks it, read without trusting it.

DJLServing reads one gzip stream and no second one behind it, refuses names with ".." in them, and
writes a link as an empty file. So archives are written with plain files only, under names from
their root, and whatever is otherwise is refused when it is read.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from handler.errors import LoadError, shown

BLOCK = 1 << 20
# Weights hardly compress: fp32 by 7 %, bf16 by 20 %, at less than a tenth of the speed.
_STORED = 0
_TAR_BLOCK = 512
_MOST_READ_AT_ONCE = BLOCK  # longer extended headers, which tarfile reads as a whole, are refused
_RATIO_COUNTS_FROM = 1 << 30
_DEVICE = "is a device or a pipe"
_REFUSED_KINDS = {
    tarfile.SYMTYPE: "is a symbolic link, which DJLServing would unpack as an empty file",
    tarfile.LNKTYPE: "is a hard link, which DJLServing would unpack as an empty file",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
    **dict.fromkeys((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), _DEVICE),
}
# What tarfile raises of headers that are none.
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, EOFError)


@dataclass(frozen=True)
class Member:
    """A file to be: its name from the archive's root, its bytes, and how to get them in pieces."""

    name: str
    size: int
    pieces: Callable[[], Iterable[bytes]]

    @staticmethod
    def of_bytes(name: str, content: bytes) -> Member:
        return Member(name, len(content), lambda: [content])

    @staticmethod
    def of_file(name: str, file: Path) -> Member:
        """Its pieces raise OSError where somebody has written to the file since."""
        status = file.stat()
        return Member(name, status.st_size, partial(_blocks_of, file, status.st_mtime_ns))


@dataclass(frozen=True)
class Limits:
    """What is taken for an attack: more files, more bytes, a higher ratio of them to the archive's.

    The ratio counts from the first GiB on.
    """

    members: int = 20_000
    bytes: int = 1 << 39
    ratio: int = 200


LIMITS = Limits()


class Content:
    """A file in an archive that is being read."""

    def __init__(self, stream: _Gunzipped, size: int) -> None:
        self._stream = stream
        self._left = size

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, by default what is left; none at its end. Raises LoadError."""
        wanted = self._left if size < 0 else min(size, self._left)
        blocks = []
        while wanted:
            blocks.append(self._stream.read(min(wanted, BLOCK)))
            if not blocks[-1]:
                raise self._stream.damaged("the last file in it is cut off")
            wanted -= len(blocks[-1])
            self._left -= len(blocks[-1])
        return b"".join(blocks)


def write_archive(
    output: Path, members: Sequence[Member], progress: Callable[[int], object] = int
) -> None:
    """Write ``members`` in their order; the same members make the same bytes.

    output appears when it is complete. progress is told the bytes of each piece that was written.
    Memory: one piece. Raises LoadError.
    """
    try:
        with _appearing(output) as file, file.open("wb") as raw:
            # without a name and a time; tarfile writes those only that it is given
            with gzip.GzipFile("", "wb", _STORED, raw, mtime=0) as stream:
                _write_tar(stream, members, progress)
            raw.flush()
            os.fsync(raw.fileno())
    except OSError as error:
        raise LoadError(
            f"cannot write {output}: {error.strerror or error}; choose another output, or make room"
        ) from error


def read_archive(archive: Path, limits: Limits = LIMITS) -> Iterator[tuple[str, int, Content]]:
    """(name, bytes, content) of each file, in the archive's order.

    Content is read before the next is asked for, or never. A leading "./" is no part of a name.
    After the last, the archive's end and its checksum were looked at, too. Raises LoadError, naming
    the member, before anything of it can be read.
    """
    try:
        with archive.open("rb") as raw:
            yield from _files_of(archive, raw, limits)
    except OSError as error:
        raise LoadError(f"{archive} cannot be read: {error.strerror or error}") from error


def extract(
    archive: Path,
    folder: Path,
    *,
    wanted: Callable[[str], bool] = lambda _: True,
    limits: Limits = LIMITS,
) -> dict[str, int]:
    """Unpack the files whose names are ``wanted`` into a folder that is not there yet, or empty.

    Returns name -> bytes of all files. The folder appears when the whole archive was read and
    nothing was wrong with it. Raises LoadError.
    """
    sizes: dict[str, int] = {}
    try:
        with _appearing_folder(folder) as aside:
            for name, size, content in read_archive(archive, limits):
                sizes[name] = size
                if wanted(name):
                    file = aside / name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("xb") as stream:
                        shutil.copyfileobj(content, stream, BLOCK)
    except OSError as error:
        raise LoadError(
            f"cannot unpack {archive} into {folder}: {error.strerror or error}; choose another "
            "folder, or make room"
        ) from error
    return sizes


def _blocks_of(file: Path, changed_at: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block
        if os.fstat(stream.fileno()).st_mtime_ns != changed_at:
            raise OSError(f"{file} has changed while it was read")


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A file to write that becomes ``output`` when the block ends well, else is removed."""
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.absolute().parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, output)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


@contextmanager
def _appearing_folder(folder: Path) -> Iterator[Path]:
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        aside = Path(parent) / "unpacked"
        aside.mkdir()
        yield aside
        aside.rename(folder)  # over an empty one; refused over any other


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_tar(
    stream: gzip.GzipFile, members: Sequence[Member], progress: Callable[[int], object]
) -> None:
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)  # mtime 0, uid and gid 0, no names of theirs
            info.size, info.mode = member.size, 0o644
            pieces = _Pieces(member, progress)
            tar.addfile(info, pieces)  # type: ignore[arg-type]
            pieces.check_end()


class _Pieces:
    """A member's pieces as the file that tarfile reads exactly ``size`` bytes from."""

    def __init__(self, member: Member, progress: Callable[[int], object]) -> None:
        self._name = member.name
        self._pieces = iter(member.pieces())
        self._progress = progress
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            if not self._rest:
                self._rest = next(self._pieces, b"")
                if not self._rest:
                    raise OSError(f"{self._name} became shorter while it was read")
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        self._progress(size)
        return b"".join(parts)

    def check_end(self) -> None:
        if self._rest or next(self._pieces, b""):
            raise OSError(f"{self._name} became longer while it was read")


def _files_of(archive: Path, raw: BinaryIO, limits: Limits) -> Iterator[tuple[str, int, Content]]:
    stream = _Gunzipped(archive, raw, limits)
    seen = _Names(archive)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                name = _checked(archive, info)
                seen.add(name, info.isdir(), limits)
                if info.isdir():
                    continue
                if info.size > limits.bytes - stream.tell():
                    raise LoadError(
                        f"{archive}: {shown(name)} has {info.size} bytes, more than the "
                        f"{limits.bytes} of all that is unpacked"
                    )
                yield name, info.size, Content(stream, info.size)
        stream.check_end()
    except LoadError:
        raise
    except _DAMAGED as error:
        raise stream.damaged(str(error)) from error


def _checked(archive: Path, info: tarfile.TarInfo) -> str:
    """The member's name, if it is a plain file or folder inside. Raises LoadError."""
    name = info.name

    def refused(why: str) -> LoadError:
        return LoadError(f"{archive}: {shown(name)} {why}; it is refused")

    if info.type in _REFUSED_KINDS or info.sparse is not None:
        raise refused(_REFUSED_KINDS.get(info.type, "is a sparse file"))
    if not (info.isdir() or info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
        raise refused(f"is of the unknown kind {info.type!r}")
    if not name.isprintable() or "\\" in name:  # undecodable bytes are not printable either
        raise refused("has control characters or backslashes in its name")
    if name.startswith("/"):
        raise refused("is an absolute path")
    if ".." in name:
        raise refused('has ".." in its name, which DJLServing refuses')
    if info.size < 0:
        raise refused(f"has {info.size} bytes")
    plain = str(PurePosixPath(name))
    if plain == "." and not info.isdir():
        raise refused("has no name")
    return plain


class _Names:
    """The names so far: each once, none inside of what is a file."""

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._is_folder: dict[str, bool] = {}
        self._members = 0

    def add(self, name: str, is_folder: bool, limits: Limits) -> None:
        self._members += 1
        if self._members > limits.members:
            raise LoadError(f"{self._archive} has more than {limits.members} members")
        if not is_folder and name in self._is_folder:
            raise LoadError(f"{self._archive}: {shown(name)} is there twice; it is refused")
        folders = [str(parent) for parent in PurePosixPath(name).parents]
        for folder in (*folders, name) if is_folder else folders:
            if not self._is_folder.setdefault(folder, True):
                raise LoadError(
                    f"{self._archive}: {shown(folder)} is a file and a folder; it is refused"
                )
        self._is_folder.setdefault(name, is_folder)


class _Gunzipped:
    """What is in a gzip file, as tarfile reads it: forwards, and never much at once.

    Raises LoadError where the file is cut off, damaged, made of several gzip streams, or a bomb.
    """

    def __init__(self, archive: Path, raw: BinaryIO, limits: Limits) -> None:
        self._archive, self._raw, self._limits = archive, raw, limits
        self._stored_bytes = os.fstat(raw.fileno()).st_size
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise LoadError(f"{archive} is no file")
        self._inflate = zlib.decompressobj(wbits=31)  # a gzip header, and its checksum at the end
        self._buffer = b""
        self._position = 0
        self._last = b""

    def damaged(self, why: str) -> LoadError:
        return LoadError(f"{self._archive} is damaged, or no tar in gzip: {why}")

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise tarfile.ReadError("a member reaches behind its end")
        while self._position < position:
            if not self.read(min(BLOCK, position - self._position)):
                break
        return self._position

    def read(self, size: int) -> bytes:
        if size > _MOST_READ_AT_ONCE:
            raise LoadError(f"{self._archive} has a header of {size} bytes; it is refused")
        parts, missing = [], size
        while missing and (block := self._next(missing)):
            parts.append(block)
            missing -= len(block)
        self._last = b"".join(parts)
        self._position += len(self._last)
        self._check_amount()
        return self._last

    def check_end(self) -> None:
        """After tarfile saw the end: nothing but zeros until the stream's end and its checksum."""
        end = self._last
        if end != bytes(_TAR_BLOCK):
            raise self.damaged("a header in it is none, or its end is missing")
        while block := self.read(BLOCK):
            if block.strip(b"\0"):
                raise self.damaged("something follows the tar's end")
        if self._inflate.unused_data or self._raw.read(1):
            raise LoadError(
                f"{self._archive} is several gzip streams one behind the other, or something "
                "follows: DJLServing reads the first only; pack it anew"
            )

    def _next(self, most: int) -> bytes:
        """Up to ``most`` bytes; none at the end of the gzip stream."""
        while not self._inflate.eof:
            data = self._buffer or self._raw.read(1 << 16)
            if not data:
                raise LoadError(f"{self._archive} is cut off: copy or download it again")
            try:
                block = self._inflate.decompress(data, most)
            except zlib.error as error:
                raise LoadError(
                    f"{self._archive} is damaged, or not gzip ({error}): copy or download it again"
                ) from error
            self._buffer = self._inflate.unconsumed_tail
            if block:
                return block
        return b""

    def _check_amount(self) -> None:
        done, limits = self._position, self._limits
        if done > limits.bytes + limits.members * 4 * _TAR_BLOCK:
            raise LoadError(f"{self._archive} unpacks to more than {limits.bytes} bytes")
        if done > _RATIO_COUNTS_FROM and done > limits.ratio * self._stored_bytes:
            raise LoadError(
                f"{self._archive} unpacks to more than {limits.ratio} times its "
                f"{self._stored_bytes} bytes; it is refused"
            )
