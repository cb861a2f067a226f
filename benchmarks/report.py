"""Tables on the terminal, figures in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; the first one to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        print("  ".join((first, *others)))


def ratio(value: float) -> str:
    return f"{value:.2f}x"


def write_json(file: Path | None, content: Any) -> None:
    if file is not None:
        file.write_text(json.dumps(content, indent=1) + "\n")
