"""Loading the CPU engine: which one serves, its graphs on disk, and what cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from random_checkpoints import in_shards, write_checkpoint
from safetensors.numpy import load_file, save_file

from handler import engines
from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.config import configuration_of
from handler.engines import choose_backend, init_inference
from handler.engines.onnx_t5.cache import built
from handler.engines.onnx_t5.choose import Forms, choose_forms
from handler.engines.onnx_t5.sessions import use_threads
from handler.errors import LoadError
from handler.generation import GenerationRequest, GenerationResult
from handler.machine import usable_cpus
from handler.parameters import parse_parameters

PROMPTS = ["Count from 3 to 9.", "x", "What is the plural of mouse?"]
WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path, demo: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "flan-t5", demo)


def answers(
    checkpoint: Path, prompts: list[str] = PROMPTS, **options: Any
) -> list[GenerationResult]:
    """Load, answer, close."""
    model = init_inference(str(checkpoint), backend="onnxruntime", **options)
    parameters = parse_parameters({"max_new_tokens": 12})
    results = model.generate([GenerationRequest(prompt, parameters) for prompt in prompts])
    model.close()
    return results


def folders(cache: Path) -> list[Path]:
    return sorted(file for file in cache.iterdir() if file.is_dir())


# Graphs on disk


def test_graphs_are_built_once_and_kept_beside_the_model(checkpoint: Path) -> None:
    first = answers(checkpoint)
    (graphs,) = folders(checkpoint / ".onnx_t5")
    made = graphs.stat().st_ino, graphs.stat().st_mtime_ns
    assert answers(checkpoint) == first
    assert folders(checkpoint / ".onnx_t5") == [graphs]
    assert (graphs.stat().st_ino, graphs.stat().st_mtime_ns) == made


def _largest(graphs: Path) -> Path:
    return max(graphs.iterdir(), key=lambda file: file.stat().st_size)


def _flip_a_bit(graphs: Path) -> None:
    file = _largest(graphs)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut(graphs: Path) -> None:
    file = _largest(graphs)
    file.write_bytes(file.read_bytes()[:-100])


def _lose(pattern: str) -> Callable[[Path], None]:
    return lambda graphs: next(iter(graphs.glob(pattern))).unlink()


def _lose_all(graphs: Path) -> None:
    for file in graphs.iterdir():
        file.unlink()


def _manifest(text: str) -> Callable[[Path], None]:
    def change(graphs: Path) -> None:
        (graphs / "manifest.json").write_text(text)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_bit,
        _cut,
        _lose("decoder*.onnx"),
        _lose("encoder*.data"),
        _lose("embedding.npy"),
        _lose("manifest.json"),
        _lose_all,
        _manifest(""),
        _manifest("[]"),
        _manifest("{}"),
        _manifest("[" * 100_000),
        _manifest('{"embedding.npy": 7}'),
    ],
)
def test_damaged_graphs_are_built_anew(checkpoint: Path, damage: Callable[[Path], None]) -> None:
    first = answers(checkpoint)
    (graphs,) = folders(checkpoint / ".onnx_t5")
    files = {file.name: file.read_bytes() for file in graphs.iterdir()}
    damage(graphs)
    assert answers(checkpoint) == first
    assert folders(checkpoint / ".onnx_t5") == [graphs]
    assert {file.name: file.read_bytes() for file in graphs.iterdir()} == files


@pytest.mark.parametrize("keeps_its_time", [False, True])
def test_other_weights_under_the_same_name_and_size(
    checkpoint: Path, demo: Path, keeps_its_time: bool
) -> None:
    before, status = answers(checkpoint), (checkpoint / WEIGHTS).stat()
    other = write_checkpoint(checkpoint.parent / "other", "flan-t5", demo, seed=1)
    (checkpoint / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    assert (checkpoint / WEIGHTS).stat().st_size == status.st_size
    if keeps_its_time:  # as tar and rsync do
        os.utime(checkpoint / WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = answers(checkpoint)
    assert after == answers(other)
    assert after != before


def test_another_config_has_other_graphs(checkpoint: Path) -> None:
    before = answers(checkpoint)
    config = model_config(checkpoint)
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "feed_forward_proj": "gated-relu"})
    )
    assert answers(checkpoint) != before
    assert len(folders(checkpoint / ".onnx_t5")) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"/x": 7}'])
def test_a_damaged_list_of_digests_is_made_anew(checkpoint: Path, text: str) -> None:
    first = answers(checkpoint)
    digests = checkpoint / ".onnx_t5" / "digests.json"
    good = digests.read_text()
    digests.write_text(text.replace("/x", str(checkpoint / WEIGHTS)))
    assert answers(checkpoint) == first
    assert json.loads(digests.read_text()) == json.loads(good)


def test_whoever_is_second_waits_and_takes_the_firsts_graphs(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def build_slowly(folder: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        (folder / "graph").write_text("first")

    def build_again(folder: Path) -> None:
        raise AssertionError("it is there already")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(built, tmp_path, [], "settings", build_slowly)
        assert begun.wait(60)
        second = threads.submit(built, tmp_path, [], "settings", build_again)
        go_on.set()
        assert first.result(60) == second.result(60)
    assert folders(tmp_path) == [first.result()]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "graph").write_text("half")
        raise LoadError("no tensor")

    with pytest.raises(LoadError, match="no tensor"):
        built(tmp_path, [], "settings", build)
    assert folders(tmp_path) == []


def _write_graph(folder: Path) -> None:
    (folder / "graph").write_text("whole")


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    graphs = built(tmp_path, [], "settings", _write_graph)
    shutil.rmtree(graphs)
    (tmp_path / f"{graphs.name}.half.building").mkdir()
    (tmp_path / "another.half.building").mkdir()
    assert built(tmp_path, [], "settings", _write_graph) == graphs
    assert folders(tmp_path) == sorted([graphs, tmp_path / "another.half.building"])


@pytest.mark.parametrize("kind", ["a file", "a link", "a link to nothing"])
def test_what_is_no_folder_gives_way(tmp_path: Path, kind: str) -> None:
    graphs = built(tmp_path, [], "settings", _write_graph)
    shutil.rmtree(graphs)
    target = tmp_path / "elsewhere"
    if kind == "a file":
        graphs.write_text("x")
    else:
        if kind == "a link":
            target.mkdir()
        graphs.symlink_to(target)
    assert built(tmp_path, [], "settings", _write_graph) == graphs
    assert (graphs / "graph").read_text() == "whole"
    assert not graphs.is_symlink()


LOAD = """
import sys
from handler.engines import init_inference
import handler.engines.onnx_t5.engine
print("ready", flush=True)
sys.stdin.readline()
model = init_inference(sys.argv[1], backend="onnxruntime", dtype=sys.argv[2])
print(model.pipeline_generate(["Count from 3 to 9.", "x"], max_new_tokens=12))
model.close()
"""


@pytest.mark.parametrize(("dtype", "damaged"), [("fp32", False), ("fp32", True), ("int8", False)])
def test_processes_that_start_at_once(checkpoint: Path, dtype: str, damaged: bool) -> None:
    if damaged:
        answers(checkpoint)
        (graphs,) = folders(checkpoint / ".onnx_t5")
        (graphs / "embedding.npy").write_bytes(b"")
    command = [sys.executable, "-c", LOAD, str(checkpoint), dtype]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    kept = folders(checkpoint / ".onnx_t5")
    if dtype == "fp32":  # in int8 each may have measured another form as the fastest
        assert printed[0] == printed[1] == printed[2]
        assert len(kept) == 1
    assert all((graphs / "manifest.json").is_file() for graphs in kept)


# Where graphs can be kept


def _by_a_file(checkpoint: Path) -> None:
    (checkpoint / ".onnx_t5").write_text("in the way")


def _by_its_mode(checkpoint: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    checkpoint.chmod(0o555)


@pytest.mark.parametrize("close", [_by_a_file, _by_its_mode])
def test_a_folder_that_cannot_be_written_to(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    close: Callable[[Path], None],
) -> None:
    """Then the user's cache keeps graphs; that of the XDG convention, else the home's."""
    close(checkpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = answers(checkpoint)
    assert len(folders(tmp_path / "xdg" / "djl-t5-handler")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert answers(checkpoint) == first
    assert len(folders(tmp_path / "home" / ".cache" / "djl-t5-handler")) == 1


def test_cache_dir_comes_before_all(checkpoint: Path, tmp_path: Path) -> None:
    answers(checkpoint, cache_dir=str(tmp_path / "some" / "where"))
    assert len(folders(tmp_path / "some" / "where")) == 1
    assert not (checkpoint / ".onnx_t5").exists()


def test_a_user_without_a_home(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them that are run under any user id."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert len(answers(checkpoint)) == 3
    shutil.rmtree(checkpoint / ".onnx_t5")
    _by_a_file(checkpoint)
    assert "option.cache_dir" in load_error(checkpoint)


def test_no_place_for_graphs(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = load_error(checkpoint, cache_dir=str(tmp_path / "file"))
    assert f"no place for built graphs: {tmp_path / 'file'} cannot be written to" in error
    assert "set option.cache_dir" in error


FULL_DISK = """
import resource, sys
from handler.engines import init_inference
from handler.errors import LoadError
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        init_inference(sys.argv[1], backend="onnxruntime", dtype=sys.argv[2])
    except LoadError as error:
        print(error)
