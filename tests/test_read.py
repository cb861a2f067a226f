"""Reading weights: every form gives the same tensors, and what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import in_shards, write_checkpoint
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from handler.checkpoints import safetensors_file
from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.read import CheckpointWeights
from handler.checkpoints.safetensors_file import SafetensorsFile
from handler.checkpoints.tensors import check_tensors
from handler.checkpoints.torch_file import TorchFile
from handler.engines import init_inference
from handler.errors import LoadError

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
Change = Callable[[Path], Any]
PROMPTS = ["Count from 3 to 9.", "x"]


@pytest.fixture
def checkpoint(tmp_path: Path, demo: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "flan-t5", demo)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    weights = CheckpointWeights(folder)
    return {name: weights.get(name, weights.shape(name)) for name in weights}


def error_of(folder: Path) -> str:
    """What opening, comparing with config.json and reading all tensors says."""

    def read_all() -> None:
        weights = CheckpointWeights(folder)
        check_tensors(weights, T5Architecture.from_config(model_config(folder)))
        tensors(folder)

    with pytest.raises(LoadError) as caught:
        read_all()
    text = str(caught.value)
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 500
    return text


# Forms


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(w) for name, w in load_file(folder / SAFETENSORS).items()}


def as_bin(folder: Path) -> None:
    torch.save(state(folder), folder / BIN)
    (folder / SAFETENSORS).unlink()


def as_old_bin(folder: Path) -> None:
    """As torch wrote before 1.6, and as the first T5 checkpoints are."""
    torch.save(state(folder), folder / BIN, _use_new_zipfile_serialization=False)
    (folder / SAFETENSORS).unlink()


def as_bin_in_shards(folder: Path) -> None:
    weights, places = state(folder), {}
    for number in (1, 2):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        part = {name: weights[name] for name in sorted(weights)[number - 1 :: 2]}
        torch.save(part, folder / file)
        places.update(dict.fromkeys(part, file))
    (folder / f"{BIN}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / SAFETENSORS).unlink()


@pytest.mark.parametrize("form", [in_shards, as_bin, as_old_bin, as_bin_in_shards])
def test_every_form_gives_the_same_tensors(checkpoint: Path, form: Change) -> None:
    expected = tensors(checkpoint)
    form(checkpoint)
    found = tensors(checkpoint)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("backend", ["onnxruntime", "transformers"])
@pytest.mark.parametrize("form", [in_shards, as_bin, as_old_bin, as_bin_in_shards])
def test_every_form_answers_the_same(checkpoint: Path, form: Change, backend: str) -> None:
    def answers() -> list[str]:
        model = init_inference(str(checkpoint), backend=backend)
        texts = model.pipeline_generate(PROMPTS, max_new_tokens=12)
        model.close()
        return texts

    expected = answers()
    form(checkpoint)
    assert answers() == expected


def test_safetensors_win_over_their_duplicate(checkpoint: Path) -> None:
    (checkpoint / BIN).write_bytes(b"not looked at")
    assert CheckpointWeights(checkpoint).paths == [checkpoint / SAFETENSORS]


def test_what_a_broken_download_left_is_not_read(checkpoint: Path) -> None:
    expected = tensors(checkpoint)
    (checkpoint / f"{SAFETENSORS}1234567").write_bytes(b"half")
    (checkpoint / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert tensors(checkpoint).keys() == expected.keys()


FLOATS = st.floats(width=16, allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(FLOATS, max_size=12),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    transposed=st.booleans(),
)
def test_number_formats(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[float],
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    """Also an empty tensor, and one that is not contiguous in a .bin."""
    folder = tmp_path_factory.mktemp("formats")
    tensor = torch.tensor([values, values], dtype=dtype)
    stored = {"b": tensor.T if transposed else tensor, "a": torch.ones((), dtype=dtype)}
    torch.save(stored, folder / BIN)
    of_bin = tensors(folder)
    save_torch_file({name: t.contiguous() for name, t in stored.items()}, folder / SAFETENSORS)
    for found in (of_bin, tensors(folder)):
        assert found["a"] == 1
        np.testing.assert_array_equal(found["b"], stored["b"].float().numpy())


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def slices(size: int) -> st.SearchStrategy[slice]:
    """With steps, from the end, and beyond both ends."""
    ends = st.none() | st.integers(-size - 2, size + 2)
    return st.builds(slice, ends, ends, st.none() | st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_part_is_what_an_index_of_the_whole_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = data.draw(
        st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
    )
    index = tuple(data.draw(slices(size)) for size in data.draw(st.sampled_from(beginnings(shape))))
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    folder = tmp_path_factory.mktemp("parts")
    save_torch_file({"before": torch.ones(3, dtype=dtype), "t": tensor}, folder / SAFETENSORS)
    torch.save({"t": tensor}, folder / BIN)
    for file in (SafetensorsFile(folder / SAFETENSORS), TorchFile(folder / BIN)):
        with pytest.MonkeyPatch.context() as patch:  # pieces of one row, and all in one
            patch.setattr(safetensors_file, "_PIECE", data.draw(st.sampled_from([1, 1000])))
            part = file.read_part("t", index)
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, file.read("t")[index])


def beginnings(shape: list[int]) -> list[list[int]]:
    return [shape[:axes] for axes in range(len(shape) + 1)]


def test_a_bin_is_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    """Peak memory of a process that reads 8 tensors of 32 MB: far below the file's 256 MB."""
    torch.save({f"t{i}": torch.full((8_000_000,), 1.0) for i in range(8)}, tmp_path / BIN)
    code = (
        "import resource, sys, torch, pathlib\n"
        "from handler.checkpoints.read import CheckpointWeights\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "weights = CheckpointWeights(pathlib.Path(sys.argv[1]))\n"
        "for name in weights: assert weights.get(name, (8_000_000,)).mean() == 1\n"
        "print((peak() - before) // 1000)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert int(ended.stdout) < 150, ended.stderr


# What cannot be read


def with_weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Change:
    def apply(folder: Path) -> None:
        weights = load_file(folder / SAFETENSORS)
        change(weights)
        save_file(weights, folder / SAFETENSORS)

    return apply


def then(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def with_nan(weights: dict[str, np.ndarray]) -> None:
    weights["encoder.final_layer_norm.weight"][3] = np.nan


def renamed(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[new] = weights.pop(old)

    return change


def cut(pattern: str, share: float = 0.5) -> Change:
    def change(folder: Path) -> None:
        (file,) = folder.glob(pattern)
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * share)])

    return change


