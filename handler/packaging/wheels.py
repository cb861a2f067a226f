"""Wheels in an archive, for endpoints that reach no package index."""

from __future__ import annotations

import base64
import email
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from handler.errors import LoadError
from handler.packaging.images import Image
from handler.packaging.requirements import THE_IMAGES_OWN

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# The oldest C library that wheels are built for: manylinux2014's.
_OLDEST_GLIBC = 17
_OLDER_PLATFORMS = ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64")


def download_wheels(image: Image, lines: Sequence[str], folder: Path) -> list[Path]:
    """Put into ``folder`` the wheels with which ``image`` installs ``lines`` without a network.

    By pip, for the image's Python and C library, beside the image's torch. Raises LoadError.
    """
    wanted = list(lines)
    with tempfile.TemporaryDirectory() as own:
        _write_stub("torch", _torch_of(image), Path(own))
        while wanted:
            _pip_download(image, [*lines, *wanted], Path(own), folder)
            for stub in folder.glob("torch-*"):
                stub.unlink()
            wanted = sorted(_missing(image, folder))
            lines = [*lines, *wanted]
    return sorted(folder.glob("*.whl"))


def _pip_download(image: Image, lines: Iterable[str], own: Path, folder: Path) -> None:
    constraints = own / "constraints.txt"
    constraints.write_text(f"torch=={_torch_of(image)}\n")
    version = image.python.replace(".", "")
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"),
        *("--only-binary", ":all:", "--dest", str(folder), "--constraint", str(constraints)),
        *("--find-links", str(own), "--implementation", "cp", "--python-version", image.python),
        *(word for abi in (f"cp{version}", "abi3", "none") for word in ("--abi", abi)),
        *(word for platform in _platforms(image) for word in ("--platform", platform)),
        *lines,
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        reason = [line for line in ran.stderr.splitlines() if line.strip()]
        told = next((line for line in reason if line.startswith("ERROR")), "".join(reason[-1:]))
        raise LoadError(
            f"--vendor-wheels: pip found no wheels for Python {image.python} of image "
            f"{image.name}: {told.removeprefix('ERROR: ')}"
        )


def _platforms(image: Image) -> list[str]:
    newest = int(image.glibc.split(".")[1])
    numbered = [f"manylinux_2_{n}_x86_64" for n in range(newest, _OLDEST_GLIBC - 1, -1)]
    return [*numbered, *_OLDER_PLATFORMS, "linux_x86_64"]


def _torch_of(image: Image) -> str:
    """A version that fits where the image's does, and that no index has."""
    return f"{image.torch or 0}+image"


def _write_stub(name: str, version: str, folder: Path) -> None:
    """A wheel with nothing in it, which stands for what the image has already."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, text)


def _digest(text: str) -> str:
    sha = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(sha).rstrip(b"=").decode()


def _missing(image: Image, folder: Path) -> Iterator[str]:
    """What the wheels need in the image and pip passed over.

    pip looks at conditions as "python_version < '3.11'" for the Python that it runs on itself.
    """
    from packaging.utils import canonicalize_name, parse_wheel_filename

    there = {parse_wheel_filename(wheel.name)[0] for wheel in folder.glob("*.whl")}
    there |= {canonicalize_name(name) for name in THE_IMAGES_OWN}
    for wheel in folder.glob("*.whl"):
        for requirement in _needs(wheel):
            if canonicalize_name(requirement.name) not in there and _applies(image, requirement):
                requirement.marker = None
                yield str(requirement)


def _needs(wheel: Path) -> Iterator[Requirement]:
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(names[0]))
    yield from map(Requirement, metadata.get_all("Requires-Dist", []))


def _applies(image: Image, requirement: Requirement) -> bool:
    environment = {
        "extra": "",
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{image.python}.0",
        "python_version": image.python,
        "sys_platform": "linux",
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)
