"""What is measured on: the CPU and the packages, the memory and CPU time of processes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handler.machine import usable_cpus

_FLAGS = "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8".split()
_PACKAGES = "djl-t5-handler onnxruntime numpy torch transformers ctranslate2".split()
_TICKS = os.sysconf("SC_CLK_TCK")
_SETTLE_SECONDS, _SETTLE_STEP = 5.0, 0.1


def describe(threads: int) -> dict[str, Any]:
    """The machine and the versions, for the head of a table and for --json."""
    fields = _cpu_fields()
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_id": "/".join(fields.get(k, "?") for k in ("cpu family", "model", "stepping")),
        "flags": {flag: flag in flags for flag in _FLAGS},
        "cpus": usable_cpus(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def print_description(machine: dict[str, Any]) -> None:
    flags = " ".join(name if there else f"no-{name}" for name, there in machine["flags"].items())
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    print(
        f"CPU: {machine['cpu']} (family/model/stepping {machine['cpu_id']}), {machine['cpus']} CPUs"
        f", {machine['memory_gb']} GB\nflags: {flags}\nthreads: {machine['threads']}\n"
        f"Python {machine['python']}, {versions}"
    )


def peak_memory(pid: int) -> int:
    """Most bytes that a process has had resident (VmHWM), mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/{pid}/status tells no VmHWM")


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, in the kernel's ticks."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / _TICKS


def settle(pids: Sequence[int]) -> None:
    """Wait until none of these processes computes: thread pools spin for a while after work.

    Raises RuntimeError when one does not stop.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    before = [cpu_seconds(pid) for pid in pids]
    while time.monotonic() < deadline:
        time.sleep(_SETTLE_STEP)
        now = [cpu_seconds(pid) for pid in pids]
        if all(later - earlier <= 1.5 / _TICKS for earlier, later in zip(before, now)):
            return
        before = now
    raise RuntimeError(f"one of the idle processes {list(pids)} goes on using the CPU")


class OtherLoad:
    """The share of the machine's CPUs that went to other processes while this one watches."""

    def __init__(self) -> None:
        self._start, self._busy = time.monotonic(), _busy_seconds()

    def share(self, own_seconds: float) -> float:
        """own_seconds: CPU time of the benchmark itself since the start."""
        capacity = (time.monotonic() - self._start) * (os.cpu_count() or 1)
        return max(0.0, (_busy_seconds() - self._busy - own_seconds) / capacity)


def warn_of_load(share: float) -> None:
    if share > 0.02:
        print(
            f"WARNING: other processes took {share:.0%} of the CPUs meanwhile; figures measured "
            "beside them are worth little"
        )


def _busy_seconds() -> float:
    """CPU time of everything on the machine: user, nice, system, irq, softirq, steal."""
    values = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return (sum(values) - values[3] - values[4]) / _TICKS  # less idle and iowait


def _cpu_fields() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
