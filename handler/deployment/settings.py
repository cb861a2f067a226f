"""From what ``deploy`` is told to values that are right, or an error that says what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from handler.config import (
    DJL_OWNED,
    MAX_ROWS_ON_CPU,
    MAX_ROWS_ON_GPU,
    PROPERTIES,
    canonical_name,
)
from handler.deployment.plan import GB, LONGEST_NAME, Autoscale
from handler.errors import LoadError, nearest, shown
from handler.packaging.images import IMAGES, find_image
from handler.packaging.instances import InstanceType, find_instance

_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/\S+")
_VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_REGISTRY = re.compile(r"\d{12}\.dkr\.ecr[.-]")
_NAMES = ", ".join(image.name for image in IMAGES.values() if image.sagemaker)
_LONGEST_VALUE = 1024  # of an environment variable, in SageMaker
_ROWS_VARIABLES = ("OPTION_MAX_ROLLING_BATCH_SIZE", "OPTION_MAX_ROWS")
# Where SageMaker's notebooks and Studio say what they are.
NOTEBOOK = Path("/opt/ml/metadata/resource-metadata.json")


def checked_name(name: str, argument: str) -> str:
    """Raises LoadError unless ``name`` is one that SageMaker takes."""
    if not _NAME.fullmatch(name):
        raise LoadError(
            f"{argument} must be 1 to {LONGEST_NAME} letters, digits and hyphens, with a letter "
            f"or digit at both ends, got {shown(name)}"
        )
    return name


def checked_number(value: int | None, allowed: range, argument: str, unit: str) -> int | None:
    """Raises LoadError."""
    if value is not None and value not in allowed:
        raise LoadError(
            f"{argument} must be from {allowed[0]} to {allowed[-1]} {unit}, got {value}"
        )
    return value


def find_role(
    given: str | None,
    environment: Mapping[str, str],
    notebook: Path = NOTEBOOK,
    role_of_instance: Callable[[str], str] | None = None,
) -> str:
    """The role that the container runs as: given, SAGEMAKER_ROLE's, or that of the notebook.

    role_of_instance: asks AWS for the role of a notebook instance, which only knows its name. In
    Studio it is on disk. Raises LoadError.
    """
    role = given or environment.get("SAGEMAKER_ROLE") or _notebooks_role(notebook, role_of_instance)
    if not role:
        raise LoadError(
            "no role for SageMaker to run the container with: give --role ARN or set "
            "SAGEMAKER_ROLE; aws iam list-roles lists those that there are"
        )
    if not _ROLE.fullmatch(role):
        raise LoadError(
            f"the role must be as arn:aws:iam::123456789012:role/NAME, got {shown(role)}; "
            "aws iam get-role --role-name NAME tells it"
        )
    return role


def _notebooks_role(file: Path, role_of_instance: Callable[[str], str] | None) -> str | None:
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        role, name = metadata.get("ExecutionRoleArn"), metadata.get("ResourceName")
    except (OSError, ValueError, AttributeError):
        return None
    if not role and name and "DomainId" not in metadata and role_of_instance:
        role = role_of_instance(str(name))
    return str(role) if role else None


def parsed_instances(text: str, volume_size: int | None) -> tuple[InstanceType, ...]:
    """``ml.g5.2xlarge,ml.g6.2xlarge``: the first is preferred. Raises LoadError."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise LoadError(f"--instance-type must be TYPE or TYPE,TYPE ..., got {shown(text)}")
    found = tuple(find_instance(name) for name in dict.fromkeys(names))
    if len({bool(instance.gpus) for instance in found}) > 1:
        raise LoadError(
            f"--instance-type {text} has types with and without GPUs, which need different images"
        )
    for instance in found:
        if volume_size is not None and instance.local_disk is not None:
            raise LoadError(
                f"--volume-size cannot be set for {instance.name}: it has a disk of its own, of "
                f"{instance.local_disk // GB} GB"
            )
    return found


def find_image_uri(given: str | None, region: str, instances: Sequence[InstanceType]) -> str:
    """The address of an image: given, that of a name, or of the one that fits the instance types.

    Raises LoadError.
    """
    if given and "/" in given:
        if not _REGISTRY.match(given):
            raise LoadError(
                f"--image {given} is not in ECR, where SageMaker takes images from: push it to "
                f"ACCOUNT.dkr.ecr.{region}.amazonaws.com/NAME:TAG, or name one of {_NAMES}"
            )
        return given
    gpu = bool(instances[0].gpus)
    image = find_image(given or ("lmi" if gpu else "djl-cpu"))
    if image.gpu and not gpu:
        raise LoadError(f"image {image.name} needs a GPU, and {instances[0].name} has none")
    return image.sagemaker_uri(region)


def find_ami(given: str, image: str) -> str | None:
    """The host that ``--inference-ami`` asks for: one by name, none, or auto, which looks at CUDA.

    An image of a newer CUDA needs a host with a newer NVIDIA driver than SageMaker's own. Drivers
    and CUDA versions: ProductionVariant's InferenceAmiVersion in SageMaker's API.
    """
    if given != "auto":
        return None if given == "none" else given
    match = re.search(r"-cu(\d{3})(?!\d)", image)
    cuda = int(match[1]) if match else 0
    if cuda >= 130:
        return "al2023-ami-sagemaker-inference-gpu-4-1"
    return "al2-ami-sagemaker-inference-gpu-3-1" if cuda >= 124 else None


def parsed_environment(settings: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` each. Raises LoadError."""
    environment = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not _VARIABLE.fullmatch(name):
            raise LoadError(f"--env must be NAME=VALUE, got {shown(setting)}")
        if len(value) > _LONGEST_VALUE:
            raise LoadError(
                f"--env {name} must have at most {_LONGEST_VALUE} characters, got {len(value)}"
            )
        _check_spelling(name)
        environment[name] = value
    return environment


def _check_spelling(variable: str) -> None:
    bare = variable.lower().removeprefix("option_")
    if bare == variable.lower() or canonical_name(bare) or bare in DJL_OWNED:
        return
    hint = nearest(bare, PROPERTIES)
    if hint:
        raise LoadError(
            f"--env {variable} is no property of this handler or of DJLServing; "
            f"did you mean OPTION_{hint.upper()}?"
        )


def parsed_autoscale(text: str, target: float | None, default: float) -> Autoscale:
    """``MIN:MAX``. Raises LoadError."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise LoadError(
            f"--autoscale must be MIN:MAX with 1 <= MIN <= MAX instances, or off, got {shown(text)}"
        )
    if target is not None and not 0 < target < 1e6:
        raise LoadError(f"--autoscale-target must be above 0 and below 1000000, got {target:g}")
    return Autoscale(int(match[1]), int(match[2]), default if target is None else target)


def default_target(instance: InstanceType, environment: Mapping[str, Any]) -> float:
    """Requests at a time that fill three quarters of the rows of an instance.

    The rest is for those that come while another instance starts, which takes minutes.
    """
    rows = MAX_ROWS_ON_GPU if instance.gpus else MAX_ROWS_ON_CPU
    told = [environment[name] for name in _ROWS_VARIABLES if name in environment]
    if told and told[0].isdigit():
        rows = int(told[0])
    return max(1.0, float(rows * 3 // 4))