"""


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_full_disk(checkpoint: Path, dtype: str) -> None:
    """Files of one byte, and then of 50 kB, are the largest that can be written."""
    printed = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(checkpoint), dtype, "1", "50000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    cache = checkpoint / ".onnx_t5"
    for line in printed:
        assert f"graphs cannot be written to {cache}" in line
        assert "set option.cache_dir to a folder with room" in line
    assert len(printed) == 2
    assert folders(cache) == []
    assert len(answers(checkpoint, dtype=dtype)) == 3


# What cannot be loaded


def load_error(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        init_inference(str(checkpoint), backend="onnxruntime", **options)
    text = str(caught.value)
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 500
    return text


Change = Callable[[Path], None]


def _with_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = {**model_config(folder), **changes}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def _with_weights(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def change_file(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return change_file


def _with_header(**changes: Any) -> Change:
    """Other entries for the tensor shared.weight."""

    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["shared.weight"].update(changes)
        written = json.dumps(header).encode()
        rest = data[8 + length :]
        (folder / WEIGHTS).write_bytes(len(written).to_bytes(8, "little") + written + rest)

    return change


def _with_bytes(name: str, data: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def _with_index(text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(text)

    return change


def _shortened(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def _without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def _without_a_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _set_nan(weights: dict[str, np.ndarray]) -> None:
    weights["decoder.block.1.layer.2.DenseReluDense.wo.weight"][3, 4] = np.nan


def _as_integers(weights: dict[str, np.ndarray]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int8)


WI = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with_weights(lambda w: w.pop(WI)), (WEIGHTS, f"no tensor {WI}")),
        (_with_weights(lambda w: w.pop("shared.weight")), (WEIGHTS, "no tensor shared.weight")),
        (_with_config(d_ff=50), (WEIGHTS, "wi_0.weight has shape [48, 32]", "makes it [50, 32]")),
        (_with_config(num_heads=8), ("has shape [32, 32]", "config.json makes it [64, 32]")),
        (_with_config(num_layers=3), ("no tensor encoder.block.2",)),
        (_with_config(num_decoder_layers=3), ("no tensor decoder.block.2",)),
        (_with_config(vocab_size=700), ("shared.weight has shape [640, 32]", "[700, 32]")),
        (_with_weights(_set_nan), ("decoder.block.1.layer.2", "wo.weight holds NaN or infinity")),
        (_with_weights(_as_integers), ("lm_head.weight is of type I8", "F32, F16, BF16")),
        (_shortened, (WEIGHTS, "is truncated or padded")),
        (_with_bytes(WEIGHTS, b""), (WEIGHTS, "is not a safetensors file")),
        (_with_bytes(WEIGHTS, b"version https://git-lfs.github.com/spec/v1"), (WEIGHTS, "is not")),
        (_with_bytes(WEIGHTS, b"\2\0\0\0\0\0\0\0[]"), (WEIGHTS, "is not a safetensors file")),
        (_with_bytes(WEIGHTS, b"\2\0\0\0\0\0\0\0{}"), (WEIGHTS, "is not a safetensors file")),
        (_with_header(shape=[640, 31]), ("shared.weight has 81920 bytes", "not F32 [640, 31]")),
        (_with_header(shape="wide"), (WEIGHTS, "is not a safetensors file")),
        (_with_header(data_offsets=[8, 4]), (WEIGHTS, "data_offsets 8, 4")),
        (_with_header(data_offsets=[-40960, 40960]), (WEIGHTS, "data_offsets -40960, 40960")),
        (_with_header(dtype=None), (WEIGHTS, "shared.weight is of type None")),
        (_without(WEIGHTS), ("neither model.safetensors nor pytorch_model.bin", "complete it")),
        (
            _without_a_shard,
            ("index.json names model-00002-of-00002.safetensors for tensor", "not there"),
        ),
        (_with_index("{"), ("index.json is damaged",)),
        (_with_index("[]"), ("index.json is damaged",)),
        (_with_index("{}"), ("index.json is damaged",)),
        (_with_index('{"weight_map": {"a": ["b"]}}'), ("index.json is damaged",)),
        (_with_config(feed_forward_proj="gated-swoosh"), ("feed_forward_proj 'gated-swoosh'",)),
        (_with_config(model_type="bart"), ("'bart' is not of the T5 family", "option.backend")),
        (_without("config.json"), ("config.json",)),
        (_without("tokenizer.json", "spiece.model"), ("has no tokenizer",)),
        (_with_bytes("tokenizer.json", b"{}"), ("tokenizer.json is not a tokenizer.json",)),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded(
    checkpoint: Path, change: Change, words: tuple[str, ...]
) -> None:
    change(checkpoint)
    error = load_error(checkpoint)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("dtype", "bf16", "auto, fp32, int8"),
        ("dtype", "fp16", "auto, fp32, int8"),
        ("dtype", "int4", "auto, fp32, int8"),
        ("tensor_parallel_degree", 2, "1, max"),
        ("pipeline_parallel_degree", 2, "1"),
    ],
)
def test_options_that_it_does_not_have(
    checkpoint: Path, option: str, value: Any, allowed: str
) -> None:
    error = load_error(checkpoint, **{option: value})
    assert f"option.{option}={value} is not supported by backend onnxruntime" in error
    assert error.endswith(f"allowed: {allowed}")


def test_kernels_per_batch_are_for_int8(checkpoint: Path) -> None:
    error = load_error(checkpoint, cpu_kernel="per_batch")
    assert "option.cpu_kernel=per_batch" in error
    assert "option.dtype=int8" in error


def test_more_rows_than_memory(checkpoint: Path) -> None:
    error = load_error(checkpoint, max_rows=10_000_000)
    assert "the keys and values of 10000000 rows take up to" in error
    assert "option.max_rows" in error


def test_all_devices_of_a_cpu_are_one(checkpoint: Path) -> None:
    assert answers(checkpoint, tensor_parallel_degree="max") == answers(checkpoint)


# Which backend


def chosen(checkpoint: Path, **options: Any) -> tuple[str, str]:
    return choose_backend(configuration_of(str(checkpoint), **options), checkpoint)


def test_t5_on_a_cpu_is_served_by_onnx_runtime(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "gpu_is_there", lambda: False)
    assert chosen(checkpoint) == ("onnxruntime", "model type t5 on a CPU")
    assert chosen(checkpoint, dtype="int8")[0] == "onnxruntime"
    model = init_inference(str(checkpoint))
    assert model.backend == "onnxruntime"
    model.close()


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (_with_config(model_type="bart"), {}, ("transformers", "model type bart is not of the")),
        (lambda _: None, {"backend": "transformers"}, ("transformers", "option.backend")),
        (lambda _: None, {"dtype": "fp16"}, ("torch", "option.dtype=fp16 on a CPU")),
        (lambda _: None, {"dtype": "bf16"}, ("torch", "option.dtype=bf16 on a CPU")),
        (lambda _: None, {"tensor_parallel_degree": 2}, ("torch", "option.tensor_parallel_degr")),
    ],
    ids=["bart", "asked for", "fp16", "bf16", "two ranks"],
)
def test_what_others_serve(
    checkpoint: Path, change: Change, options: dict[str, Any], expected: tuple[str, str]
) -> None:
    change(checkpoint)
    backend, reason = chosen(checkpoint, device_id=-1, **options)
    assert backend == expected[0]
    assert reason.startswith(expected[1])


def test_an_older_torch_is_for_transformers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in 2023's images."""
    monkeypatch.setattr("torch.__version__", "2.0.1")
    reason = "backend torch needs torch 2.4 or newer, 2.0.1 is installed"
    assert chosen(checkpoint, device_id=-1, dtype="bf16") == ("transformers", reason)


