"""Which files of this package serve: those that an entry point imports or runs, directly or not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import handler
from handler.errors import LoadError

_ROOT = Path(handler.__file__).parent
_NAME = handler.__name__
_SERVES = f"{_NAME}.model"
_MODULE = re.compile(rf"{_NAME}(\.\w+)+")


def serving_files(entry_point: str, name: str) -> dict[str, Path]:
    """Name in an archive -> file, of all modules that serve.

    entry_point: the text of the archive's own model.py, whose imports of ours come along; name: of
    it, for an error. Imports inside functions count. Raises LoadError where it is not Python.
    """
    try:
        waiting = [_SERVES, *_imported(ast.parse(entry_point))]
    except (SyntaxError, ValueError) as error:
        raise LoadError(f"{name} is not Python: {error}") from error
    found: dict[str, Path] = {}
    while waiting:
        file = _file(waiting.pop())
        if file is None:
            continue
        inside = f"{_NAME}/{file.relative_to(_ROOT).as_posix()}"
        if inside not in found:
            found[inside] = file
            waiting += _imports_of(file)
    return dict(sorted(found.items()))


@cache
def _imports_of(file: Path) -> frozenset[str]:
    return frozenset(_imported(ast.parse(file.read_text(encoding="utf-8"))))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Modules of ours and the packages that they are in, and names of none among them."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Constant) and _MODULE.fullmatch(str(node.value)):
            names = [str(node.value)]  # of a module that a process of its own runs
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == _NAME:
                yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _file(module: str) -> Path | None:
    place = _ROOT.joinpath(*module.split(".")[1:])
    files = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)
