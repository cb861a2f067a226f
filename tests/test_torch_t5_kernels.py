"""The kernels, run by Triton's interpreter on a CPU, against the plain code that they stand for.

On a GPU they are compiled, and the same tests run on it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from random_checkpoints import write_checkpoint
from torch import Tensor

from handler.checkpoints.architecture import T5Architecture
from handler.config import configuration_of
from handler.engines.torch_t5.cuda_graphs import row_counts
from handler.engines.torch_t5.kv_cache import RowCache, StepMemory
from handler.engines.torch_t5.model import Activation, Norm
from handler.engines.torch_t5.part import load_part
from handler.engines.torch_t5.quantize import Int8Linear

pytest.importorskip("triton")
from handler.engines.torch_t5 import kernels

Array = npt.NDArray[np.float32]
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ROWS, PROMPT, OUTPUT = 5, 100, 150
POSITIONS = [0, 1, 63, 64, 149]
LENGTHS = [1, 64, 65, 100, 7]


def architecture(**changes: int) -> T5Architecture:
    config = {"model_type": "t5", "d_model": 48, "d_kv": 16, "num_heads": 3, "num_layers": 2}
    return T5Architecture.from_config({**config, "feed_forward_proj": "gated-gelu", **changes})


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cache(a: T5Architecture, dtype: torch.dtype) -> RowCache:
    made = RowCache(a, ROWS + 1, PROMPT, OUTPUT, dtype, DEVICE)
    made.own[:] = randn(*made.own.shape, seed=1).to(dtype)
    made.cross[:] = randn(*made.cross.shape, seed=2).to(dtype)
    made.cross_lengths[:ROWS] = torch.tensor(LENGTHS, device=DEVICE)
    return made


def close(got: Tensor, expected: Tensor) -> bool:
    tolerance = 2e-5 if expected.dtype == torch.float32 else 2e-2
    return bool((got.float() - expected.float()).abs().max() < tolerance)


@DTYPES
@pytest.mark.parametrize("d_kv", [16, 24, 64])
def test_attention_over_a_rows_own_tokens(dtype: torch.dtype, d_kv: int) -> None:
    """Each row's new key and value come behind those that it has, and are kept."""
    a = architecture(d_kv=d_kv)
    plain, fused = cache(a, dtype), cache(a, dtype)
    table = randn(1, a.num_heads, 2 * OUTPUT - 1, seed=3).to(dtype)
    table[..., OUTPUT:] = -torch.inf
    positions = torch.tensor(POSITIONS, device=DEVICE)
    qkv = randn(ROWS, 1, 3, a.num_heads, d_kv, seed=4).to(dtype)
    q, k, v = qkv.unbind(2)
    longest = {"own": OUTPUT, "cross": PROMPT}
    expected = StepMemory(plain, positions[:, None], table, **longest).own(1, q, k, v)
    got = kernels.KernelMemory(fused, positions, table).own(1, q, k, v)
    assert close(got, expected)
    assert (fused.own == plain.own).all()


@DTYPES
def test_attention_over_a_rows_prompt(dtype: torch.dtype) -> None:
    a = architecture()
    kept = cache(a, dtype)
    positions = torch.tensor(POSITIONS, device=DEVICE)
    table = torch.zeros(1, a.num_heads, 2 * OUTPUT - 1, dtype=dtype, device=DEVICE)
    q = randn(ROWS, 1, a.num_heads, a.d_kv).to(dtype)
    longest = {"own": OUTPUT, "cross": PROMPT}
    expected = StepMemory(kept, positions[:, None], table, **longest).cross(0, q)
    assert close(kernels.KernelMemory(kept, positions, table).cross(0, q), expected)


def test_what_lies_beyond_a_rows_lengths_is_not_read() -> None:
    a = architecture()
    kept = cache(a, torch.float32)
    for row, (position, length) in enumerate(zip(POSITIONS, LENGTHS)):
        kept.own[:, :, row, :, position:] = torch.nan
        kept.cross[:, :, row, :, length:] = torch.nan
    table = randn(1, a.num_heads, 2 * OUTPUT - 1)
    q, k, v = randn(ROWS, 1, 3, a.num_heads, a.d_kv).unbind(2)
    memory = kernels.KernelMemory(kept, torch.tensor(POSITIONS, device=DEVICE), table)
    assert memory.own(0, q, k, v).isfinite().all()
    assert memory.cross(0, q).isfinite().all()


@DTYPES
def test_addition_and_norm(dtype: torch.dtype) -> None:
    norm = Norm(architecture(), dtype).to(DEVICE).requires_grad_(False)
    norm.weight[:] = randn(48, seed=1)
    x, y = randn(ROWS, 1, 48, seed=2) * 1e4, randn(ROWS, 1, 48, seed=3).to(dtype)
    total, normed = norm.add(x, y)
    got_total, got_normed = kernels.FusedNorm(norm).add(x, y)
    assert (got_total == total).all()
    assert got_normed.dtype == dtype
    assert close(got_normed, normed)


