"""Partitioning ahead of time: what is written, and when it appears."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from random_checkpoints import in_shards, write_checkpoint
from safetensors.numpy import load_file
from test_lora import make as make_adapter
from test_lora import merged_weights

from handler.checkpoints.partition import partition
from handler.checkpoints.partitioned import read_partition
from handler.config import configuration_of
from handler.errors import LoadError

WAIT = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "flan-t5", "flan-t5", demo, d_kv=32
    )


def made(source: Path, output: Path, layout: str = "native", **options: Any) -> Path:
    partition(configuration_of(str(source), **options), layout, output)
    return output


def command(
    *arguments: str | Path, largest_file: int | None = None
) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, "-m", "handler", "partition", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        preexec_fn=limit,
    )


# The folder


def test_the_folder_is_a_checkpoint_with_its_own_config_and_tokenizer(
    checkpoint: Path, tmp_path: Path
) -> None:
    for layout, weights in (
        ("native", {"rank-0-of-2.safetensors", "rank-1-of-2.safetensors"}),
        ("fastertransformer", {"2-gpu"}),
    ):
        folder = made(checkpoint, tmp_path / layout, layout, tensor_parallel_degree=2)
        copied = {"config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"}
        assert {file.name for file in folder.iterdir()} == {"partition.json", *copied, *weights}
        for name in copied:
            assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()


def test_partition_json_tells_what_it_was_made_of(checkpoint: Path, tmp_path: Path) -> None:
    told = read_partition(made(checkpoint, tmp_path / "a", tensor_parallel_degree=2, dtype="bf16"))
    assert told is not None
    assert (told.format, told.tensor_parallel_degree, told.dtype) == ("native", 2, "bf16")
    again = read_partition(made(checkpoint, tmp_path / "b"))
    assert again is not None
    assert again.source == told.source
    assert again.dtype == "fp32"


def test_other_weights_have_another_fingerprint(
    checkpoint: Path, demo: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", "flan-t5", demo, seed=1)
    told = [read_partition(made(c, tmp_path / f"out-{c.name}")) for c in (checkpoint, other)]
    assert told[0] is not None
    assert told[1] is not None
    assert told[0].source != told[1].source


def test_a_sharded_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(checkpoint, tmp_path / "shards")
    in_shards(shards)
    for layout in ("native", "fastertransformer"):
        one = made(checkpoint, tmp_path / f"one-{layout}", layout)
        many = made(shards, tmp_path / f"many-{layout}", layout)
        assert weight_files(one) == weight_files(many)


def test_a_checkpoint_in_a_bin(checkpoint: Path, tmp_path: Path) -> None:
    import torch

    folder = shutil.copytree(checkpoint, tmp_path / "bin")
    weights = load_file(folder / "model.safetensors")
    torch.save({n: torch.from_numpy(w) for n, w in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert weight_files(made(folder, tmp_path / "a")) == weight_files(
        made(checkpoint, tmp_path / "b")
    )


def test_an_adapter_is_merged(checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(checkpoint, tmp_path / "adapter").adapter
    folder = made(checkpoint, tmp_path / "out", merge_adapter=str(adapter))
    found = load_file(folder / "rank-0-of-1.safetensors")
    for name, tensor in merged_weights(checkpoint, adapter).items():
        assert np.array_equal(found[name], tensor), name
    told = read_partition(folder), read_partition(made(checkpoint, tmp_path / "without"))
    assert told[0] is not None
    assert told[1] is not None
    assert told[0].source != told[1].source


def weight_files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for pattern in ("*.safetensors", "*-gpu/*")
        for file in folder.glob(pattern)
    }


# What cannot be partitioned


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        ("native", {"tensor_parallel_degree": 3}, "possible are 1, 2, 4"),
        ("fastertransformer", {"tensor_parallel_degree": 8}, "does not divide num_heads=4"),
        ("native", {"tensor_parallel_degree": "max"}, "must be a number to partition for"),
        ("native", {"pipeline_parallel_degree": 2}, "raise tensor_parallel_degree instead"),
        ("native", {"dtype": "int4"}, "allowed: fp32, fp16, bf16, int8"),
        ("fastertransformer", {"dtype": "int8"}, "allowed: fp32, fp16, bf16"),
        (
            "fastertransformer",
            {"pipeline_parallel_degree": 3},
            "num_layers 2 is not divisible by 3",
        ),
        ("fastertransformer", {"model_path_on_host": "here"}, "must be an absolute path"),
        ("fastertransformer", {"dtype": "fp16", "strict_dtype": True}, "take bf16 or fp32"),
        ("mine", {}, "one of fastertransformer, native"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, layout: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(LoadError) as caught:
        made(checkpoint, tmp_path / "out", layout, **options)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_d_ff_must_divide_too(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "flan-t5", demo, d_ff=46)
    with pytest.raises(LoadError, match=r"num_heads=4 and d_ff=46; possible are 1, 2$"):
        made(source, tmp_path / "out", tensor_parallel_degree=4)


def test_a_missing_tensor_is_told_before_anything_is_written(tmp_path: Path, demo: Path) -> None:
    source = write_checkpoint(tmp_path / "c", "deep-decoder", demo, num_decoder_layers=2)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_decoder_layers": 3}))
    with pytest.raises(LoadError, match=r"no tensor decoder\.block\.2\.layer"):
        made(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    bare = shutil.copytree(
        checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "sp*")
    )
    with pytest.raises(LoadError, match="has no tokenizer"):
        made(bare, tmp_path / "out")


def test_what_is_partitioned_already(tmp_path: Path, checkpoint: Path) -> None:
    once = made(checkpoint, tmp_path / "once")
    with pytest.raises(LoadError, match="is partitioned already; name the original"):
        made(once, tmp_path / "twice")


# Where it is written


def test_an_older_partition_is_replaced(tmp_path: Path, checkpoint: Path) -> None:
    made(checkpoint, tmp_path / "out", "fastertransformer", tensor_parallel_degree=2)
    made(checkpoint, tmp_path / "out", dtype="int8")
    assert (tmp_path / "out" / ".onnx_t5").is_dir()
    made(checkpoint, tmp_path / "out", tensor_parallel_degree=4)
    assert len(list((tmp_path / "out").glob("rank-*"))) == 4
    assert not (tmp_path / "out" / ".onnx_t5").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "out").mkdir()
    assert read_partition(made(checkpoint, tmp_path / "out"))


def test_files_of_others_are_never_lost(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    with pytest.raises(LoadError, match=r"is not empty and has no partition\.json"):
        made(checkpoint, out)
    (out / "precious").unlink()
    made(checkpoint, out)
    (out / "serving.properties").write_text("engine=Python\n")
    before = (out / "partition.json").read_bytes()
    with pytest.raises(LoadError, match=r"holds serving\.properties, which would be lost"):
        made(checkpoint, out, dtype="bf16")
    assert (out / "partition.json").read_bytes() == before
    with pytest.raises(LoadError, match="is a file or a link"):
        made(checkpoint, out / "serving.properties")
    with pytest.raises(LoadError, match="is a mount point"):
        made(checkpoint, Path("/proc"))


@pytest.mark.parametrize("layout", ["native", "fastertransformer"])
def test_a_disk_that_is_full(tmp_path: Path, checkpoint: Path, layout: str) -> None:
    """Here: files that the system does not let grow."""
    out = tmp_path / "out"
    ended = command(checkpoint, "-o", out, "--format", layout, largest_file=30_000)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"error: cannot write {out}: File too large; choose another output, or make room\n"
    )
    assert list(tmp_path.iterdir()) == []


_ENDING_ITSELF = """
import os, sys
from handler import cli
from handler.checkpoints import native_layout

