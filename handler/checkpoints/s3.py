"""Downloads from S3 into a cache, where they are found again and checked at each start.

``<cache>/s3/<bucket>-<digest of the address>/<digest of what S3 lists>/``: what is changed in S3 is
another folder. Such a folder appears when it is complete; until then it is ``....partial``, and
what is whole in that is kept for the next try.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from handler.checkpoints.progress import Progress
from handler.checkpoints.s3_check import (
    MANIFEST,
    CheckedFile,
    check,
    damaged_files,
    recorded,
    write_manifest,
)
from handler.checkpoints.s3_tools import S3Failure, S3Object, S3Place, S3Tool, find_tool
from handler.checkpoints.selection import Selection
from handler.errors import LoadError
from handler.machine import usable_cpus, users_cache

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
_ATTEMPTS = 4
_FIRST_WAIT = 1.0  # seconds between attempts, doubled each time
_STALL_SECONDS = 120


def download(address: str, selection: Selection, *, option: str, cache_dir: str | None) -> Path:
    """The folder with the selection's files of ``s3://bucket/prefix``, from the cache if there.

    One process of a host downloads, the others wait for it. Every file is checked when it is
    downloaded and at each later start (see s3_check). When S3 cannot be reached, what was
    downloaded last is used. option: the property to name in errors. Raises LoadError.
    """
    with _told_as_load_errors(f"option.{option}={address}"):
        place = _parsed(address)
        tool = find_tool()
        if tool is None:
            raise LoadError(
                "reading S3 needs the package boto3 or the program s5cmd: install one of them"
            )
        digest = hashlib.sha256(f"{place.bucket}/{place.prefix}".encode()).hexdigest()[:16]
        versions = _cache(cache_dir) / f"{place.bucket}-{digest}"
        try:
            wanted = _chosen(tool.listing(place), selection, place)
        except S3Failure as failure:
            return _last_version(versions, failure)
        return _Download(tool, place, wanted, versions).folder()


@dataclass
class _Download:
    tool: S3Tool
    place: S3Place
    wanted: Sequence[S3Object]
    versions: Path

    def folder(self) -> Path:
        """The complete folder of what is wanted, which is downloaded where it must be."""
        version = hashlib.sha256(repr(sorted(self.wanted)).encode()).hexdigest()[:16]
        folder = self.versions / version
        if damaged_files(folder, self.wanted) == []:
            return folder
        self.versions.mkdir(parents=True, exist_ok=True)
        with _lock(self.versions / f"{version}.lock"):
            bad = damaged_files(folder, self.wanted)
            if bad == []:  # another process was first
                return folder
            partial = folder.with_name(f"{version}.partial")
            if folder.exists():
                logger.warning("%s is damaged (%s), downloading it again", folder, bad or MANIFEST)
                for name in bad or ():
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                folder.rename(partial)
            partial.mkdir(exist_ok=True)
            self._remove_leftovers(partial)
            whole = self._complete(partial)
            self._remove_leftovers(partial)
            write_manifest(partial, whole)
            partial.rename(folder)
        return folder

    def _complete(self, partial: Path) -> dict[str, CheckedFile]:
        """Fetch what is not whole in ``partial``."""
        whole: dict[str, CheckedFile] = {}
        failure = S3Failure("")
        for attempt in range(_ATTEMPTS):
            if attempt:
                wait = _FIRST_WAIT * 2 ** (attempt - 1)
                logger.warning("download failed, next attempt in %.0f s: %s", wait, failure)
                time.sleep(wait)
            try:
                missing = self._missing(partial, whole)
                if missing:
                    self._fetch(missing, partial)
                    missing = self._missing(partial, whole)
                if not missing:
                    return whole
                failure = S3Failure(
                    f"what arrived as {missing[0].name} is not what S3 lists (size "
                    f"{missing[0].size}, ETag {missing[0].etag})"
                )
            except S3Failure as error:
                if error.final:
                    raise
                failure = error
        raise S3Failure(f"{failure} ({_ATTEMPTS} attempts)")

    def _remove_leftovers(self, partial: Path) -> None:
        """Of a download that was cut off: ``name<digits>`` of s5cmd, ``name.<random>`` of boto3."""
        names = {wanted.name for wanted in self.wanted}
        for file in partial.iterdir():
            if file.name not in names:
                file.unlink(missing_ok=True)

    def _missing(self, partial: Path, whole: dict[str, CheckedFile]) -> list[S3Object]:
        """What is not yet whole; files that are damaged are removed."""
        unknown = [wanted for wanted in self.wanted if wanted.name not in whole]

        def checked(wanted: S3Object) -> CheckedFile | None:
            details = functools.partial(self.tool.details, self.place, wanted.name)
            return check(partial / wanted.name, wanted, details)

        with ThreadPoolExecutor(min(8, usable_cpus())) as pool:
            for wanted, file in zip(unknown, pool.map(checked, unknown)):
                if file is None:
                    (partial / wanted.name).unlink(missing_ok=True)
                else:
                    whole[wanted.name] = file
        return [wanted for wanted in unknown if wanted.name not in whole]

    def _fetch(self, missing: Sequence[S3Object], partial: Path) -> None:
        size = sum(wanted.size for wanted in missing)
        free = shutil.disk_usage(partial).free
        if size > free:
            raise S3Failure(
                f"{size / 1e9:.1f} GB do not fit into {partial.parent}, which has "
                f"{free / 1e9:.1f} GB free; set option.cache_dir to a folder with room",
                final=True,
            )
        source = f"s3://{self.place.bucket}/{self.place.prefix}"
        with Progress(source, partial, size) as progress:
            self.tool.fetch(
                self.place,
                [wanted.name for wanted in missing],
                partial,
                lambda: progress.idle_seconds > _STALL_SECONDS,
            )


def _parsed(address: str) -> S3Place:
    """With or without the slash or star at the end, as DJLServing takes it."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise LoadError("it must be s3://bucket/prefix")
    prefix = (match.group(2) or "").rstrip("*").rstrip("/")
    if re.search(r"[*?\[\]]", prefix):
        raise LoadError("its prefix must not have wildcards")
    return S3Place(match.group(1), f"{prefix}/" if prefix else "")


