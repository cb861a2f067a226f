"""Our own layout: the ranks' files joined are the checkpoint, and the CPU engine serves them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoints import write_checkpoint
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from handler.checkpoints.partition import partition
from handler.checkpoints.quantized import TINY
from handler.config import configuration_of
from handler.engines import init_inference, onnx_t5
from handler.engines.onnx_t5 import cache, choose
from handler.errors import LoadError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import parse_parameters

VARIANTS = ["flan-t5", "t5-v1.0", "umt5", "mt5", "byt5", "deep-decoder"]
PROMPTS = ["Count from 3 to 9.", "x", "What is the plural of mouse?"]

# What the end of a tensor's name says of the axis along which the ranks' parts are joined.
JOINED = {
    **dict.fromkeys(("q", "k", "v", "wi", "wi_0", "wi_1", "lm_head"), 0),
    **dict.fromkeys(("o", "wo", "relative_attention_bias"), 1),
}


def made(source: Path, output: Path, **options: Any) -> Path:
    partition(configuration_of(str(source), **options), "native", output)
    return output


def joined(folder: Path, degree: int) -> dict[str, np.ndarray]:
    """Every tensor of the ranks, read by the safetensors library."""
    ranks = []
    for rank in range(degree):
        with safe_open(folder / f"rank-{rank}-of-{degree}.safetensors", "pt") as file:
            names = list(file.keys())
            ranks.append({name: file.get_tensor(name).float().numpy() for name in names})
    assert all(rank.keys() == ranks[0].keys() for rank in ranks)
    found = {}
    for name in ranks[0]:
        parts = [rank[name] for rank in ranks]
        kind, is_scale = name.split(".weight")[0].rpartition(".")[2], name.endswith(".scale")
        axis = JOINED.get(kind)
        if axis is None or (is_scale and axis == 1):
            assert all(np.array_equal(part, parts[0]) for part in parts)
            found[name] = parts[0]
        else:
            found[name] = np.concatenate(parts, axis)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_ranks_joined_are_the_checkpoint(
    tmp_path: Path, demo: Path, variant: str, degree: int
) -> None:
    source = write_checkpoint(tmp_path / "c", variant, demo)
    found = joined(made(source, tmp_path / "out", tensor_parallel_degree=degree), degree)
    expected = load_file(source / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_rounds_as_torch_does(tmp_path: Path, demo: Path, dtype: str) -> None:
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    folder = made(source, tmp_path / "out", dtype=dtype)
    expected = load_file(source / "model.safetensors")
    with safe_open(folder / "rank-0-of-1.safetensors", "pt") as file:
        for name, tensor in expected.items():
            stored, exact = file.get_tensor(name), torch.from_numpy(tensor)
            # what wo computes with leaves fp16's range; norms are computed in fp32
            keeps = tensor.ndim == 1 or (dtype == "fp16" and name.endswith(".wo.weight"))
            assert torch.equal(stored, exact if keeps else exact.to(kind)), name


@pytest.mark.parametrize("variant", ["flan-t5", "t5-v1.0"])
def test_int8_has_one_scale_for_each_output(tmp_path: Path, demo: Path, variant: str) -> None:
    source = write_checkpoint(tmp_path / "c", variant, demo)
    found = joined(made(source, tmp_path / "out", dtype="int8"), 1)
    expected = load_file(source / "model.safetensors")
    expected.setdefault("lm_head.weight", expected["shared.weight"])
    for name, tensor in expected.items():
        scale = found.get(f"{name}.scale")
        if scale is None:
            assert np.array_equal(found[name], tensor), name
            continue
        assert scale.shape == tensor.shape[:1]
        assert np.abs(found[name]).max(1).tolist() == [127] * len(tensor)
        error = np.abs(found[name] * scale[:, None] - tensor)
        assert (error <= 0.5001 * scale[:, None]).all(), name
    unquantized = {name for name in expected if f"{name}.scale" not in found}
    assert unquantized == {n for n in expected if "norm" in n or "bias" in n or "shared" in n}


def test_a_row_of_zeros(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"][7] = 0
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    found = joined(made(source, tmp_path / "out", dtype="int8"), 1)
    assert not found["lm_head.weight"][7].any()
    assert found["lm_head.weight.scale"][7] == np.float32(TINY)


def test_int8_is_the_same_for_every_degree(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    one = joined(made(source, tmp_path / "1", dtype="int8"), 1)
    for degree in (2, 4):
        options: dict[str, Any] = {"dtype": "int8", "tensor_parallel_degree": degree}
        many = joined(made(source, tmp_path / str(degree), **options), degree)
        assert many.keys() == one.keys()
        for name, tensor in one.items():
            assert np.array_equal(many[name], tensor), name


def test_a_vocabulary_that_does_not_divide(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "byt5", demo, vocab_size=387)
    folder = made(source, tmp_path / "out", tensor_parallel_degree=4)
    sizes = [
        len(load_file(folder / f"rank-{rank}-of-4.safetensors")["lm_head.weight"])
        for rank in range(4)
    ]
    assert sizes == [97, 97, 97, 96]
    head = joined(folder, 4)["lm_head.weight"]
    assert np.array_equal(head, load_file(source / "model.safetensors")["lm_head.weight"])


# On the CPU engine


def answers(folder: Path, **options: Any) -> list[GenerationResult]:
    model = init_inference(str(folder), backend="onnxruntime", **options)
    parameters = parse_parameters({"max_new_tokens": 12})
    results = model.generate([GenerationRequest(prompt, parameters) for prompt in PROMPTS])
    model.close()
    return results


@pytest.mark.parametrize("variant", [*VARIANTS, "odd-sizes"])
def test_fp32_answers_as_the_checkpoint_does(tmp_path: Path, demo: Path, variant: str) -> None:
    source = write_checkpoint(tmp_path / "c", variant, demo)
    assert answers(made(source, tmp_path / "out")) == answers(source)


def only(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = choose.Forms.single(form, form, 16)
    monkeypatch.setattr(choose, "choose_forms", lambda *_, **__: forms)


@pytest.mark.parametrize("variant", ["flan-t5", "t5-v1.0", "odd-sizes", "umt5"])
def test_int8_rows_are_taken_as_they_are(
    tmp_path: Path, demo: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what the engine makes of the checkpoint itself."""
    only("int8_rows", monkeypatch)
    source = write_checkpoint(tmp_path / "c", variant, demo)
    expected = answers(source, dtype="int8")
    assert answers(made(source, tmp_path / "out", dtype="int8")) == expected


