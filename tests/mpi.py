"""Real mpirun jobs of tests/rank.py on the double of the fastertransformer wheel."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
DOUBLE = ROOT / "tests" / "fastertransformer_double"
RANK = ROOT / "tests" / "rank.py"
WAIT = 180

# What containers and small machines need of Open MPI.
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    # the package's programs lie beside the interpreter
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


@dataclass
class Job:
    mpirun: subprocess.Popen[bytes]
    folder: Path
    size: int

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait(self) -> int:
        """mpirun's exit status."""
        try:
            return self.mpirun.wait(WAIT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end:\n{self.log}") from None

    def answers(self) -> list[list[list[Any]]]:
        """Of each rank, of each call, of each body."""
        files = [self.folder / f"answers.{rank}" for rank in range(self.size)]
        return [list(map(json.loads, file.open())) for file in files]

    def calls(self, rank: int) -> list[Any]:
        """What the double was called with."""
        lines = map(json.loads, (self.folder / "calls").open())
        return [line["call"] for line in lines if line["rank"] == rank]

    def pids_in_a_call(self) -> list[int]:
        """The ranks, as soon as each of them is held in a call of the double."""
        return [
            int(wait_for(Path(f"{self.gate}.{rank}"), self).read_text())
            for rank in range(self.size)
        ]

    def pids_after_an_answer(self) -> list[int]:
        """The ranks, as soon as each of them has answered a call."""
        wait_for(self.folder / f"answers.{self.size - 1}", self)
        started = processes_with(str(RANK), self.mpirun.pid)
        ranks = {p.environ()["OMPI_COMM_WORLD_RANK"]: p.pid for p in started}
        return [ranks[str(rank)] for rank in range(self.size)]

    @property
    def gate(self) -> Path:
        return self.folder / "gate"


def processes_with(words: str, started_by: int | None = None) -> list[psutil.Process]:
    """What that process, or this one, and its children have started, with these words in the
    command."""
    found = []
    for process in psutil.Process(started_by).children(recursive=True):
        try:
            if words in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # it has ended since
            pass
    return found


def wait_for(file: Path, job: Job) -> Path:
    deadline = time.monotonic() + WAIT
    while not file.exists():
        assert job.mpirun.poll() is None, job.log
        assert time.monotonic() < deadline, job.log
        time.sleep(0.05)
    return file


def are_gone(pids: list[int]) -> bool:
    """Or zombies, for which somebody else must wait; within some time."""
    processes = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=WAIT)
    return all(map(is_zombie, alive))


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def free_port() -> int:
    """None that the system gives to a connection before the job's rank 0 listens at it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as listening, suppress(OSError):
            listening.bind(("127.0.0.1", port))
            return port


@contextmanager
def job_of(
    size: int, folder: Path, calls: list[list[Any]], *, gated: bool = False, **environment: str
) -> Iterator[Job]:
    """A job that answers ``calls``; ``environment`` may hold OPTION_*, FT_DOUBLE_* and MASTER_*."""
    (folder / "to-answer").write_text("".join(json.dumps(call) + "\n" for call in calls))
    if gated:
        (folder / "gate").touch()
    shared = {
        **os.environ,
        **MPI_ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, DOUBLE))),
        "TMPDIR": str(folder),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OPTION_TENSOR_PARALLEL_DEGREE": str(size),
        "FT_DOUBLE_LOG": str(folder / "calls"),
        "FT_DOUBLE_GATE": str(folder / "gate"),
        **environment,
    }
    command = ["mpirun", "-np", str(size), sys.executable, str(RANK)]
    arguments = [str(folder / "to-answer"), str(folder / "answers")]
    with (folder / "log").open("w") as log:
        mpirun = subprocess.Popen(
            [*command, *arguments], env=shared, stdout=log, stderr=log, cwd=folder
        )
    job = Job(mpirun, folder, size)
    ranks: list[psutil.Process] = []
    try:
        yield job
    finally:
        if mpirun.poll() is None:
            ranks = psutil.Process(mpirun.pid).children(recursive=True)
            mpirun.kill()
            mpirun.wait()
        for rank in ranks:
            if rank.is_running():
                rank.kill()
