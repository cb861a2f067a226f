"""From a checkpoint to model.tar.gz: what DJLServing needs to serve it, and nothing else."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from handler.errors import LoadError
from handler.packaging import serving_properties as settings
from handler.packaging.archive import Member, write_archive
from handler.packaging.images import Image
from handler.packaging.modules import serving_files
from handler.packaging.requirements import (
    FILE,
    WHEELS,
    own_requirements,
    requirements_of,
    requirements_text,
)
from handler.packaging.weights import RESERVED, Weights, find_weights
from handler.packaging.wheels import download_wheels

Progress = Callable[[str, int, int], None]
"""(what is done, how much of it, of how much): tensors of a partition, bytes of an archive"""

ENTRY_POINT = '''"""DJLServing looks for model.py; the package handler beside it does the work."""

from handler.model import handle, partition

__all__ = ["handle", "partition"]
'''
# Of a member: its header, and what fills its last block.
_MOST_AROUND_A_MEMBER = 2048
_STORED_BLOCK = 16_000  # bytes that gzip stores with five more, at the least
_SPARE = 1 << 20


@dataclass(frozen=True)
class Order:
    """What to package.

    model: a folder, a model id of the hub, or an s3:// address; None where an option names where
    the endpoint gets its weights. options: (name, value) of properties. entry_point: a file to be
    model.py. partition: the weights converted ahead of time, as dtype and the degrees say.
    vendor_wheels: with the packages that the image lacks.
    """

    image: Image
    model: str | None = None
    options: Sequence[tuple[str, str]] = ()
    entry_point: Path | None = None
    partition: bool = False
    vendor_wheels: bool = False

    @property
    def folder(self) -> Path | None:
        """The model folder, if it is one on this machine."""
        return Path(self.model) if self.model is not None and Path(self.model).is_dir() else None


@dataclass(frozen=True)
class Packed:
    """What came out: the archive's bytes, its files, and where the endpoint finds the weights."""

    bytes: int
    files: int
    weights: str


def package(
    order: Order, output: Path, *, force: bool = False, progress: Progress | None = None
) -> Packed:
    """Write the archive; the same order makes the same bytes, but for the graphs of a partition in
    int8, whose form of weights is the one that was measured to be fast here.

    output appears when it is complete; one that is there is replaced only with ``force``. Memory:
    that of one tensor. Raises LoadError.
    """
    _refuse(output, force)
    tell = progress or _tell_nobody
    with _work_folder(output) as work:
        own = order.folder / settings.FILE if order.folder else None
        told = settings.serving_properties(order.image, order.options, own)
        weights = find_weights(
            order.image, order.model, told, work, order.partition, partial(tell, "partition")
        )
        members = _members(order, weights, work)
        total = sum(member.size for member in members)
        _check_room(output, members, total)
        done = 0

        def count(written: int) -> None:
            nonlocal done
            done += written
            tell("archive", done, total)

        made = work / "archive"
        write_archive(made, members, count)
        size = made.stat().st_size
        _refuse(output, force)
        os.replace(made, output)
    return Packed(size, len(members), weights.place)


def _tell_nobody(what: str, done: int, total: int) -> None:
    pass


def _members(order: Order, weights: Weights, work: Path) -> list[Member]:
    """In the archive's order: what says how it is served, then what is served."""
    entry_point, modules = _entry_point(order), _own_modules(order)
    files: dict[str, Path] = {}
    for name, text in {"model.py": entry_point, **modules}.items():
        files |= serving_files(text, name)
    configuration = weights.settings.configuration
    lines = requirements_of(order.image, configuration, weights.model_type)
    if order.folder is not None and (order.folder / FILE).is_file():
        lines += own_requirements(order.folder / FILE, order.image)
    ours = {
        FILE: requirements_text(order.image, lines, offline=order.vendor_wheels),
        "model.py": entry_point,
        **modules,
    }
    wheels: list[Path] = []
    if order.vendor_wheels:
        (work / WHEELS).mkdir()
        wheels = download_wheels(order.image, lines, work / WHEELS)
    contents = {name: text.encode() for name, text in ours.items()}
    contents[settings.FILE] = weights.settings.content
    return [
        *(Member.of_bytes(name, content) for name, content in sorted(contents.items())),
        *(Member.of_file(name, file) for name, file in sorted(files.items())),
        *(Member.of_file(f"{WHEELS}/{file.name}", file) for file in wheels),
        *sorted(weights.members, key=lambda member: member.name),
    ]


def _entry_point(order: Order) -> str:
    file = order.entry_point
    if file is None and order.folder is not None and (order.folder / "model.py").is_file():
        file = order.folder / "model.py"
    return ENTRY_POINT if file is None else _text(file)


def _own_modules(order: Order) -> dict[str, str]:
    """Other modules that lie in a folder of the user's own, as those that its model.py imports."""
    if order.folder is None:
        return {}
    files = [f for f in order.folder.glob("*.py") if f.is_file() and f.name not in RESERVED]
    return {file.name: _text(file) for file in files}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error


def _refuse(output: Path, force: bool) -> None:
    if output.is_dir():
        raise LoadError(
            f"{output} is a folder; name the archive to write, as {output}/model.tar.gz"
        )
    if output.suffixes[-2:] != [".tar", ".gz"] and output.suffix != ".tgz":
        raise LoadError(
            f"{output} must end in .tar.gz, by which SageMaker and DJLServing know what it is"
        )
    if output.exists() and not force:
        raise LoadError(f"{output} is there already; --force replaces it")


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` for what is in the making; of one run at a time.

    A run that was killed leaves it; the next one begins with removing it.
    """
    folder = output.absolute().with_name(f".{output.name}.work")
    try:
        handle = _locked(folder, output)
    except OSError as error:
        raise LoadError(
            f"cannot write beside {output}: {error.strerror}; choose another output"
        ) from error
    try:
        _clear(folder)
        try:
            yield folder
        finally:
            _clear(folder)
            with suppress(OSError):
                folder.rmdir()
    finally:
        os.close(handle)


def _locked(folder: Path, output: Path) -> int:
    """The folder, made if need be, as a descriptor that holds its lock."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            _lock(handle, output)
            if folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed by a run that ended before it was locked


def _lock(handle: int, output: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LoadError(f"{output} is being written by another process; wait for it") from None
    except OSError:  # a file system that locks no folders
        pass


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(output: Path, members: Sequence[Member], total: int) -> None:
    needed = total + total // _STORED_BLOCK * 5 + len(members) * _MOST_AROUND_A_MEMBER + _SPARE
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise LoadError(
            f"{output} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free there; "
            "make room, or choose another output"
        )
