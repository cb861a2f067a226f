"""The x86 instance types that SageMaker endpoints offer and that can hold such models.

Which types an endpoint may have: the values of ``ProductionVariantInstanceType`` in SageMaker's
API, as botocore 1.44 knows it (2026). vCPUs, memory, GPUs and local NVMe disks: AWS's pages of
instance types (General purpose, Compute optimized, Memory optimized, Accelerated computing).
Bandwidth and compute capability: NVIDIA's data sheets of T4, L4, L40S, V100 SXM2, A100 SXM, H100
SXM and H200 SXM, and AWS's G5 page for the A10G.

A GPU's memory here is what CUDA lets a process have, rounded down, not what its name says: the
driver and error correction keep the rest. The "24 GB" of an A10G are 23028 MiB for nvidia-smi
and 21.9 GiB for a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from handler.errors import LoadError, nearest

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class _Gpu:
    """``sold_as``: the GB by which it is known; ``memory``: GiB that a process may have."""

    model: str
    sold_as: int
    memory: float
    bandwidth: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class InstanceType:
    """One type. Sizes are in bytes, bandwidth in bytes a second, both of one GPU.

    ``gpu``: the GPU's model, None without one. ``local_disk``: NVMe disks that come with it, where
    a SageMaker endpoint puts its model; None: EBS alone, whose size VolumeSizeInGB sets.
    """

    name: str
    vcpus: int
    memory: int
    local_disk: int | None = None
    gpus: int = 0
    gpu: str | None = None
    gpu_memory: int = 0
    gpu_bandwidth: int = 0
    compute_capability: tuple[int, int] | None = None
    gpu_sold_as: int = 0

    @property
    def family(self) -> str:
        return self.name.split(".")[1]


_T4 = _Gpu("T4", 16, 14.5, 320 * GB, (7, 5))
_A10G = _Gpu("A10G", 24, 21.9, 600 * GB, (8, 6))
_L4 = _Gpu("L4", 24, 21.9, 300 * GB, (8, 9))
_L40S = _Gpu("L40S", 48, 44.3, 864 * GB, (8, 9))
_V100 = _Gpu("V100", 16, 15.7, 900 * GB, (7, 0))
_A100_40 = _Gpu("A100", 40, 39.3, 1555 * GB, (8, 0))
_A100_80 = _Gpu("A100", 80, 79.1, 2039 * GB, (8, 0))
_H100 = _Gpu("H100", 80, 79.1, 3350 * GB, (9, 0))
_H200 = _Gpu("H200", 141, 139.7, 4800 * GB, (9, 0))

# GPU -> rows of: type, vCPUs, memory GiB, GPUs, local NVMe in GB (0: EBS alone).
_GPU_TYPES: tuple[tuple[_Gpu, tuple[tuple[str, int, int, int, int], ...]], ...] = (
    (
        _T4,
        (
            ("g4dn.xlarge", 4, 16, 1, 125),
            ("g4dn.2xlarge", 8, 32, 1, 225),
            ("g4dn.4xlarge", 16, 64, 1, 225),
            ("g4dn.8xlarge", 32, 128, 1, 900),
            ("g4dn.12xlarge", 48, 192, 4, 900),
            ("g4dn.16xlarge", 64, 256, 1, 900),
        ),
    ),
    (
        _A10G,
        (
            ("g5.xlarge", 4, 16, 1, 250),
            ("g5.2xlarge", 8, 32, 1, 450),
            ("g5.4xlarge", 16, 64, 1, 600),
            ("g5.8xlarge", 32, 128, 1, 900),
            ("g5.12xlarge", 48, 192, 4, 3800),
            ("g5.16xlarge", 64, 256, 1, 1900),
            ("g5.24xlarge", 96, 384, 4, 3800),
            ("g5.48xlarge", 192, 768, 8, 7600),
        ),
    ),
    (
        _L4,
        (
            ("g6.xlarge", 4, 16, 1, 250),
            ("g6.2xlarge", 8, 32, 1, 450),
            ("g6.4xlarge", 16, 64, 1, 600),
            ("g6.8xlarge", 32, 128, 1, 900),
            ("g6.12xlarge", 48, 192, 4, 3760),
            ("g6.16xlarge", 64, 256, 1, 1880),
            ("g6.24xlarge", 96, 384, 4, 3760),
            ("g6.48xlarge", 192, 768, 8, 7520),
        ),
    ),
    (
        _L40S,
        (
            ("g6e.xlarge", 4, 32, 1, 250),
            ("g6e.2xlarge", 8, 64, 1, 450),
            ("g6e.4xlarge", 16, 128, 1, 600),
            ("g6e.8xlarge", 32, 256, 1, 900),
            ("g6e.12xlarge", 48, 384, 4, 3800),
            ("g6e.16xlarge", 64, 512, 1, 1900),
            ("g6e.24xlarge", 96, 768, 4, 3800),
            ("g6e.48xlarge", 192, 1536, 8, 7600),
        ),
    ),
    (
        _V100,
        (
            ("p3.2xlarge", 8, 61, 1, 0),
            ("p3.8xlarge", 32, 244, 4, 0),
            ("p3.16xlarge", 64, 488, 8, 0),
        ),
    ),
    (_A100_40, (("p4d.24xlarge", 96, 1152, 8, 8000),)),
    (_A100_80, (("p4de.24xlarge", 96, 1152, 8, 8000),)),
    (_H100, (("p5.4xlarge", 16, 256, 1, 3840), ("p5.48xlarge", 192, 2048, 8, 30720))),
    (_H200, (("p5e.48xlarge", 192, 2048, 8, 30720), ("p5en.48xlarge", 192, 2048, 8, 30720))),
)

# Sizes without GPUs -> vCPUs; a family has so many GiB for each vCPU, but for c5.
_VCPUS = {"large": 2, "xlarge": 4} | {f"{n}xlarge": 4 * n for n in (2, 4, 8, 12, 16, 24, 32, 48)}
_UP_TO_24 = ("large", "xlarge", "2xlarge", "4xlarge", "12xlarge", "24xlarge")
_UP_TO_32 = tuple(size for size in _VCPUS if size != "48xlarge")
_UP_TO_48 = tuple(size for size in _VCPUS if size != "32xlarge")
_CPU_FAMILIES = (
    ("c6i", 2, _UP_TO_32),
    ("c7i", 2, _UP_TO_48),
    ("m5", 4, _UP_TO_24),
    ("m5d", 4, _UP_TO_24),
    ("m6i", 4, _UP_TO_32),
    ("m7i", 4, _UP_TO_48),
    ("r5", 8, _UP_TO_24),
    ("r5d", 8, _UP_TO_24),
    ("r6i", 8, _UP_TO_32),
    ("r7i", 8, _UP_TO_48),
)
_C5 = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16, "9xlarge": 36, "18xlarge": 72}
_LOCAL_GB = {
    "c5d": dict(zip(_C5, (50, 100, 200, 400, 900, 1800))),
    "m5d": dict(zip(_UP_TO_24, (75, 150, 300, 600, 1800, 3600))),
    "r5d": dict(zip(_UP_TO_24, (75, 150, 300, 600, 1800, 3600))),
}


def _without_gpu(family: str, size: str, vcpus: int, memory: int) -> InstanceType:
    disk = _LOCAL_GB.get(family, {}).get(size)
    return InstanceType(f"ml.{family}.{size}", vcpus, memory * GIB, disk * GB if disk else None)


def _with_gpu(gpu: _Gpu, row: tuple[str, int, int, int, int]) -> InstanceType:
    name, vcpus, memory, gpus, disk = row
    return InstanceType(
        f"ml.{name}",
        vcpus,
        memory * GIB,
        disk * GB if disk else None,
        gpus,
        gpu.model,
        int(gpu.memory * GIB),
        gpu.bandwidth,
        gpu.compute_capability,
        gpu.sold_as,
    )


def _table() -> dict[str, InstanceType]:
    with_gpus = [_with_gpu(gpu, row) for gpu, rows in _GPU_TYPES for row in rows]
    without = [
        _without_gpu(family, size, vcpus, 2 * vcpus)
        for family in ("c5", "c5d")
        for size, vcpus in _C5.items()
    ] + [
        _without_gpu(family, size, _VCPUS[size], _VCPUS[size] * gib)
        for family, gib, sizes in _CPU_FAMILIES
        for size in sizes
    ]
    return {instance.name: instance for instance in without + with_gpus}


INSTANCES = _table()


def find_instance(name: str) -> InstanceType:
    """The type of that name, with or without ``ml.``. Raises LoadError for one not in the table."""
    wanted = name if name.startswith("ml.") else f"ml.{name}"
    if wanted in INSTANCES:
        return INSTANCES[wanted]
    guess = nearest(wanted, INSTANCES)
    hint = f"; did you mean {guess}?" if guess else ""
    raise LoadError(
        f"no instance type {name!r} is known{hint}; known families: "
        + ", ".join(dict.fromkeys(instance.family for instance in INSTANCES.values()))
    )
