"""What would fail on the endpoint, found before anything is uploaded.

The checks are small generators of Findings, one for each concern, in the files check_*.py. They
ask the code that loads and serves, so that a check and a server never disagree.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handler.checkpoints.find import model_config
from handler.config import read_configuration, serving_properties
from handler.errors import LoadError
from handler.packaging import check_archive, check_checkpoint, check_instance, check_properties
from handler.packaging.archive import extract
from handler.packaging.findings import Finding, Subject, checkpoint_folder, error
from handler.packaging.images import Image
from handler.packaging.instances import InstanceType

CHECKS = (
    *check_archive.CHECKS,
    *check_properties.CHECKS,
    *check_checkpoint.CHECKS,
    *check_instance.CHECKS,
)
# Of one's content to the archive's size: bf16 shrinks by a fifth.
_MOST_SHRUNK = 1.3


class BadArchive(Exception):
    """An archive that was not unpacked; ``finding`` says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


@contextmanager
def unpacked(place: Path) -> Iterator[Path]:
    """The folder itself, or an archive's content in a temporary one.

    Raises BadArchive; LoadError where there is no such file, or no room to unpack it.
    """
    if place.is_dir():
        yield place.resolve()
        return
    if not place.is_file():
        raise LoadError(f"{place}: no such archive or folder")
    with tempfile.TemporaryDirectory(prefix="check-") as work:
        needed = int(_MOST_SHRUNK * place.stat().st_size)
        free = shutil.disk_usage(work).free
        if free < needed:
            raise LoadError(
                f"unpacking {place} takes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                f"free in {tempfile.gettempdir()}; make room, or set TMPDIR"
            )
        folder = Path(work).resolve() / "model"
        try:
            extract(place, folder)
        except LoadError as problem:
            if "make room" in str(problem):
                raise
            refused = "refused" in str(problem) or "more than" in str(problem)
            name = "unsafe-member" if refused else "damaged-archive"
            raise BadArchive(error(name, problem)) from problem
        yield folder


def check(
    folder: Path, image: Image | None = None, instance: InstanceType | None = None
) -> list[Finding]:
    """What is wrong with an unpacked model folder, errors first. Reads all of its weights."""
    nested = _nested(folder)
    findings = []
    if nested is not None:
        findings.append(
            error(
                "nested-folder",
                f"all lies in the folder {nested.name}/: SageMaker unpacks it to "
                f"/opt/ml/model/{nested.name}, where nothing looks; pack the folder's contents "
                f"(tar -C {nested.name} -czf model.tar.gz .)",
            )
        )
    subject = subject_of(nested or folder, image, instance)
    findings += [finding for each in CHECKS for finding in each(subject)]
    return sorted(dict.fromkeys(findings), key=lambda f: f.severity)


def subject_of(folder: Path, image: Image | None, instance: InstanceType | None) -> Subject:
    properties = configuration = checkpoint = config = None
    try:
        properties = serving_properties(folder)
        told = {k: v for k, v in properties.items() if k.startswith("option.")}
        configuration = read_configuration(properties=told)
    except LoadError:  # told by check_properties
        pass
    try:
        checkpoint = checkpoint_folder(folder, configuration) if configuration else folder
        config = model_config(checkpoint) if checkpoint else None
    except LoadError:  # told by check_properties, check_checkpoint
        pass
    return Subject(folder, properties, configuration, checkpoint, config, image, instance)


def _nested(folder: Path) -> Path | None:
    """The only thing in the folder, if that is a folder with a model in it."""
    inside = [path for path in folder.iterdir() if not path.name.startswith("._")]
    if len(inside) != 1 or not inside[0].is_dir():
        return None
    marks = ("serving.properties", "model.py", "config.json")
    return inside[0] if any((inside[0] / mark).is_file() for mark in marks) else None