def written(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def saved(content: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / SAFETENSORS).unlink()
        torch.save(content, folder / BIN)

    return change


def bin_with(name: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        saved({**state(folder), name: value})(folder)

    return change


def in_both_shards(folder: Path) -> None:
    in_shards(folder)
    for file in folder.glob("model-*"):
        save_file({**load_file(file), "shared.weight": np.zeros((640, 32), np.float32)}, file)


def misplaced_by_the_index(folder: Path) -> None:
    in_shards(folder)
    index = folder / f"{SAFETENSORS}.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["shared.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(told))


def index_of(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / SAFETENSORS).unlink()
        (folder / f"{SAFETENSORS}.index.json").write_text(text)

    return change


def twice_in_a_header(folder: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    (folder / SAFETENSORS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def header_of(entry: str) -> Change:
    header = f'{{"a":{entry}}}'.encode()
    return written(SAFETENSORS, len(header).to_bytes(8, "little") + header + bytes(4))


def overlapping(folder: Path) -> None:
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    (folder / SAFETENSORS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))


def a_tar(folder: Path) -> None:
    (folder / SAFETENSORS).unlink()
    with tarfile.open(folder / BIN, "w") as tar:
        tar.add(folder / "config.json")


def a_pickle(folder: Path) -> None:
    (folder / SAFETENSORS).unlink()
    (folder / BIN).write_bytes(pickle.dumps({"a": 1}, protocol=2))


NORM = "encoder.final_layer_norm.weight"
WI = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_weights(lambda w: w.pop(WI)), (SAFETENSORS, f"no tensor {WI}")),
        (with_weights(lambda w: w.pop("lm_head.weight")), ("no tensor lm_head.weight",)),
        (with_weights(renamed(WI, "wi")), (f"no tensor {WI}",)),
        (
            with_weights(lambda w: w.update(extra=w[NORM].copy())),
            (SAFETENSORS, "tensor extra has no place in the t5 that config.json describes"),
        ),
        (
            with_weights(lambda w: w.update({"encoder.embed_tokens.weight": w[NORM].copy()})),
            ("encoder.embed_tokens.weight has shape [32], config.json makes it [640, 32]",),
        ),
        (with_weights(with_nan), (SAFETENSORS, f"tensor {NORM} holds NaN or infinity")),
        (then(with_weights(with_nan), as_bin), (BIN, f"tensor {NORM} holds NaN or infinity")),
        (
            with_weights(lambda w: w.update({NORM: np.full(32, 1e300)})),
            (f"tensor {NORM} holds NaN or infinity",),
        ),
        (
            with_weights(lambda w: w.update({NORM: np.ones(31, np.float32)})),
            (SAFETENSORS, f"tensor {NORM} has shape [31], config.json makes it [32]"),
        ),
        (cut(SAFETENSORS), (SAFETENSORS, "is truncated or padded")),
        (cut(SAFETENSORS, 0.001), (SAFETENSORS, "is not a safetensors file")),
        (then(in_shards, cut("*2-of*")), ("model-00002-of-00002.safetensors", "is truncated")),
        (then(as_bin, cut(BIN)), (BIN, "is damaged, torch cannot read it")),
        (then(as_old_bin, cut(BIN)), (BIN, "is damaged, torch cannot read it")),
        (then(as_bin_in_shards, cut("*2-of*")), ("pytorch_model-00002-of-00002.bin is damaged",)),
        (then(as_bin, written(BIN, b"")), (BIN, "is damaged")),
        (in_both_shards, ("tensor shared.weight is in", "00001-of-00002", "00002-of-00002")),
        (misplaced_by_the_index, ("00001-of-00002.safetensors: no tensor shared.weight, which",)),
        (index_of('{"weight_map": {"a": "gone.safetensors"}}'), ("gone.safetensors for tensor a",)),
        (index_of('{"weight_map": {"a": "../a.safetensors"}}'), ("a is in", "which is no shard")),
        (index_of('{"weight_map": {}}'), ("index.json is damaged: it names no tensors",)),
        (twice_in_a_header, (SAFETENSORS, "a is there twice")),
        (
            header_of('{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}'),
            (SAFETENSORS, "is not a safetensors file"),
        ),
        (
            header_of('{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}'),
            (SAFETENSORS, "is not a safetensors file"),
        ),
        (
            bin_with(NORM, torch.ones(32).to_sparse()),
            (BIN, f"tensor {NORM} is sparse; save the checkpoint with dense tensors"),
        ),
        (bin_with(NORM, torch.ones(32, device="meta")), (f"tensor {NORM} is without data",)),
        (overlapping, (SAFETENSORS, "tensor b begins at byte 4", "ends at 8")),
        (a_tar, (BIN, "is a tar file, which is refused")),
        (a_pickle, (BIN, "is damaged, torch cannot read it")),
        (saved([torch.ones(2)]), (BIN, "holds no tensors by name, but a list")),
        (saved({}), (BIN, "holds no tensors by name")),
        (saved({"state_dict": {}}), (BIN, "state_dict is no tensor, but a dict")),
        (
            with_weights(lambda w: w.update({NORM: np.ones(32, np.int8)})),
            (SAFETENSORS, f"tensor {NORM} is of type I8, allowed are F64, F32, F16, BF16"),
        ),
        (bin_with("lm_head.weight", torch.ones(640, 32, dtype=torch.int8)), ("type torch.int8",)),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    checkpoint: Path, change: Change, words: tuple[str, ...]
) -> None:
    change(checkpoint)
    error = error_of(checkpoint)
    for word in words:
        assert word in error


