"""requirements.txt of an archive: what the image lacks to serve the model, and nothing it has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from handler.checkpoints.architecture import T5_FAMILY
from handler.config import Configuration
from handler.errors import LoadError
from handler.packaging.images import Image

FILE = "requirements.txt"
WHEELS = "requirements"
_COMMENT = "# What DJLServing installs at start; what the image {} has is not replaced.\n"
_OFFLINE = f"--no-index\n--find-links {WHEELS}\n"
# Built for the image's GPUs; another would not fit its CUDA, its transformers or its vLLM.
THE_IMAGES_OWN = ("torch", "torchvision", "torchaudio", "vllm", "triton")


def requirements_of(image: Image, c: Configuration, model_type: str | None) -> list[str]:
    """What ``image`` lacks to serve this model. model_type: None where it is not known.

    A T5 runs on torch where there are GPUs, on ONNX Runtime where there are none.
    """
    lines = list(image.requirements)
    if not image.gpu or c.backend == "onnxruntime":
        lines += image.onnx
    if model_type not in T5_FAMILY or c.backend == "transformers":
        lines += image.transformers_requirements
    return lines


def own_requirements(file: Path, image: Image) -> list[str]:
    """The lines of a folder's own requirements.txt. Raises LoadError where one would do harm."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read: {error}") from error
    lines = [line.split(" #")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        try:
            name = canonicalize_name(Requirement(line).name)
        except InvalidRequirement:
            raise LoadError(
                f"{file}: {line!r} is not a package with versions, as name>=1.2; options, files "
                "and addresses are not taken into an archive"
            ) from None
        if name in THE_IMAGES_OWN:
            raise LoadError(
                f"{file}: {line!r} could replace the {name} of image {image.name}; remove the line"
            )
    return lines


def requirements_text(image: Image, lines: Sequence[str], *, offline: bool) -> str:
    return (
        _COMMENT.format(image.name)
        + (_OFFLINE if offline else "")
        + "".join(f"{line}\n" for line in lines)
    )
