"""MPI: which process of the job this one is, and what the job's processes share.

DJLServing's old MPI engines start one process per GPU and give every request to each of them.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from handler.errors import LoadError

logger = logging.getLogger(__name__)

# The slowest rank may still be reading the checkpoint from a cold disk.
_AGREEMENT_SECONDS = 600
_PARENT_CHECK_SECONDS = 1.0


@dataclass(frozen=True)
class World:
    """This process is ``rank`` of ``size``. A job of mpirun may have a single one."""

    rank: int = 0
    size: int = 1
    by_mpirun: bool = False


def world_of(environment: Mapping[str, str] = os.environ) -> World:
    """What mpirun says; without it a world of one."""
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return World()
    return World(
        int(environment["OMPI_COMM_WORLD_RANK"]),
        int(environment["OMPI_COMM_WORLD_SIZE"]),
        by_mpirun=True,
    )


def agreed_seed(world: World, environment: Mapping[str, str] = os.environ) -> int:
    """A random number of 64 bits that all ranks get, another one in every run.

    Rank 0 draws it; the others ask for it at MASTER_ADDR:MASTER_PORT, which DJLServing sets.
    Raises LoadError where they do not meet.
    """
    if world.size == 1:
        return secrets.randbits(64)
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    place = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    try:
        port = int(environment["MASTER_PORT"])
        if not 0 < port < 1 << 16:
            raise ValueError("no port")
        store = TCPStore(
            environment["MASTER_ADDR"],
            port,
            world.size,
            world.rank == 0,
            timeout=timedelta(seconds=_AGREEMENT_SECONDS),
        )
        if world.rank == 0:
            store.set("seed", str(secrets.randbits(64)))
        seed = int(store.get("seed"))
        store.set(f"known to {world.rank}", "yes")
        if world.rank == 0:  # the store lives here: stay until everybody has read
            store.wait([f"known to {rank}" for rank in range(world.size)])
    except (KeyError, ValueError, RuntimeError) as error:
        raise LoadError(
            f"rank {world.rank} of {world.size} did not meet the others at MASTER_ADDR:MASTER_PORT "
            f"{place} ({error}); set both, as DJLServing's MPI engines do, to a free port"
        ) from error
    return seed


def end_with_parent() -> None:
    """End this process when the one that started it (mpirun) is gone.

    DJLServing kills only mpirun, and a rank that waits for another one would stay, with its GPU.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def end_job(world: World, error: BaseException, after: float = 0.0) -> None:
    """End this rank ``after`` seconds, and with it the job: mpirun then ends the others.

    The others may wait for this rank inside a call that nothing interrupts.
    """
    end_process(f"rank {world.rank} of {world.size} failed and ends the job: {error}", after)


def end_process(reason: str, after: float) -> None:
    """End this process ``after`` seconds, whatever its threads wait for."""
    logger.critical("%s", reason)
    for handler in logging.getLogger().handlers:
        handler.flush()
    if after:
        timer = threading.Timer(after, os._exit, [1])
        timer.daemon = True
        timer.start()
    else:
        os._exit(1)
