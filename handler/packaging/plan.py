"""Which instance types hold a model, how it is set there, and how fast a step can be at best.

Needs config.json alone. Memory is memory.py's estimate. The time of a step is a lower bound: what
must be read of a GPU's memory, over its bandwidth. AWS publishes no bandwidth of its CPUs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler.checkpoints import hub
from handler.checkpoints.architecture import T5_FAMILY, T5Architecture
from handler.checkpoints.find import model_config, read_json_object
from handler.checkpoints.partitioned import as_partitioned
from handler.checkpoints.read import CheckpointWeights
from handler.checkpoints.splits import check_degree
from handler.config import MAX_ROWS_ON_CPU, MAX_ROWS_ON_GPU, Configuration
from handler.errors import LoadError
from handler.packaging.instances import GB, GIB, INSTANCES, InstanceType
from handler.packaging.memory import Footprint, Workload

# What each backend computes in, on GPUs (True) and on CPUs.
_DTYPES = {
    ("torch", True): ("bf16", "fp16", "fp32", "int8"),
    ("torch", False): ("fp32", "bf16", "fp16", "int8"),
    ("transformers", True): ("bf16", "fp16", "fp32"),
    ("transformers", False): ("fp32", "bf16"),
    ("onnxruntime", False): ("fp32", "int8"),
}
_BF16_CAPABILITY = (8, 0)
_STORED_BYTES = {"float16": 2, "bfloat16": 2}
# The parts of a GPU's free memory that backend torch gives to rows, transformers to weights.
_ROWS_SHARE, _WEIGHTS_SHARE = 0.85, 0.8
_LARGEST_VOLUME = 512 * GB  # VolumeSizeInGB
_BESIDE_IN_MEMORY = 2 * GIB


@dataclass(frozen=True)
class Wanted:
    """A model, and how it is to be served. stored: bytes of its files; names: its tensors'."""

    architecture: T5Architecture
    configuration: Configuration
    stored: int
    names: Container[str] = ()

    @staticmethod
    def of(c: Configuration) -> Wanted:
        """By config.json, from the hub if need be. Raises LoadError."""
        config, folder = _config(c)
        if config["model_type"] not in T5_FAMILY:
            raise LoadError(
                f"model type {config['model_type']} is not of the T5 family "
                f"({', '.join(T5_FAMILY)}), whose sizes alone are known here"
            )
        a = T5Architecture.from_config(config)
        c = as_partitioned(c, folder) if folder else c
        try:
            weights = CheckpointWeights(folder) if folder else None
            if weights is not None:
                return Wanted(a, c, weights.stored_bytes, frozenset(weights))
        except LoadError:  # only config.json is needed
            pass
        told = str(config.get("dtype") or config.get("torch_dtype"))
        numbers = Footprint(a, "transformers", "fp32").all_weights // 4
        return Wanted(a, c, numbers * _STORED_BYTES.get(told, 4))


@dataclass(frozen=True)
class Plan:
    """How a model is served on a type, or why it is not (``reason``, else empty).

    problem: a short name of the reason, as `check` uses it.
    needed, available: bytes of one GPU, or of the machine. most_rows: that fit at these lengths.
    """

    instance: InstanceType
    footprint: Footprint
    work: Workload
    available: int
    most_rows: int
    problem: str = ""
    reason: str = ""

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def needed(self) -> int:
        return self.footprint.total(self.work)

    def step_ms(self, rows: int) -> float | None:
        """The least that a step of ``rows`` rows at their full lengths takes; None on CPUs."""
        if not self.instance.gpus:
            return None
        work = replace(self.work, rows=rows)
        one_after_another = self.footprint.backend == "transformers"
        caches = self.footprint.cache_of_all_devices if one_after_another else self.footprint.caches
        read = self.footprint.read_by_a_step + caches(work)
        return 1000 * read / self.instance.gpu_bandwidth

    @property
    def options(self) -> dict[str, str]:
        """Properties to set, by name."""
        f, work = self.footprint, self.work
        told = {
            "dtype": f.dtype,
            "max_rows": work.rows,
            "max_input_tokens": work.input_tokens,
            "max_output_tokens": work.output_tokens,
        }
        if f.degree > 1:
            told["tensor_parallel_degree"] = f.degree
        return {name: str(value) for name, value in told.items()}


