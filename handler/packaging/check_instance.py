"""Whether the model fits the image and the instance type that it is to run on."""

from __future__ import annotations

from collections.abc import Iterator

from handler.checkpoints.partitioned import as_partitioned
from handler.checkpoints.read import CheckpointWeights
from handler.checkpoints.splits import check_degree
from handler.engines.fastertransformer_loading import quality_warning, refusal
from handler.errors import LoadError
from handler.packaging.findings import Finding, Subject, error, warning
from handler.packaging.plan import Wanted, plan_for


def image_and_instance(s: Subject) -> Iterator[Finding]:
    if s.image is None or s.instance is None:
        return
    if s.image.gpu and s.image.name == "fastertransformer" and not s.instance.gpus:
        yield error(
            "image-needs-gpu",
            f"image {s.image.name} computes on GPUs alone, {s.instance.name} has none; take image "
            "djl-cpu, or a type with GPUs",
        )
    elif s.instance.gpus and not s.image.gpu:
        yield warning(
            "image-without-gpu",
            f"image {s.image.name} has no CUDA: the GPUs of {s.instance.name} would stay idle; "
            "take image lmi, or a type without GPUs",
        )


def degree(s: Subject) -> Iterator[Finding]:
    """Where ranks share the layers; transformers puts whole layers on each GPU."""
    c = s.configuration
    a = s.architecture
    if c is None or a is None or not isinstance(c.tensor_parallel_degree, int):
        return
    if c.backend != "transformers" and c.tensor_parallel_degree > 1:
        try:
            check_degree(a, c.tensor_parallel_degree, "option.tensor_parallel_degree")
        except LoadError as problem:
            yield error("heads-not-divisible", problem)


def the_wheel(s: Subject) -> Iterator[Finding]:
    """What FasterTransformer refuses, or answers badly."""
    if s.config is None or s.configuration is None or s.architecture is None:
        return
    if not _by_the_wheel(s):
        return
    config = dict(s.config)
    ready = s.checkpoint is not None and (s.checkpoint / "partition.json").is_file()
    why = refusal(config, s.configuration, ready_made=ready)
    if why is not None:
        yield error("not-for-fastertransformer", why)
        return
    spoilt = quality_warning(config, s.configuration)
    if spoilt is not None:
        kind = error if s.configuration.strict_dtype else warning
        yield kind("fp16-overflows", spoilt)


def room(s: Subject) -> Iterator[Finding]:
    """Memory, disk, GPUs and number formats, as plan estimates them."""
    c, instance, a = s.configuration, s.instance, s.architecture
    if instance is None or c is None or a is None or s.checkpoint is None:
        return
    if isinstance(c.tensor_parallel_degree, int) and c.tensor_parallel_degree > max(
        1, instance.gpus
    ):
        kind = error if instance.gpus else warning  # ranks on a CPU work, one after the other
        yield kind(
            "degree-exceeds-gpus",
            f"option.tensor_parallel_degree={c.tensor_parallel_degree} needs as many GPUs, "
            f"{instance.name} has {instance.gpus}; lower it, or take a larger type",
        )
        return
    if _by_the_wheel(s):  # whose memory is not known
        return
    files = [file for file in s.folder.rglob("*") if file.is_file()]
    stored = sum(file.stat().st_size for file in files)
    try:
        names = frozenset(CheckpointWeights(s.checkpoint))
    except LoadError:
        names = frozenset()
    try:
        wanted = Wanted(a, as_partitioned(c, s.checkpoint), stored, names)
        p = plan_for(wanted, instance)
    except LoadError:  # partition.json, which was told above
        return
    if p.reason and p.problem != "heads-not-divisible":
        yield error(p.problem, f"{instance.name}: {p.reason}")
    elif p.footprint.degree > 1 and c.tensor_parallel_degree == 1:
        yield error(
            "too-large-for-memory",
            f"{instance.name}: one GPU does not hold it, {p.footprint.degree} do; set "
            f"option.tensor_parallel_degree={p.footprint.degree}",
        )


def _by_the_wheel(s: Subject) -> bool:
    engine = (s.properties or {}).get("engine")
    told = s.configuration.backend if s.configuration else "auto"
    in_image = s.image is not None and s.image.name == "fastertransformer"
    by_default = engine == "FasterTransformer" or in_image
    return told == "fastertransformer" or (told == "auto" and by_default)


CHECKS = (image_and_instance, degree, the_wheel, room)