def test_shards_are_safetensors(checkpoint: Path) -> None:
    in_shards(checkpoint)
    assert chosen(checkpoint, device_id=-1)[0] == "onnxruntime"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_not_installed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    expected = ("transformers", f"the package {package} is not installed")
    assert chosen(checkpoint, device_id=-1) == expected


def test_a_gpu_is_used_unless_the_worker_has_none(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "gpu_is_there", lambda: True)
    assert chosen(checkpoint) == ("torch", "model type t5 on a GPU")
    assert chosen(checkpoint, device_id=0)[0] == "torch"
    assert chosen(checkpoint, device_id=-1)[0] == "onnxruntime"
    assert chosen(checkpoint, backend="onnxruntime") == ("onnxruntime", "option.backend")


# Which form of int8


@pytest.fixture
def architecture(checkpoint: Path) -> T5Architecture:
    use_threads(usable_cpus())
    return T5Architecture.from_config(model_config(checkpoint))


def forms(architecture: T5Architecture, cache: Path, **options: Any) -> Forms:
    return choose_forms(
        architecture, "int8", **{"per_batch": False, "max_rows": 16, "cache": cache, **options}
    )


def measured(cache: Path) -> tuple[Path, dict[str, dict[str, dict[str, float]]]]:
    (file,) = cache.glob("kernels-*.json")
    return file, json.loads(file.read_text())