append, count = native_layout._RankFile.append, 0

def counted(*arguments):
    global count
    count += 1
    if count == 2: os.kill(os.getpid(), int(sys.argv[1]))
    append(*arguments)

native_layout._RankFile.append = counted
cli.main(sys.argv[2:])
"""


def cut_short(checkpoint: Path, output: Path, number: signal.Signals) -> int:
    """The signal comes while the second tensor is written; the exit status."""
    ends = [str(int(number)), "partition", str(checkpoint), "-o", str(output)]
    command = [sys.executable, "-c", _ENDING_ITSELF, *ends]
    return subprocess.run(command, cwd=ROOT, timeout=WAIT).returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_cut_short_leaves_nothing(
    tmp_path: Path, checkpoint: Path, number: signal.Signals
) -> None:
    assert cut_short(checkpoint, tmp_path / "out", number) == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    assert cut_short(checkpoint, out, signal.SIGKILL) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with held(left):
        made(checkpoint, out)
        assert left.is_dir(), "another run writes it"
    shutil.rmtree(out)
    made(checkpoint, out)
    assert list(tmp_path.iterdir()) == [out]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locked, as by the run that writes it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# The command


def test_the_command_prints_the_folder(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "new" / "out"
    degrees = ["--tensor-parallel-degree", "2", "--pipeline-parallel-degree", "1"]
    ended = command(checkpoint, "-o", out, "--dtype", "bf16", *degrees)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{out}\n", "")
    told = read_partition(out)
    assert told is not None
    assert (told.tensor_parallel_degree, told.dtype) == (2, "bf16")


def test_the_command_for_fastertransformer(tmp_path: Path, checkpoint: Path) -> None:
    layout = ["--format", "fastertransformer", "--model-path-on-host", "/models/t5/"]
    ended = command(checkpoint, "-o", tmp_path / "out", *layout, "--dtype", "fp16")
    assert ended.returncode == 0
    assert "take bf16 or fp32" in ended.stderr
    assert (tmp_path / "out" / "1-gpu" / "verify").read_bytes() == b"/models/t5-fp16-1-1"


def test_help_says_what_values_are() -> None:
    told = command("--help").stdout
    for flag in (
        "--tensor-parallel-degree N",
        "--pipeline-parallel-degree N",
        "--dtype DTYPE",
        "--model-path-on-host PATH",
    ):
        assert f"  {flag}" in told


def test_errors_of_the_command_are_one_line(tmp_path: Path, checkpoint: Path) -> None:
    for arguments, words in (
        (["/no/such/folder"], "option.model_id=/no/such/folder: no such folder"),
        ([str(checkpoint), "--dtype", "fp8"], "--option dtype must be one of auto"),
        ([str(checkpoint), "--tensor-parallel-degree", "3"], "possible are 1, 2, 4"),
    ):
        ended = command(*arguments, "-o", tmp_path / "out")
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: ")
        assert ended.stderr.count("\n") == 1
        assert words in ended.stderr


# Memory

_MEASURED = """
import sys
from handler import cli
cli.main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""
FORMS = [
    ["--format", "fastertransformer", "--dtype", "fp32"],
    ["--format", "fastertransformer", "--dtype", "fp16", "--tensor-parallel-degree", "2"],
    ["--format", "native", "--dtype", "int8"],
    ["--format", "native", "--dtype", "bf16", "--tensor-parallel-degree", "4"],
]