def plan(wanted: Wanted, instances: Iterable[InstanceType] = INSTANCES.values()) -> list[Plan]:
    """A plan for each type: those that fit first, the smaller first. Raises LoadError."""
    plans = [plan_for(wanted, instance) for instance in instances]
    return sorted(plans, key=lambda p: (not p.fits, _size(p)))


def plan_for(wanted: Wanted, instance: InstanceType) -> Plan:
    """The least of its GPUs that hold the model, or why they do not."""
    plans = list(_by_degree(wanted, instance))
    return next((p for p in plans if p.fits), plans[-1])


def backend_on(instance: InstanceType, c: Configuration) -> str:
    """What option.backend=auto takes for the T5 family there. Raises LoadError."""
    if c.backend == "fastertransformer":
        raise LoadError(
            "option.backend=fastertransformer: the wheel's memory is not known here; allowed are "
            "auto, torch, onnxruntime and transformers"
        )
    if c.backend != "auto":
        return c.backend
    if instance.gpus or c.dtype in ("fp16", "bf16"):
        return "torch"
    return "onnxruntime"


def recommended(plans: Iterable[Plan]) -> Plan | None:
    """Of those that fit, the one with the fewest and smallest GPUs; bf16 before fp16, which T5 was
    not trained in; of equals the fastest."""

    def order(p: Plan) -> tuple[object, ...]:
        i = p.instance
        old = (i.compute_capability or (0, 0)) < _BF16_CAPABILITY
        return old, i.gpus, i.gpu_sold_as, -i.gpu_bandwidth, i.vcpus, i.memory

    return min((p for p in plans if p.fits), key=order, default=None)


def _by_degree(wanted: Wanted, instance: InstanceType) -> Iterator[Plan]:
    c, a = wanted.configuration, wanted.architecture
    backend, on_gpu = backend_on(instance, c), instance.gpus > 0
    cache = c.encoder_cache << 20 if backend != "transformers" else 0
    work = Workload(
        c.max_rows or (MAX_ROWS_ON_GPU if on_gpu else MAX_ROWS_ON_CPU),
        c.max_input_tokens,
        c.max_output_tokens,
    )
    available = instance.gpu_memory if on_gpu else instance.memory
    asked, degrees = c.tensor_parallel_degree, _degrees(c, instance)
    dtype = _dtype(c, instance)
    allowed = _DTYPES.get((backend, on_gpu), ())
    for degree in degrees:
        known = dtype if dtype in allowed else "fp32"
        f = Footprint(a, backend, known, degree, on_gpu, wanted.names, cache)
        here = Plan(instance, f, work, available, 0)
        if dtype not in allowed:
            kind = "a GPU" if on_gpu else "CPUs"
            why = f"backend {backend} serves no {dtype} on {kind}"
            why += f", only {', '.join(allowed)}" if allowed else ""
            yield replace(here, problem="dtype-not-supported", reason=why)
        elif degree > max(1, instance.gpus):
            yield replace(
                here,
                problem="degree-exceeds-gpus",
                reason=f"tensor_parallel_degree={asked} needs {asked} GPUs, it has {instance.gpus}",
            )
        else:
            yield _judged(here, wanted)


def _degrees(c: Configuration, instance: InstanceType) -> list[int]:
    gpus = max(1, instance.gpus)
    if c.tensor_parallel_degree == "max":
        return [gpus]
    if c.tensor_parallel_degree != 1:
        return [int(c.tensor_parallel_degree)]
    return [n for n in (1, 2, 4, 8) if n <= gpus]


