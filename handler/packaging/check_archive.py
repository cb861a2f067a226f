"""What lies in the folder, and where: entry point, handler, leftovers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from handler import __version__
from handler.packaging.findings import SERVED_FROM, Finding, Subject, error, warning

_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_MACOS = ("._*", ".DS_Store", "__MACOSX")
_TRAINING = ("optimizer.pt", "rng_state*.pth", "scheduler.pt", "training_args.bin")


def macos_files(s: Subject) -> Iterator[Finding]:
    found = sorted({path for pattern in _MACOS for path in s.folder.rglob(pattern)})
    if found:
        yield warning(
            "macos-files",
            f"{s.relative(found[0])} and {len(found) - 1} more are macOS's own; pack with "
            "COPYFILE_DISABLE=1 tar, which leaves them out",
        )


def training_files(s: Subject) -> Iterator[Finding]:
    found = sorted(path for pattern in _TRAINING for path in s.folder.glob(pattern))
    if found:
        yield warning(
            "training-files",
            f"{', '.join(path.name for path in found)}: left by training, never read, downloaded "
            "at every start; remove them",
        )


def entry_point(s: Subject) -> Iterator[Finding]:
    told = (s.properties or {}).get("option.entryPoint")
    name = told or "model.py"
    if "://" in name or name.startswith("djl_python"):
        return
    if name.endswith(".py"):
        # never joined as an absolute path, which would be one of this machine
        file = s.folder / name.removeprefix(f"{SERVED_FROM}/").lstrip("/")
    else:
        place = s.folder.joinpath(*name.split("."))
        module, package = place.with_suffix(".py"), place / "__init__.py"
        file = package if package.is_file() else module
    if not file.is_file():
        if told is None:
            yield error(
                "no-entry-point",
                "there is no model.py and no option.entryPoint: DJLServing would take a handler "
                "of its own; package the checkpoint, or add the shipped model.py",
            )
        else:
            yield error(
                "entry-point-missing",
                f"option.entryPoint={told}: the archive has no {s.relative(file)}; add it, or name "
                "one that is there (model.py, handler.model)",
            )
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as problem:
        yield error("entry-point-damaged", f"{s.relative(file)} is not Python: {problem}")
        return
    function = (s.properties or {}).get("option.handler", "handle")
    if function not in _names(tree):
        yield error(
            "entry-point-damaged",
            f"{s.relative(file)} defines no {function}(), which DJLServing calls; import it from "
            "handler.model, or name another by option.handler",
        )


def handler_package(s: Subject) -> Iterator[Finding]:
    file = s.folder / "handler" / "__init__.py"
    if not file.is_file():
        model = s.folder / "model.py"
        if model.is_file() and re.search(r"\bhandler\b", model.read_text(errors="replace")):
            yield error(
                "handler-missing",
                "model.py imports handler, and the archive has no handler/: put the package beside "
                "it",
            )
        return
    found = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
    if found is None or found.group(1) != __version__:
        seen = found.group(1) if found else "unknown"
        yield warning(
            "handler-version-mismatch",
            f"the archive's handler/ is version {seen}, this check is of {__version__}: what it "
            "finds may differ; check with the archive's version, or pack it again",
        )


def _names(tree: ast.Module) -> set[str]:
    """What the module's top level defines or imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


CHECKS = (macos_files, training_files, entry_point, handler_package)
