"""Estimated sizes against what the engines really hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_checkpoints import VARIANTS, write_checkpoint

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.config import configuration_of
from handler.packaging.memory import Footprint, Workload

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(params=VARIANTS)
def folder(request: pytest.FixtureRequest, demo: Path, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", request.param, demo)


def architecture(folder: Path) -> T5Architecture:
    return T5Architecture.from_config(model_config(folder))


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_holds_as_many_bytes(folder: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=named[dtype])
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    # norms and biases are in the dtype there, in fp32 in the estimate: nothing in a real model
    estimate = Footprint(architecture(folder), "transformers", dtype).weights
    assert sum(held.values()) == pytest.approx(estimate, rel=0.03)


def test_the_onnx_engine_holds_as_many_bytes(folder: Path) -> None:
    from handler.engines import onnx_t5

    work = Workload(3, 40, 20)
    c = configuration_of(
        str(folder), max_rows=3, max_input_tokens=40, max_output_tokens=20, threads=1
    )
    engine = onnx_t5.load(folder, c)
    estimate = Footprint(architecture(folder), "onnxruntime", "fp32", on_gpu=False)
    caches = sum(array.nbytes for _, array in engine._rows.caches(3))
    engine.close()
    (graphs,) = (path.parent for path in (folder / ".onnx_t5").glob("*/manifest.json"))
    stored = sum(file.stat().st_size for file in graphs.iterdir())
    assert estimate.weights < stored < 1.2 * estimate.weights + 200_000  # nodes and names besides
    assert estimate.caches(work) == caches


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_torch_engine_holds_as_many_bytes(folder: Path, dtype: str) -> None:
    pytest.importorskip("torch")
    from handler.engines.torch_t5.part import load_part

    c = configuration_of(str(folder), dtype=dtype, device_id=-1)
    model = load_part(folder, c).model
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    on_gpu = dtype != "int8"  # computed in fp32 on a CPU
    estimate = Footprint(architecture(folder), "torch", dtype, on_gpu=on_gpu).weights
    assert sum(held.values()) == pytest.approx(estimate, rel=0.1)


def test_ranks_share_what_can_be_split(demo: Path) -> None:
    a = architecture(demo)
    whole, half = (Footprint(a, "torch", "bf16", degree) for degree in (1, 2))
    work = Workload(8, 100, 50)
    assert half.weights == pytest.approx(whole.weights / 2, rel=0.02)
    assert 2 * half.caches(work) == whole.caches(work)
    assert 2 * half.read_by_a_step == pytest.approx(whole.read_by_a_step, rel=0.02)


def test_a_step_reads_the_decoder_and_the_head_but_not_what_reads_prompts(demo: Path) -> None:
    a = architecture(demo)
    inner = a.num_heads * a.d_kv
    layer = 6 * inner * a.d_model + 3 * a.d_model * a.d_ff  # q k v o, cross q o; wi_0 wi_1 wo
    expected = a.num_decoder_layers * layer + a.vocab_size * a.d_model
    assert Footprint(a, "torch", "bf16").read_by_a_step == pytest.approx(2 * expected, rel=0.02)


def test_more_rows_and_longer_ones_need_more(demo: Path) -> None:
    for backend in ("torch", "transformers", "onnxruntime"):
        f = Footprint(architecture(demo), backend, "fp32", on_gpu=backend != "onnxruntime")
        sizes = [f.total(Workload(*work)) for work in ((1, 64, 8), (9, 64, 8), (9, 4096, 8))]
        assert sizes == sorted(set(sizes))
