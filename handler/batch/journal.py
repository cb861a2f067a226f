"""How far a batch has come: a small file beside the output, which a later run goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handler.batch.files import Content
from handler.errors import LoadError, shown


@dataclass(frozen=True)
class Checkpoint:
    """Lines of the input that are dealt with, blank ones too, and where the files end then.

    offset: bytes of the unpacked input; answered, bad: lines written to either file; output,
    errors: the files' bytes.
    """

    lines: int = 0
    offset: int = 0
    answered: int = 0
    bad: int = 0
    output: int = 0
    errors: int = 0
    complete: bool = False


@dataclass(frozen=True)
class Journal:
    """settings: what the answers depend on, by the name that a person knows it by."""

    settings: dict[str, Any]
    input: Content
    checkpoint: Checkpoint = Checkpoint()

    def write(self, file: Path) -> None:
        """At once or not at all. Raises LoadError."""
        new = file.with_name(f"{file.name}.new")
        try:
            with new.open("w", encoding="utf-8") as stream:
                json.dump(asdict(self), stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            new.replace(file)
            folder = os.open(file.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise LoadError(f"{file} cannot be written: {error.strerror}") from error

    def refuse_others(self, settings: dict[str, Any], found: Content, output: Path) -> None:
        """Raises LoadError where another input or other settings would be gone on with."""
        again = f"remove {output}, {journal_of(output)} and the file of bad lines to begin again"
        for name in {**self.settings, **settings}:
            then, now = self.settings.get(name), settings.get(name)
            if then != now:
                raise LoadError(
                    f"{output} was begun with {name} {shown(then)}, it is now {shown(now)}; set it "
                    f"as it was, or {again}"
                )
        if found != self.input:
            raise LoadError(
                f"the input has changed since {output} was begun: it had {self.input.lines} lines, "
                f"it has {found.lines}, or others; restore it, or {again}"
            )


def journal_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress")


def read_journal(file: Path) -> Journal | None:
    """None where there is none. Raises LoadError."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return Journal(
            fields["settings"], Content(**fields["input"]), Checkpoint(**fields["checkpoint"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file} cannot be read ({error}); remove it and the output") from error