def write_times(cache: Path, faster_below: float) -> None:
    """As if int8_blocks were twice as fast below so many rows, and half as fast above."""
    file, times = measured(cache)
    rows = (1, 2, 4, 8, 16, 32, 128)
    (key,) = times
    times[key] = {
        "int8_blocks": {str(n): 1.0 if n < faster_below else 4.0 for n in rows},
        "int8_rows": {str(n): 2.0 for n in rows},
    }
    file.write_text(json.dumps(times))


def test_forms_are_measured_once(architecture: T5Architecture, tmp_path: Path) -> None:
    first = forms(architecture, tmp_path)
    assert {first.encoder, first.decoder[0][0]} <= set(measured(tmp_path)[1].popitem()[1])
    assert first.decoder[0][1] == 16
    assert "int8_blocks" in measured(tmp_path)[1].popitem()[1]
    for faster_below in (3, 1000):
        write_times(tmp_path, faster_below)
        form = "int8_rows" if faster_below == 3 else "int8_blocks"
        assert forms(architecture, tmp_path) == Forms(form, ((form, 16),))


def test_per_batch_takes_the_faster_form_for_each_number_of_rows(
    architecture: T5Architecture, tmp_path: Path
) -> None:
    forms(architecture, tmp_path)
    write_times(tmp_path, 5)
    for max_rows, last in ((16, 16), (40, 40), (6, 16)):
        assert forms(architecture, tmp_path, per_batch=True, max_rows=max_rows).decoder == (
            ("int8_blocks", 4),
            ("int8_rows", last),
        )
    write_times(tmp_path, 1000)
    assert forms(architecture, tmp_path, per_batch=True).decoder == (("int8_blocks", 16),)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{KEY: {}}"])
