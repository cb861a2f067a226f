"""How far a batch is: a bar on a terminal, else lines in the log."""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} lines [{elapsed}<{remaining}{postfix}]"
_BAR_WITHOUT_TOTAL = "{n_fmt} lines [{elapsed}{postfix}]"


class Progress:
    """total: lines of the input, None where that is not known; done: those of an earlier run."""

    def __init__(self, total: int | None, done: int) -> None:
        from tqdm import tqdm

        self._total, self._done = total, done
        self._prompts = self._tokens = 0
        self._start = self._told_at = time.monotonic()
        self._begun_with = done
        self._bar = tqdm(
            total=total,
            initial=done,
            bar_format=_BAR if total else _BAR_WITHOUT_TOTAL,
            disable=not sys.stderr.isatty(),
        )

    @property
    def rates(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-3)
        rates = f"{self._prompts / seconds:.1f} prompts/s"
        return f"{rates}, {self._tokens / seconds:.0f} tokens/s" if self._tokens else rates

    def advance(self, done: int, prompts: int = 0, tokens: int = 0) -> None:
        """done: lines in all; prompts, tokens: what was answered since the last call."""
        self._prompts += prompts
        self._tokens += tokens
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if now - self._told_at < (1.0 if not self._bar.disable else _LOG_SECONDS):
            return
        self._told_at = now
        if self._bar.disable:
            logger.info("%s%s", self._lines(), self._left(now))
        else:
            self._bar.set_postfix_str(self.rates)

    def close(self) -> None:
        self._bar.close()

    def _lines(self) -> str:
        of_all = f" of {self._total}" if self._total else ""
        return f"{self._done}{of_all} lines, {self.rates}"

    def _left(self, now: float) -> str:
        new = self._done - self._begun_with
        if not self._total or not new:
            return ""
        minutes = (self._total - self._done) * (now - self._start) / new / 60
        return f", {minutes:.0f} min left"
