"""A program: compiles every kernel that decoding launches, as it is launched, for GPUs that need
not be there. It prints, by GPU and dtype, which were compiled for one row and which for more.

Arguments: the folder of a model, and the cases, each a compute capability and a dtype: 90-int8.
Products of int8 are computed in bf16, before Ampere in fp16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.runtime.driver import driver  # type: ignore[import-untyped]
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

from handler.config import configuration_of
from handler.engines.torch_t5 import kernels
from handler.engines.torch_t5 import part as part_module
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.part import load_part

AMPERE = 80


class AbsentGpu:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Compiles what is launched, and does not run it."""

    def __init__(self) -> None:
        self._new: list[Any] = []
        self._seen: dict[int, Any] = {}
        run = JITFunction.run

        def compile_alone(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            made = run(kernel, *args, grid=grid, warmup=True, **kwargs)
            if id(made) not in self._seen:
                self._new.append(made)
                self._seen[id(made)] = made
            return made

        JITFunction.run = compile_alone

    def names(self) -> list[str]:
        """Of what was compiled, to machine code, since the last call."""
        names = sorted(made.metadata.name for made in self._new if made.asm["cubin"])
        self._new.clear()
        return names


def main(folder: Path, cases: Sequence[str]) -> None:
    launches, compiled = Launches(), {}
    for case in cases:
        capability, dtype = int(case.split("-")[0]), case.split("-")[1]
        driver.set_active(AbsentGpu(capability))
        engine = _engine(folder, capability, dtype)
        names = launches.names()
        for rows in (2, 16, 17, 64):
            _decode(engine, rows)
        *_, _ = engine.encode([[5, 1], [1]])
        compiled[case] = names, launches.names()
    print(json.dumps(compiled))


def _engine(folder: Path, capability: int, dtype: str) -> TorchT5StepEngine:
    # what would be asked of a device that is there
    wide = torch.float16 if capability < AMPERE else torch.bfloat16
    part_module._compute_dtype = lambda *_: torch.float32 if dtype == "fp32" else wide
    per_program = kernels._INPUTS_BEFORE_AMPERE if capability < AMPERE else kernels._INPUTS
    kernels._inputs_at_once = lambda device: per_program
    c = configuration_of(str(folder), dtype=dtype, max_rows=64, max_output_tokens=20)
    engine = load_part(folder, c).engine(64)
    engine.use_kernels()  # which runs them over one row
    return engine


def _decode(engine: TorchT5StepEngine, rows: int) -> None:
    engine.decode(rows, np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
