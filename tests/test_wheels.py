"""Wheels for endpoints without a network: those of the image's Python, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from handler.errors import LoadError
from handler.packaging.archive import extract
from handler.packaging.images import Image, find_image
from handler.packaging.package import Order, package
from handler.packaging.wheels import download_wheels

IMAGE = replace(find_image("djl-cpu"), requirements=("plain>=1",), onnx=())


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pip can reach: a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(
    index: Path, name: str, *needs: str, version: str = "1.5", tag: str = "py3-none-any"
) -> None:
    info = f"{name}-{version}.dist-info"
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    with zipfile.ZipFile(index / f"{name}-{version}-{tag}.whl", "w") as made:
        made.writestr(f"{name}.py", "")
        made.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        made.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        made.writestr(f"{info}/RECORD", "")


def downloaded(tmp_path: Path, image: Image, *lines: str) -> list[str]:
    folder = tmp_path / "wheels"
    folder.mkdir()
    return [file.name for file in download_wheels(image, lines, folder)]


def test_wheels_are_those_of_the_images_python_and_c_library(index: Path, tmp_path: Path) -> None:
    for tag in (
        *("cp39-cp39-manylinux2014_x86_64", "cp311-cp311-manylinux_2_35_x86_64"),
        *("cp311-cp311-manylinux_2_39_x86_64", "cp311-cp311-macosx_11_0_arm64"),
    ):
        wheel(index, "plain", tag=tag)
    assert downloaded(tmp_path, IMAGE, "plain") == [
        "plain-1.5-cp311-cp311-manylinux_2_35_x86_64.whl"
    ]


def test_conditions_are_looked_at_for_the_images_python(index: Path, tmp_path: Path) -> None:
    """pip itself would take those of the Python that it runs on, whichever that is."""
    old = replace(IMAGE, python="3.9")
    wheel(index, "plain", "needed; python_version < '3.10'", "other; sys_platform == 'win32'")
    wheel(index, "needed", "deeper==1.5; python_version == '3.9'", "optional; extra == 'x'")
    wheel(index, "deeper")
    assert downloaded(tmp_path, old, "plain") == [
        f"{name}-1.5-py3-none-any.whl" for name in ("deeper", "needed", "plain")
    ]


def test_torch_is_the_images(index: Path, tmp_path: Path) -> None:
    wheel(index, "plain", "torch>=2.0")
    wheel(index, "torch", version="99.0")
    assert downloaded(tmp_path, IMAGE, "plain") == ["plain-1.5-py3-none-any.whl"]


def test_what_does_not_go_with_the_images_torch(index: Path, tmp_path: Path) -> None:
    wheel(index, "plain", "torch>=90")
    with pytest.raises(LoadError, match=r"for Python 3\.11 of image djl-cpu: "):
        downloaded(tmp_path, IMAGE, "plain")


def test_what_has_no_wheel(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="requirement plain ") as refused:
        downloaded(tmp_path, IMAGE, "plain")
    assert "\n" not in str(refused.value)


def test_an_archive_with_wheels_installs_without_a_network(
    index: Path, tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command that DJLServing runs, from wherever it runs it."""
    wheel(index, "plain", "needed")
    wheel(index, "needed")
    output = tmp_path / "model.tar.gz"
    package(Order(IMAGE, str(demo), vendor_wheels=True), output)
    extract(output, tmp_path / "model")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    requirements = tmp_path / "model" / "requirements.txt"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run(
        [*pip, "--target", tmp_path / "site", "-r", requirements], cwd=os.sep, check=True
    )
    assert {"plain.py", "needed.py"} <= {file.name for file in (tmp_path / "site").iterdir()}
