"""What this process may use of the machine: CPUs, memory, GPUs, a place on disk."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path


def return_freed_memory() -> None:
    """Give the system what was freed; glibc keeps tens of megabytes of it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs by affinity and by the container's quota, whichever is less; at least 1.

    os.cpu_count() tells the host's: a container of 2 CPUs on a host of 96 would start 96 threads.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota_v2(cgroup) or _quota_v1(cgroup)
    allowed = min(affinity or 1, math.ceil(quota) if quota else math.inf)
    return max(1, int(allowed))


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can still be taken, by the kernel and by the container's limit; None: unknown."""
    found = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used, stat, files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        most, now = _read(cgroup / limit), _read(cgroup / used)
        if most.isdigit() and now.isdigit():
            # the kernel counts files that were read as used, and gives them up at need
            fields = dict(line.split() for line in _read(cgroup / stat).splitlines())
            found.append(max(0, int(most) - int(now) + int(fields.get(files, 0))))
    return min(found, default=None)


def reserved_memory(size: int) -> mmap.mmap:
    """``size`` bytes of 0 that take memory page by page, as they are written to.

    numpy asks for huge pages, of which each row of a cache would fill one with its first token.
    """
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def gpu_is_there() -> bool:
    """Whether torch can use a CUDA device. Without NVIDIA's driver torch is not even imported."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if not any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvidia0")):
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def users_cache() -> Path | None:
    """The folder for what can be made or fetched again, which may not exist yet.

    None: a user without a home, as containers run under any user id have it.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "djl-t5-handler"
    except RuntimeError:
        return None


def _quota_v2(cgroup: Path) -> float | None:
    text = _read(cgroup / "cpu.max").split()
    if len(text) != 2 or text[0] == "max":
        return None
    return int(text[0]) / int(text[1])


def _quota_v1(cgroup: Path) -> float | None:
    quota, period = (_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if not quota or not period or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