@DTYPES
@pytest.mark.parametrize("d_ff", [40, 5000])
def test_the_gate(dtype: torch.dtype, d_ff: int) -> None:
    a = architecture(d_ff=d_ff)
    hidden = (randn(ROWS, 1, 2 * d_ff) * 3).to(dtype)
    hidden[0] *= 30  # far out on both sides
    wide = torch.float32 if dtype == torch.float16 else dtype
    expected = Activation(a, wide)(hidden)
    got = kernels.FusedGate(wide)(hidden)
    assert got.dtype == expected.dtype
    scale = max(1.0, float(expected.abs().max()))
    assert close(got / scale, expected / scale)


@DTYPES
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 48, 40), (5, 300, 16), (17, 700, 33)])
def test_int8_products(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("the interpreter multiplies bf16's bits as integers")
    generator = torch.Generator().manual_seed(5)
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    product = Int8Linear(values.to(DEVICE), (randn(outputs, seed=6).abs() + 0.1) / 1e3)
    x = (randn(rows, 1, inputs, seed=7) / inputs**0.5).to(dtype)
    expected = product(x)
    product.few_rows = kernels.int8_product
    assert close(product(x), expected)


def rerun(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As a CUDA graph: always the same tensors, and always the same one for the result."""
    logits = step()
    return (lambda: logits.copy_(step())), logits  # type: ignore[return-value]


class Steps:
    """An engine whose three rows are read from the beginning each time."""

    def __init__(self, folder: Path) -> None:
        limits = {"max_rows": 5, "max_input_tokens": 80, "max_output_tokens": 20}
        self.engine = load_part(folder, configuration_of(str(folder), **limits)).engine(5)
        *_, handles = self.engine.encode([[5, 6, 1], list(range(3, 70)), [9, 1]])
        assert handles is not None
        self._handles = handles
        self._ids = np.random.default_rng(0).integers(3, 300, (3, 4))

    def logits(self, *, ahead: bool = False) -> Array:
        """[steps, rows, vocabulary], of fewer and fewer rows where the last are NaN.

        ahead: all tokens but the second row's come from where a sampler leaves them.
        """
        for row, handle in enumerate(self._handles):
            self.engine.attach(handle, row)
        made = []
        for k, rows in enumerate([3, 3, 2, 1]):
            tokens = self._ids[:rows, [k]].copy()
            if ahead:
                self.engine.chosen[:3] = torch.from_numpy(self._ids[[2, 1, 0], k])
                tokens[::2, 0] = [-3, -1][: len(tokens[::2])]
            got = self.engine.decode(rows, tokens, np.full(rows, k))[:, 0]
            made.append(np.pad(got, ((0, 3 - rows), (0, 0)), constant_values=np.nan))
        return np.stack(made)


def same(got: Array, expected: Array) -> bool:
    difference = np.nanmax(np.abs(got - expected))
    return bool(difference < 1e-4 * np.nanmax(np.abs(expected)))


@pytest.mark.parametrize("variant", [pytest.param("t5-v1.0", marks=pytest.mark.long), "umt5"])
def test_whole_steps(tmp_path: Path, demo: Path, variant: str) -> None:
    """A decoder of kernels, and its graphs, give the logits of the plain one."""
    steps = Steps(write_checkpoint(tmp_path, variant, demo))
    plain = steps.logits()
    assert same(steps.logits(ahead=True), plain)
    steps.engine.use_kernels()
    assert same(steps.logits(), plain)
    steps.engine.use_graphs(capture=rerun)
    assert same(steps.logits(ahead=True), plain)


def test_kernels_that_fail_are_not_used(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Triton has no compiler, or the GPU no bf16."""
    steps = Steps(write_checkpoint(tmp_path, "flan-t5", demo))
    plain = steps.logits()
    monkeypatch.setattr(kernels, "_attention", {})
    with pytest.raises(KeyError):
        steps.engine.use_kernels()
    assert (steps.logits() == plain).all(where=~np.isnan(plain))


@pytest.mark.parametrize(
    "cases",
    [
        ["75-int8", "90-int8"],
        pytest.param(["80-int8", "90-fp32"], marks=pytest.mark.long),
    ],
    ids="+".join,
)
def test_they_compile_for_gpus(tmp_path: Path, demo: Path, cases: list[str]) -> None:
    """To machine code, by Triton itself, with the arguments that a model's decoding gives them; and
    nothing is compiled when more rows come than the first, or a short prompt."""
    folder = write_checkpoint(tmp_path / "model", "flan-t5", demo)
    told = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), folder, *cases],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        check=True,
    )
    needed = {"_attention", "_add_norm", "_gate"}
    compiled = json.loads(told.stdout)
    assert list(compiled) == cases
    for case, (first, later) in compiled.items():
        assert set(first) == needed | ({"_int8_product"} if "int8" in case else set())
        assert not later


def test_the_counts_that_are_captured_waste_little() -> None:
    assert row_counts(1) == [1]
    assert row_counts(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert row_counts(20) == [1, 2, 4, 8, 16, 20]