def _dtype(c: Configuration, instance: InstanceType) -> str:
    if c.dtype != "auto":
        return c.dtype
    if not instance.gpus:
        return "fp32"
    return "bf16" if (instance.compute_capability or (0, 0)) >= _BF16_CAPABILITY else "fp16"


def _judged(p: Plan, wanted: Wanted) -> Plan:
    f, instance = p.footprint, p.instance
    if f.backend == "torch":
        try:
            check_degree(f.architecture, f.degree)
        except LoadError as error:
            return replace(p, problem="heads-not-divisible", reason=str(error))
    # archive and content, and the graphs that are built of them
    graphs = f.weights if f.backend == "onnxruntime" else 0
    disk, room = 2 * wanted.stored + graphs, instance.local_disk or _LARGEST_VOLUME
    if disk > room:
        return replace(
            p,
            problem="too-large-for-disk",
            reason=f"{_gb(disk)} of disk are needed, it has at most {_gb(room)}",
        )
    through_memory = f.all_weights if f.backend == "transformers" and f.degree == 1 else 0
    if instance.gpus and through_memory + _BESIDE_IN_MEMORY > instance.memory:
        return replace(
            p,
            problem="too-large-for-memory",
            reason=f"transformers puts the weights, {_gib(through_memory)}, into its memory of "
            f"{_gib(instance.memory)} first",
        )
    p = replace(p, most_rows=_most_rows(p))
    if p.most_rows >= p.work.rows:
        return p
    return replace(p, problem="too-large-for-memory", reason=_too_large(p))


def _fits(p: Plan, work: Workload) -> bool:
    f = p.footprint
    if f.total(work) > p.available:
        return False
    if f.backend == "torch" and f.on_gpu:
        return f.caches(work) <= _ROWS_SHARE * (p.available - f.weights)
    if f.backend == "transformers" and f.degree > 1:
        return f.weights <= _WEIGHTS_SHARE * p.available
    return True


def _most_rows(p: Plan) -> int:
    """By bisection: what is needed grows with the rows."""
    fits, too_many = 0, 1
    while too_many <= p.work.rows * 1024 and _fits(p, replace(p.work, rows=too_many)):
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _fits(p, replace(p.work, rows=middle)):
            fits = middle
        else:
            too_many = middle
    return fits


def _too_large(p: Plan) -> str:
    f, has = p.footprint, f"{_gib(p.available)}"
    if p.instance.gpus:
        has = f"{p.instance.gpu_sold_as} GB has {_gib(p.available)}"
        if f.degree > 1:
            has = f"each of {f.degree} GPUs of {has}"
    told = f"{_gib(p.needed)} needed ({_gib(f.weights)} of them weights), {has}"
    if p.most_rows:
        return f"{told}; {p.most_rows} rows instead of {p.work.rows} would fit"
    return f"{told}; not even one row fits"


def _size(p: Plan) -> tuple[object, ...]:
    i = p.instance
    return i.gpus > 0, i.gpus * i.gpu_sold_as, i.gpus, i.vcpus, i.memory, i.name


def _config(c: Configuration) -> tuple[Mapping[str, Any], Path | None]:
    """config.json, and the folder that it lies in where there is one. Raises LoadError."""
    place = c.model_id or c.s3url or c.model_dir
    if place is None:
        raise LoadError("no model given: name a folder, a config.json or a model id of the hub")
    if place.startswith("s3://"):
        raise LoadError(f"{place}: copy its config.json to this host and name that")
    path = Path(c.model_dir or ".") / place if c.model_id else Path(place)
    if path.is_dir():
        return model_config(path), path
    if path.is_file():
        config = read_json_object(path)
        if not isinstance(config.get("model_type"), str):
            raise LoadError(f"{path} names no model_type")
        return config, None
    if not hub.is_hub_id(place):
        raise LoadError(f"{place}: no such folder or file, and not a hub model id")
    file = hub.download_file(place, "config.json", revision=c.revision, cache_dir=c.cache_dir)
    return model_config(file.parent), None


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _gb(size: int) -> str:
    return f"{size / GB:.0f} GB"