@pytest.mark.parametrize("variant", ["flan-t5", "t5-v1.0", "odd-sizes"])
def test_int8_blocks_hold_the_same_numbers(
    tmp_path: Path, demo: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from handler.engines.onnx_t5.graph import GraphWriter

    written: dict[str, np.ndarray] = {}
    weight = GraphWriter.weight

    def recorded(self: GraphWriter, name: str, array: np.ndarray) -> str:
        written[name] = array
        return weight(self, name, array)

    monkeypatch.setattr(GraphWriter, "weight", recorded)
    only("int8_blocks", monkeypatch)
    source = write_checkpoint(tmp_path / "c", variant, demo)
    folder = made(source, tmp_path / "out", dtype="int8")
    stored = load_file(folder / "rank-0-of-1.safetensors")
    place = "decoder.block.0.layer.2.DenseReluDense.wo"
    blocks, scales = written[f"{place}.blocks"], written[f"{place}.scales"]
    values, scale = stored[f"{place}.weight"], stored[f"{place}.weight.scale"]
    assert (scales == scale[:, None]).all()
    flat = blocks.reshape(len(values), -1).astype(np.int16) - 128
    assert np.array_equal(flat[:, : values.shape[1]], values)
    assert not flat[:, values.shape[1] :].any()
    assert all(result.token_ids for result in answers(folder))


def test_rows_for_kernels_that_saturate_are_not_made_of_int8(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a CPU has int8_blocks and the limited int8_rows_63, which would round again."""
    right = choose._is_right
    monkeypatch.setattr(choose, "_is_right", lambda f, c: f != "int8_rows" and right(f, c))
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    folder = made(source, tmp_path / "out", dtype="int8")
    (graphs,) = (folder / ".onnx_t5").glob("*/")
    assert [file.name for file in graphs.glob("decoder*.onnx")] == ["decoder_int8_blocks.onnx"]
    monkeypatch.setattr(choose, "_is_right", lambda *_: False)
    shutil.rmtree(folder / ".onnx_t5")
    with pytest.raises(LoadError, match="no int8 kernel computes right on this CPU"):
        answers(folder)


def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("graphs are built")

    monkeypatch.setattr(cache, "_build_aside", refuse)
    monkeypatch.setattr(choose, "_measure", refuse)


@pytest.mark.parametrize("options", [{}, {"max_rows": 3}, {"cache_dir": "cache"}], ids=str)
def test_the_first_start_finds_its_graphs(
    tmp_path: Path, demo: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the folder has been moved to, and whichever place is written to."""
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    made(source, tmp_path / "out", dtype="int8").rename(tmp_path / "moved")
    no_building(monkeypatch)
    assert len(answers(tmp_path / "moved", **options)) == len(PROMPTS)


def test_graphs_that_are_gone_are_built_from_the_weights(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    folder = made(source, tmp_path / "out", dtype="int8")
    first = answers(folder)
    kept = {file.name for file in (folder / ".onnx_t5").glob("*/")}
    for graphs in (folder / ".onnx_t5").glob("*/"):
        shutil.rmtree(graphs)
    assert answers(folder) == first
    assert {file.name for file in (folder / ".onnx_t5").glob("*/")} == kept


def test_weights_that_were_changed_are_never_built_from(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    folder = made(source, tmp_path / "out", dtype="int8")
    shutil.rmtree(folder / ".onnx_t5")
    weights = folder / "rank-0-of-1.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LoadError, match=r"safetensors is not the file that partition\.json tells"):
        answers(folder)


@pytest.mark.parametrize("start", [b"\xff" * 8, (40).to_bytes(8, "little") + b"{" * 40], ids=repr)
def test_a_damaged_header(tmp_path: Path, demo: Path, start: bytes) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    weights = made(source, tmp_path / "out") / "rank-0-of-1.safetensors"
    weights.write_bytes(start + weights.read_bytes()[len(start) :])
    with pytest.raises(LoadError, match=r"rank-0-of-1\.safetensors is not a safetensors file"):
        answers(tmp_path / "out")


def test_a_weight_beyond_bf16(tmp_path: Path, demo: Path) -> None:
    """fp32 goes on a little beyond the largest bf16."""
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    weights = load_file(source / "model.safetensors")
    weights["shared.weight"][3, 3] = -3.4e38
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"shared\.weight holds 3\.4e\+38, bf16 ends at"):
        made(source, tmp_path / "out", dtype="bf16")
    weights["shared.weight"][3, 3] = -3.389e38
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    made(source, tmp_path / "out", dtype="bf16")


def test_only_int8_for_one_rank_brings_graphs(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    assert not (made(source, tmp_path / "a") / ".onnx_t5").exists()
    folder = made(source, tmp_path / "b", dtype="int8", tensor_parallel_degree=2)
    assert not (folder / ".onnx_t5").exists()


def test_without_onnx_there_are_no_graphs(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: Any) -> None:
        raise ImportError("No module named 'onnxruntime'")

    monkeypatch.setattr(onnx_t5, "prepare", missing)
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo)
    folder = made(source, tmp_path / "out", dtype="int8")
    assert (folder / "partition.json").is_file()
    assert "without graphs for the CPU engine" in caplog.text