class _RunsCode:
    """Its pickle makes a folder when it is read by an ordinary pickle.load."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("backend", ["onnxruntime", "transformers"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    checkpoint: Path, tmp_path: Path, backend: str, zipped: bool
) -> None:
    target = tmp_path / "it ran"
    content = {**state(checkpoint), "evil": _RunsCode(target)}
    (checkpoint / SAFETENSORS).unlink()
    torch.save(content, checkpoint / BIN, _use_new_zipfile_serialization=zipped)
    with pytest.raises(LoadError, match=rf"{BIN} holds more .* \({os.name}.mkdir\)") as caught:
        init_inference(str(checkpoint), backend=backend)
    assert "convert it to safetensors" in str(caught.value)
    assert not target.exists()
    torch.load(checkpoint / BIN, weights_only=False)
    assert target.exists(), "the file would have run code"


@pytest.mark.parametrize(
    "name",
    [
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ],
)
@pytest.mark.parametrize("backend", ["onnxruntime", "transformers"])
def test_harmless_duplicates_pass(checkpoint: Path, name: str, backend: str) -> None:
    weights = load_file(checkpoint / SAFETENSORS)
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights[name] = weights["shared.weight" if "embed" in name else bias].copy()
    save_file(weights, checkpoint / SAFETENSORS)
    model = init_inference(str(checkpoint), backend=backend)
    assert len(model.pipeline_generate(PROMPTS, max_new_tokens=4)) == 2
    model.close()


def test_a_tied_head_may_be_there_or_not(tmp_path: Path, demo: Path) -> None:
    folder = write_checkpoint(tmp_path / "tied", "t5-v1.0", demo)
    architecture = T5Architecture.from_config(model_config(folder))
    check_tensors(CheckpointWeights(folder), architecture)
    with_weights(lambda w: w.update({"lm_head.weight": w["shared.weight"].copy()}))(folder)
    check_tensors(CheckpointWeights(folder), architecture)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_error_of_one_line_or_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One byte changed anywhere: never another exception."""
    folder = tmp_path_factory.mktemp("damaged")
    name = data.draw(st.sampled_from([SAFETENSORS, BIN]))
    stored = {"first": torch.ones(3, 2), "second": torch.zeros(4)}
    if name == BIN:
        torch.save(stored, folder / name)
    else:
        save_torch_file(stored, folder / name)
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    with contextlib.suppress(LoadError):
        assert all(array.dtype == np.float32 for array in tensors(folder).values())


def test_bin_without_torch_says_what_to_do(checkpoint: Path) -> None:
    as_bin(checkpoint)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from handler.engines import init_inference\n"
        "init_inference(sys.argv[1], backend='onnxruntime')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, checkpoint], cwd=ROOT, capture_output=True, text=True
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert f"{BIN} can only be read by torch, which is not installed" in last
    assert "save the checkpoint as safetensors" in last
    assert "or install torch" in last


def test_bin_needs_torch_only_until_its_graphs_are_built(checkpoint: Path) -> None:
    as_bin(checkpoint)
    init_inference(str(checkpoint), backend="onnxruntime").close()
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from handler.engines import init_inference\n"
        "init_inference(sys.argv[1], backend='onnxruntime').close()"
    )
    subprocess.run([sys.executable, "-c", code, checkpoint], cwd=ROOT, check=True)