def _chosen(listed: Sequence[S3Object], selection: Selection, place: S3Place) -> list[S3Object]:
    names = set(selection.chosen([each.name for each in listed]))
    if selection.description not in names:
        raise LoadError(f"bucket {place.bucket} has no key {place.prefix}{selection.description}")
    return [each for each in listed if each.name in names]


def _last_version(versions: Path, failure: S3Failure) -> Path:
    """What was downloaded last and is whole. Raises ``failure`` unless nobody answers."""
    if not failure.unreachable:
        raise failure
    found = sorted(versions.glob(f"*/{MANIFEST}"), key=lambda f: f.stat().st_mtime, reverse=True)
    for folder in (file.parent for file in found):
        if (
            not folder.name.endswith(".partial")
            and damaged_files(folder, recorded(folder) or ()) == []
        ):
            logger.warning("%s; using what was downloaded before, %s", failure, folder)
            return folder
    raise failure


def _cache(cache_dir: str | None) -> Path:
    cache = Path(cache_dir) if cache_dir else users_cache()
    if cache is None:
        raise LoadError(
            "there is no place for downloads, the user has no home: set option.cache_dir"
        )
    return cache / "s3"


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Held by one process of this host; a process that dies gives it up."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is downloading; waiting for it (%s)", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _told_as_load_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (LoadError, S3Failure) as error:
        raise LoadError(f"{what}: {error}") from error
    except OSError as error:
        raise LoadError(
            f"{what} cannot be kept: {error}; set option.cache_dir to a folder with room"
        ) from error
