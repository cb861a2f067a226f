"""A rank other than 0: it loads its part of the model and does what rank 0 does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from handler.config import Configuration
from handler.engines.torch_ranks.engine import decode_on_all
from handler.engines.torch_ranks.ranks import Link, leave_group, process_group
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.kv_cache import EncodedPrompt
from handler.engines.torch_t5.part import load_part
from handler.errors import one_line
from handler.log import start_log


class Follower:
    """This rank, with its part of the model. What fails in it is told to rank 0, and raised; rank 0
    itself gone is an EOFError.

    answers: what rank 0 shared of them, in their order.
    """

    def __init__(
        self,
        folder: Path,
        c: Configuration,
        rank: int,
        size: int,
        store: TCPStore,
        device: torch.device | None = None,
    ) -> None:
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self._name = f"rank {rank} of {size}"
        self._link = Link(store, rank)
        with self._telling():
            part = load_part(folder, c, rank, size, device)
            self._link.tell("loaded", part.rows)
            rows = self._link.told("join")
            part.join(process_group(store, rank, size, part.device))
            self.engine = part.engine(rows, self._link.agree)
            self._link.tell("ready")

    def run(self) -> None:
        """Do as rank 0 does until it says that this is the end."""
        commands = _Commands(self.engine, self.answers)
        with self._telling():
            while (told := self._link.receive())[0] != "close":
                commands.run(*told)
        self._link.close()
        self.engine.close()  # NCCL waits for the CUDA graphs that hold its calls
        leave_group()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except EOFError:
            raise
        except BaseException as error:
            self._link.tell("failed", one_line(f"{self._name}: {error or type(error).__name__}"))
            raise


class _Commands:
    """What rank 0 may ask for. Encoded prompts have numbers, which rank 0 gives."""

    def __init__(self, engine: TorchT5StepEngine, answers: SimpleQueue[Any]) -> None:
        self._engine = engine
        self._answers = answers
        self._prompts: dict[int, EncodedPrompt] = {}
        self._parts: Iterator[list[EncodedPrompt] | None] = iter(())
        self._first = 0

    def run(self, command: str, arguments: tuple[Any, ...]) -> None:
        getattr(self, command)(*arguments)

    def encode(self, prompts: list[list[int]], first: int) -> None:
        self._parts, self._first = self._engine.encode(prompts), first

    def encode_part(self) -> None:
        encoded = next(self._parts)
        if encoded is not None:
            self._prompts.update(enumerate(encoded, self._first))

    def forget(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._prompts[number]

    def attach(self, number: int, row: int) -> None:
        self._engine.attach(self._prompts[number], row)

    def decode(self, *arguments: Any) -> None:
        decode_on_all(self._engine, *arguments)

    def move(self, src: int, dst: int) -> None:
        self._engine.move(src, dst)

    def reorder(self, rows: list[int], parents: list[int]) -> None:
        self._engine.reorder(rows, parents)

    def share(self, answer: Any) -> None:
        self._answers.put(answer)


def main() -> None:
    """As rank 0 starts it: standard input tells what it is."""
    told = json.load(sys.stdin)
    start_log()
    configuration = Configuration(**told["configuration"])
    store = TCPStore("127.0.0.1", told["port"], told["size"], False)
    Follower(Path(told["folder"]), configuration, told["rank"], told["size"], store).run()


if __name__ == "__main__":
    try:
        main()
    except (Exception, KeyboardInterrupt):  # told to rank 0, which tells everybody
        sys.exit(1)
