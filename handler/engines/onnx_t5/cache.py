"""Built graphs on disk: found again by what they were built from, complete or not there at all."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from handler import __version__
from handler.errors import LoadError
from handler.machine import usable_cpus, users_cache

logger = logging.getLogger(__name__)

_BESIDE_THE_MODEL = ".onnx_t5"
_MANIFEST = "manifest.json"
_DIGESTS = "digests.json"
_ASIDE = ".building"
_CHUNK = 1 << 22


def cache_folder(checkpoint: Path, cache_dir: str | None) -> Path:
    """Where graphs are kept: cache_dir, else beside the model, else the user's cache.

    Raises LoadError where none can be written to.
    """
    own = users_cache()
    places = [beside_the_model(checkpoint), *([own] if own else [])]
    if cache_dir:
        places = [Path(cache_dir)]
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                return place
        except OSError as error:
            logger.info("graphs cannot be kept in %s: %s", place, error)
    raise LoadError(
        f"no place for built graphs: {', '.join(map(str, places))} cannot be written to; set "
        "option.cache_dir to a folder that can"
    )


def beside_the_model(checkpoint: Path) -> Path:
    """Where graphs come with a checkpoint, whether or not it can be written to."""
    return checkpoint / _BESIDE_THE_MODEL


@contextmanager
def writing_to(cache: Path) -> Iterator[None]:
    """Errors of the disk become LoadErrors."""
    try:
        yield
    except OSError as error:
        raise LoadError(
            f"graphs cannot be written to {cache}: {error}; set option.cache_dir to a folder with "
            "room"
        ) from error


def built(
    cache: Path,
    sources: Sequence[str],
    settings: str,
    build: Callable[[Path], None],
    shipped: Path | None = None,
) -> Path:
    """The folder of graphs for these sources and settings; calls ``build`` where it must.

    sources: digests of the files; shipped: another place where the graphs may be already.
    A folder appears under its name only when it is complete; one that is damaged is made anew.
    """
    key = hashlib.sha256(settings.encode())
    for part in (__version__, *sources):
        key.update(b"\0" + part.encode())
    name = key.hexdigest()[:32]
    for place in dict.fromkeys((cache, shipped or cache)):
        if _is_whole(place / name):
            return place / name
    folder = cache / name
    with writing_to(cache), _only_builder(folder):
        if not _is_whole(folder):  # another process may have built it meanwhile
            start = time.monotonic()
            _clear(folder)
            _build_aside(folder, build)
            logger.info("built %s in %.1f s", folder, time.monotonic() - start)
    return folder


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """While it lasts no other process builds this folder; a killed one holds nothing."""
    from filelock import FileLock

    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:  # not every network disk has locks
        logger.info("%s is built without a lock: %s", folder, error)
    try:
        yield
    finally:
        lock.release()


def _clear(folder: Path) -> None:
    """Remove what is damaged, and what builders that were killed left behind."""
    for path in (folder, *folder.parent.glob(f"{folder.name}.*{_ASIDE}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=_ASIDE, dir=folder.parent))
    aside.chmod(0o755)  # other users' processes may find it, too
    try:
        build(aside)
        files = {file.name: _size_and_checksum(file) for file in sorted(aside.iterdir())}
        (aside / _MANIFEST).write_text(json.dumps(files, indent=1))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / _MANIFEST).read_text())
        there = {file.name for file in folder.iterdir()} - {_MANIFEST}
        if not files or set(files) != there:
            raise ValueError(f"{_MANIFEST} does not name what is there")
        with ThreadPoolExecutor(usable_cpus()) as threads:
            seen = threads.map(_size_and_checksum, [folder / name for name in files])
            for (name, told), now in zip(files.items(), seen):
                if told != now:
                    raise ValueError(f"{name} is damaged")
    except FileNotFoundError:
        if folder.exists():
            logger.warning("%s is incomplete and is built anew", folder)
        return False
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is built anew: %s", folder, error)
        return False
    return True


def _size_and_checksum(file: Path) -> list[int]:
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
        return [stream.tell(), checksum]


def digest(file: Path, cache: Path) -> str:
    """SHA-256 of a file's content, remembered in ``cache`` while nothing touches the file."""
    known_file, name, status = cache / _DIGESTS, str(file.resolve()), file.stat()
    # ctime, too: tools that copy set mtime back to what the original has
    seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known: dict[str, list[object]] = {}
    try:
        known = dict(json.loads(known_file.read_text()))
        *then, found = known[name]
        if then == seen:
            return str(found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not there, or damaged
        pass
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha.update(chunk)
    known[name] = [*seen, sha.hexdigest()]
    try:
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            (Path(aside) / _DIGESTS).write_text(json.dumps(known))
            (Path(aside) / _DIGESTS).replace(known_file)
    except OSError:  # computed again at the next start
        pass
    return sha.hexdigest()