def test_damaged_measurements_are_made_anew(
    architecture: T5Architecture, tmp_path: Path, text: str
) -> None:
    forms(architecture, tmp_path)
    file, times = measured(tmp_path)
    (key,) = times
    file.write_text(text.replace("KEY", json.dumps(key)))
    assert forms(architecture, tmp_path).encoder in times[key]
    assert measured(tmp_path)[1][key].keys() == times[key].keys()


def test_fp32_measures_nothing(architecture: T5Architecture, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    chosen = choose_forms(architecture, "fp32", per_batch=False, max_rows=3, cache=cache)
    assert chosen == Forms("fp32", (("fp32", 3),))
    assert not cache.exists()


def test_int8_answers_the_same_alone_and_in_a_batch(checkpoint: Path) -> None:
    model = init_inference(str(checkpoint), backend="onnxruntime", dtype="int8")
    parameters = parse_parameters({"max_new_tokens": 30})
    requests = [GenerationRequest(f"Count from {n} to 90.", parameters) for n in range(16)]
    together = model.generate(requests)
    assert [model.generate([request])[0] for request in requests] == together
    model.close()


def test_kernels_per_batch_serve_from_both_forms(
    checkpoint: Path, architecture: T5Architecture, tmp_path: Path
) -> None:
    options = {"dtype": "int8", "cpu_kernel": "per_batch", "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "cache").mkdir()
    forms(architecture, tmp_path / "cache")
    write_times(tmp_path / "cache", 3)
    prompts = [f"Count from {n} to 90." for n in range(16)]
    together = answers(checkpoint, prompts, **options)
    assert all(result.text for result in together)
    (graphs,) = folders(tmp_path / "cache")
    assert {file.name for file in graphs.glob("decoder_*.onnx")} == {
        "decoder_int8_blocks.onnx",
        "decoder_int8_rows.onnx",
    }
    fp32 = answers(checkpoint, prompts)
    assert np.mean([a.token_ids[0] == b.token_ids[0] for a, b in zip(together, fp32)]) > 0.7


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_the_embedding_under_another_of_its_names(checkpoint: Path, name: str) -> None:
    expected = answers(checkpoint)
    weights = load_file(checkpoint / WEIGHTS)
    weights[name] = weights.pop("shared.weight")
    save_file(weights, checkpoint / WEIGHTS, metadata={"format": "pt"})
    assert answers(checkpoint) == expected
