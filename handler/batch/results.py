"""The output, the file of bad lines, and the journal that says how much of them counts."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, Union

from handler.batch.files import STANDARD, Content, GrowingFile, Line, StandardStream
from handler.batch.journal import Checkpoint, Journal, journal_of, read_journal
from handler.errors import LoadError
from handler.schemas.records import json_line

# What a kill costs at most; what stands before is on the disk.
COMMIT_SECONDS = 1.0

_File = Union[GrowingFile, StandardStream]


class Results:
    """Made for one run. ``begin`` comes first; then in the input's order ``answer``, ``refuse`` or
    ``skip`` for each line."""

    def __init__(self, output: Path, errors: Path | None, keeps_journal: bool) -> None:
        """Raises LoadError. errors: None for a file beside the output, stderr beside stdout."""
        self._output = output
        self._journal_file = journal_of(output) if keeps_journal and output != STANDARD else None
        self._journal: Journal | None = None
        self._lines: _File = _opened(output, sys.stdout)
        beside = STANDARD if output == STANDARD else output.with_name(f"{output.name}.errors")
        self.errors = errors or beside
        self._errors: _File = _opened(self.errors, sys.stderr)
        self.checkpoint = Checkpoint()
        self._committed_at = time.monotonic()

    @property
    def resumable(self) -> bool:
        return self._journal is not None

    def begin(self, settings: dict[str, Any], found: Content | None) -> Checkpoint:
        """Where to go on. found: the input, None where it cannot be read again. Raises LoadError
        where what is there was made otherwise."""
        then = self._journal_file and read_journal(self._journal_file)
        # without answers the output is empty also where nobody removed it to begin again
        if then and (self._lines.size or (then.checkpoint.bad and not then.checkpoint.answered)):
            assert found is not None
            then.refuse_others(settings, found, self._output)
            self.checkpoint = then.checkpoint
        else:
            self._refuse_to_overwrite()
        for file, name, size in (
            (self._lines, self._output, self.checkpoint.output),
            (self._errors, self.errors, self.checkpoint.errors),
        ):
            if file.size < size:
                raise LoadError(
                    f"{name} is shorter than {self._journal_file} says it was; remove "
                    f"{self._output}, {self._journal_file} and {self.errors} to begin again"
                )
            file.cut(size)
        if found is not None and self._journal_file:
            self._journal = Journal(settings, found, self.checkpoint)
            self._journal.write(self._journal_file)
        return self.checkpoint

    def _refuse_to_overwrite(self) -> None:
        for file, name in ((self._lines, self._output), (self._errors, self.errors)):
            if file.size:
                raise LoadError(
                    f"{name} is there already, and not from a batch that can be gone on with; "
                    "remove it or name another one"
                )

    def answer(self, line: Line, written: bytes) -> None:
        self._lines.write(written)
        self._advance(line, answered=1)

    def refuse(self, line: Line, code: int, reason: str) -> None:
        self._errors.write(json_line({"line": line.number, "code": code, "error": reason}))
        self._advance(line, bad=1)

    def skip(self, line: Line) -> None:
        self._advance(line)

    def commit_in_time(self) -> None:
        """Now and then, so that a kill costs no more than COMMIT_SECONDS of work."""
        if time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit()

    def commit(self, *, complete: bool = False) -> None:
        """First the files are on the disk, then the journal that says so."""
        self.checkpoint = replace(
            self.checkpoint,
            output=self._lines.sync(),
            errors=self._errors.sync(),
            complete=complete,
        )
        if self._journal is not None and self._journal_file is not None:
            replace(self._journal, checkpoint=self.checkpoint).write(self._journal_file)
        self._committed_at = time.monotonic()

    def close(self) -> None:
        self._lines.close()
        self._errors.close()
        if self.errors != STANDARD and not self.errors.stat().st_size:
            self.errors.unlink()

    def _advance(self, line: Line, answered: int = 0, bad: int = 0) -> None:
        self.checkpoint = replace(
            self.checkpoint,
            lines=line.number,
            offset=line.end,
            answered=self.checkpoint.answered + answered,
            bad=self.checkpoint.bad + bad,
        )


def _opened(path: Path, stream: TextIO | None) -> _File:
    return StandardStream(stream) if path == STANDARD else GrowingFile(path)
