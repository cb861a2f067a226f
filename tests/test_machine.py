"""What a container may use, from cgroup folders as kernels write them."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from handler.machine import available_memory, reserved_memory, return_freed_memory, usable_cpus

GIB = 2**30


def cgroup(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


def v1(quota: int, period: int = 100_000) -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": str(quota), "cpu/cpu.cfs_period_us": str(period)}


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of 96 CPUs, without limit by affinity."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 96),
        ({"cpu.max": "max 100000"}, 96),
        ({"cpu.max": "max"}, 96),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu.max": "80000 20000"}, 4),
        ({"cpu.max": "20000000 100000"}, 96),
        (v1(-1), 96),
        (v1(0), 96),
        (v1(400_000), 4),
        (v1(150_000), 2),
        (v1(10_000, 50_000), 1),
        ({"cpu/cpu.cfs_quota_us": "100000"}, 96),
        ({"cpu.max": "300000 100000", **v1(200_000)}, 3),
    ],
    ids=str,
)
def test_cpus_by_the_containers_quota(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    assert usable_cpus(cgroup(tmp_path, files)) == cpus


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """This thread on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has affinities")
@pytest.mark.usefixtures("one_cpu")
def test_cpus_by_affinity(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path) == 1
    assert usable_cpus(cgroup(tmp_path, {"cpu.max": "1600000 100000"})) == 1


def test_cpus_where_there_is_no_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for told, cpus in ((5, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda told=told: told)
        assert usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"memory.max": f"{GIB}", "memory.current": f"{GIB // 4}"}, GIB * 3 // 4),
        (
            {
                "memory/memory.limit_in_bytes": f"{GIB}",
                "memory/memory.usage_in_bytes": f"{GIB // 2}",
            },
            GIB // 2,
        ),
        ({"memory.max": f"{GIB}", "memory.current": f"{GIB + 4096}"}, 0),
        # files that were read and could be read again are counted as used, and given up at need
        (
            {
                "memory.max": f"{GIB}",
                "memory.current": f"{GIB * 3 // 4}",
                "memory.stat": f"anon 4096\nfile 9999\ninactive_file {GIB // 2}\nactive_file 7",
            },
            GIB * 3 // 4,
        ),
        (
            {
                "memory/memory.limit_in_bytes": f"{GIB}",
                "memory/memory.usage_in_bytes": f"{GIB * 3 // 4}",
                "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}",
            },
            GIB // 2,
        ),
    ],
)
def test_memory_by_the_containers_limit(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    assert available_memory(cgroup(tmp_path, files)) == available


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max", "memory.current": "4096"},
        {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "4096",
        },
        {"memory.max": "4096"},
    ],
    ids=str,
)
def test_memory_without_a_limit_is_the_hosts(tmp_path: Path, files: dict[str, str]) -> None:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(fields["MemTotal"].split()[0]) * 1024
    available = available_memory(cgroup(tmp_path, files))
    assert available is not None
    assert total / 100 < available < total


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_looked_for(hidden: str) -> None:
    """Importing torch takes seconds and memory that a CPU engine does not need."""
    code = (
        "import sys; from handler.machine import gpu_is_there; "
        "print(gpu_is_there(), 'torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": hidden},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == ["False", "False"]


def test_reserved_memory_is_taken_as_it_is_written_to() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    memory = reserved_memory(1 << 30)
    memory[1 << 29] = 7
    assert memory[: 1 << 10] == bytes(1 << 10)
    assert resident() - before < 1 << 26


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others keep nothing")
def test_freed_memory_is_returned() -> None:
    process = psutil.Process()
    blocks = [bytes([i % 256]) * 100_000 for i in range(1000)]
    fence = bytes(90_000)  # what lies below it cannot go by itself
    held = process.memory_info().rss
    del blocks
    return_freed_memory()
    assert process.memory_info().rss < held - 80_000_000
    assert len(fence) == 90_000
