"""The files of the package that go into an archive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from handler.errors import LoadError
from handler.packaging.modules import serving_files

ENTRY_POINT = (ROOT / "model.py").read_text()


def test_engines_that_are_imported_late_are_there_and_nothing_that_only_ships() -> None:
    names = serving_files(ENTRY_POINT, "model.py").keys()
    assert {
        "handler/__init__.py",
        "handler/model.py",
        "handler/engines/hf_generate.py",
        "handler/engines/fastertransformer.py",
        "handler/engines/onnx_t5/build.py",
        "handler/checkpoints/s3_tools.py",
        "handler/checkpoints/partition.py",
        "handler/engines/torch_ranks/rank.py",  # run as a process, imported by nobody
    } <= names
    for not_serving in ("cli", "packaging", "deployment", "server.py", "__main__.py"):
        assert not [n for n in names if n.startswith(f"handler/{not_serving}")], not_serving


def test_what_an_entry_point_of_ones_own_imports_comes_along() -> None:
    names = serving_files("def f():\n    from handler import server", "model.py").keys()
    assert "handler/server.py" in names


def test_an_entry_point_that_is_not_python() -> None:
    with pytest.raises(LoadError, match=r"mine\.py is not Python: "):
        serving_files("def handle(", "mine.py")


def test_they_import_each_other_and_nothing_else_of_the_package(tmp_path: Path) -> None:
    """Each module, one after another, where no other file of the package is."""
    modules = []
    for name, file in serving_files(ENTRY_POINT, "model.py").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(file.read_bytes())
        modules.append(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    code = f"import importlib, handler\nfor m in {modules}: importlib.import_module(m)\n"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}print(handler.__file__)"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(tmp_path / "handler" / "__init__.py")
