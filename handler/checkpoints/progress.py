"""Progress of a download: a bar on a terminal, else lines in the log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LOG_SECONDS = 10.0
_LOG_PERCENT = 10


class Progress:
    """Watches, in a thread of its own, how much of ``total`` bytes a folder has got."""

    def __init__(self, source: str, folder: Path, total: int) -> None:
        self._source = source
        self._folder = folder
        self._total = total
        self._before = _occupied(folder)
        self._done = 0
        self._grew_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="download-progress", daemon=True)

    @property
    def idle_seconds(self) -> float:
        """How long nothing has arrived."""
        return time.monotonic() - self._grew_at

    def __enter__(self) -> Progress:
        logger.info("downloading %s: %s", self._source, _bytes(self._total))
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is None:
            seconds = time.monotonic() - self._start
            rate = self._total / max(seconds, 1e-3)
            logger.info("downloaded %s in %.1f s, %s/s", self._source, seconds, _bytes(rate))

    def _watch(self) -> None:
        bar = self._bar() if sys.stderr.isatty() else None
        told_at, told = time.monotonic(), 0
        while not self._ended.wait(_POLL_SECONDS):
            done = min(max(_occupied(self._folder) - self._before, 0), self._total)
            if done > self._done:
                self._grew_at = time.monotonic()
            if bar is not None:
                bar.update(done - self._done)
            self._done = done
            percent, now = 100 * done // max(self._total, 1), time.monotonic()
            if bar is None and (percent - told >= _LOG_PERCENT or now - told_at >= _LOG_SECONDS):
                told_at, told = now, percent
                logger.info(
                    "downloading %s: %d %% of %s", self._source, percent, _bytes(self._total)
                )
        if bar is not None:
            bar.close()

    def _bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=self._total, unit="B", unit_scale=True, desc=self._source)


def _occupied(folder: Path) -> int:
    """Bytes of disk that files take: programs that write parts side by side set the size first."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