def peak_memory(source: Path, output: Path, form: list[str]) -> int:
    """Bytes that were resident at most in a process that partitions."""
    ended = subprocess.run(
        [sys.executable, "-c", _MEASURED, "partition", source, "-o", output, *form],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=3000,
    )
    return int(ended.stdout.splitlines()[-1])


def check_peak(source: Path, output: Path, form: list[str], largest: int) -> None:
    peak = peak_memory(source, output, form)
    shutil.rmtree(output)
    print(f"{' '.join(form)}: peak {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB")
    assert peak <= 3 * largest + 300e6


def write_shards(folder: Path, demo: Path, **config: int) -> int:
    """Write a checkpoint in shards; its size in bytes."""
    write_checkpoint(folder, "flan-t5", demo, d_kv=64, num_heads=16, **config)
    in_shards(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "form",
    [FORMS[0], pytest.param(FORMS[2], marks=pytest.mark.long)],
    ids=[" ".join(FORMS[0]), " ".join(FORMS[2])],
)
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, demo: Path, form: list[str]) -> None:
    source, largest = tmp_path / "c", 16384 * 512 * 4
    layers = {"num_layers": 3, "num_decoder_layers": 2}
    size = write_shards(source, demo, d_model=512, d_ff=16384, **layers)
    assert size > 3 * largest + 400e6
    check_peak(source, tmp_path / "out", form, largest)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_memory_of_two_gigabytes(tmp_path: Path, demo: Path, form: list[str]) -> None:
    source, largest = tmp_path / "c", 32128 * 1024 * 4
    config = {"d_model": 1024, "d_ff": 8192, "vocab_size": 32128}
    size = write_shards(source, demo, num_layers=10, num_decoder_layers=5, **config)
    assert size > 2e9
    check_peak(source, tmp_path / "out", form, largest)
