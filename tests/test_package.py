"""``package``: an archive that is unpacked, served and asked, whatever the checkpoint came as."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import javaproperties
import peft
import pytest
import torch
from conftest import ROOT, serving
from random_checkpoints import in_shards, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

from handler.cli import main
from handler.engines import Model, init_inference
from handler.engines.onnx_t5 import choose
from handler.errors import LoadError
from handler.packaging.archive import extract, read_archive
from handler.packaging.images import find_image
from handler.packaging.package import ENTRY_POINT, Order, package

CPU = find_image("djl-cpu")
PROMPT = "Write 7 in words."


def pack(output: Path, model: Path | str | None, image: str = "djl-cpu", **order: object) -> Path:
    told = None if model is None else str(model)
    package(Order(find_image(image), told, **order), output)  # type: ignore[arg-type]
    return output


def unpacked(tmp_path: Path, model: Path | str | None, **order: object) -> Path:
    extract(pack(tmp_path / "model.tar.gz", model, **order), tmp_path / "unpacked")
    return tmp_path / "unpacked"


def properties_of(folder: Path) -> dict[str, str]:
    return dict(javaproperties.loads((folder / "serving.properties").read_text()))


def texts_of(folder: Path) -> list[str]:
    model = init_inference(str(folder))
    try:
        return model.pipeline_generate([PROMPT, "Sort these words: warm, cat, apple"])
    finally:
        model.close()


@pytest.fixture
def pickled(demo: Path, tmp_path: Path) -> Path:
    """What many have: pytorch_model.bin as transformers 4 saved it, config.json, spiece.model."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "spiece.model"):
        shutil.copy(demo / name, folder)
    state = load_file(demo / "model.safetensors")
    for stack in ("encoder", "decoder"):
        state[f"{stack}.embed_tokens.weight"] = state["shared.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_the_demo_is_packaged_unpacked_served_and_asked(tmp_path: Path, model: Model) -> None:
    command = [sys.executable, "-m", "handler", "package", str(ROOT / "examples/demo/model")]
    ran = subprocess.run(
        [*command, "-o", "model.tar.gz", "--image", "djl-cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "model.tar.gz\n"
    assert "for image djl-cpu; weights: inside" in ran.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["model.tar.gz"]
    extract(tmp_path / "model.tar.gz", tmp_path / "out")
    with serving(str(tmp_path / "out")) as (client, _):
        reply = client.post("/invocations", json={"inputs": PROMPT})
    assert reply.json() == {"outputs": model.pipeline_generate([PROMPT])}


def test_what_lies_at_the_archives_root(demo: Path, tmp_path: Path) -> None:
    names = [name for name, _, _ in read_archive(pack(tmp_path / "model.tar.gz", demo))]
    assert names[:3] == ["model.py", "requirements.txt", "serving.properties"]
    weights = [name for name in names[3:] if not name.startswith("handler/")]
    assert weights == [
        "config.json",
        "model.safetensors",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_entry_point_is_the_repositorys() -> None:
    assert (ROOT / "model.py").read_text() == ENTRY_POINT


@pytest.mark.parametrize("options", [[], [("dtype", "int8")]], ids=["fp32", "partitioned"])
def test_the_same_bytes_twice(
    demo: Path, tmp_path: Path, options: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = dict.fromkeys(map(str, (*choose._DECODER_ROWS, *choose._ENCODER_TOKENS)), 1.0)
    monkeypatch.setattr(choose, "_measure", lambda *_: rows)  # two runs may measure differently
    archives = []
    for name in ("a", "b"):
        copied = tmp_path / name / "copy"
        shutil.copytree(demo, copied, ignore=shutil.ignore_patterns(".*"))
        archive = pack(
            tmp_path / name / "model.tar.gz", copied, options=options, partition=bool(options)
        )
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]


def test_a_pickled_checkpoint_is_converted(pickled: Path, tmp_path: Path, model: Model) -> None:
    folder = unpacked(tmp_path, pickled)
    assert not list(folder.glob("*.bin"))
    stored = load_file(pickled.parent / "unpacked" / "model.safetensors")
    assert "encoder.embed_tokens.weight" not in stored
    with serving(str(folder)) as (client, _):
        reply = client.post("/invocations", json={"inputs": PROMPT})
    assert reply.json() == {"outputs": model.pipeline_generate([PROMPT])}


def test_pickled_shards_are_converted(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    T5ForConditionalGeneration.from_pretrained(demo).save_pretrained(folder, max_shard_size="2MB")
    shutil.copy(demo / "spiece.model", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in list(folder.glob("*.safetensors")):
        pickle = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(file), folder / pickle)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    index["weight_map"] = {
        name: shard.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        for name, shard in index["weight_map"].items()
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    out = unpacked(tmp_path, folder)
    assert not [file for file in out.iterdir() if "pytorch_model" in file.name]
    assert texts_of(out) == texts_of(demo)
    _, problems = T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not problems["missing_keys"]


def test_without_torch_a_pickled_checkpoint_goes_in_as_it_is(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("handler.packaging.weights._torch_is_there", lambda: False)
    folder = unpacked(tmp_path, pickled)
    assert (folder / "pytorch_model.bin").is_file()
    assert "the endpoint reads it with the torch of image djl-cpu" in caplog.text


def test_only_one_form_of_the_weights_goes_in(pickled: Path, demo: Path, tmp_path: Path) -> None:
    shutil.copy(demo / "model.safetensors", pickled)
    for needless in ("tf_model.h5", "optimizer.pt", "training_args.bin", ".hidden.json"):
        (pickled / needless).touch()
    (pickled / "checkpoint-100").mkdir()
    folder = unpacked(tmp_path, pickled)
    names = {file.name for file in folder.iterdir()} - {"handler"}
    assert names == {
        *("model.py", "requirements.txt", "serving.properties"),
        *("config.json", "model.safetensors", "spiece.model"),
    }


@pytest.mark.parametrize("image", ["djl-cpu", "pytorch-gpu", "lmi", "fastertransformer"])
def test_requirements_are_the_images(demo: Path, tmp_path: Path, image: str) -> None:
    text = (unpacked(tmp_path, demo, image=image) / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    names = {line.split(">")[0] for line in lines}
    assert "torch" not in names
    assert ("onnxruntime" in names) == (image == "djl-cpu")
    assert "transformers" not in names
    assert ("llguidance" in names) == (image != "fastertransformer")


def test_weights_that_the_endpoint_gets_from_elsewhere(tmp_path: Path) -> None:
    for told in (("s3url", "s3://bucket/flan/"), ("model_id", "google/flan-t5-xl")):
        folder = unpacked(tmp_path / told[0], None, options=[told, ("dtype", "bf16")])
        properties = properties_of(folder)
        assert properties[f"option.{told[0]}"] == told[1]
        assert properties["option.dtype"] == "bf16"
        assert {file.name for file in folder.iterdir()} == {
            *("handler", "model.py", "requirements.txt", "serving.properties")
        }


def test_partitioned_weights(demo: Path, tmp_path: Path) -> None:
    folder = unpacked(tmp_path, demo, options=[("dtype", "int8")], partition=True)
    assert (folder / "partition.json").is_file()
    graphs = {file.name for file in folder.glob(".onnx_t5/*/*")}
    assert "manifest.json" in graphs  # the first start builds none
    expected = init_inference(str(demo), dtype="int8", backend="onnxruntime")
    assert texts_of(folder) == expected.pipeline_generate(
        [PROMPT, "Sort these words: warm, cat, apple"]
    )
    expected.close()
    again = unpacked(tmp_path / "again", folder)  # such a folder can be packaged, too
    assert texts_of(again) == texts_of(folder)


def test_partitioned_for_fastertransformer(demo: Path, tmp_path: Path) -> None:
    options = [("dtype", "bf16"), ("tensor_parallel_degree", "2")]
    folder = unpacked(tmp_path, demo, image="fastertransformer", options=options, partition=True)
    assert (
        folder / "2-gpu" / "verify"
    ).read_bytes() == b"/opt/ml/model-fp32-2-1"  # bf16 is fp32 on disk
    assert properties_of(folder)["option.tensor_parallel_degree"] == "2"
    with pytest.raises(LoadError, match="layout fastertransformer, which image lmi does not read"):
        pack(tmp_path / "other.tar.gz", folder, image="lmi")


@pytest.fixture
def adapter(demo: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=100, target_modules=["q", "v"], init_lora_weights=False
    )
    model = peft.get_peft_model(T5ForConditionalGeneration.from_pretrained(demo), config)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_an_adapter_comes_along(demo: Path, tmp_path: Path, adapter: Path) -> None:
    options = [("merge_adapter", str(adapter))]
    beside = unpacked(tmp_path / "beside", demo, options=options)
    assert properties_of(beside)["option.merge_adapter"] == "adapter"
    merged = unpacked(tmp_path / "merged", demo, options=options, partition=True)
    assert "option.merge_adapter" not in properties_of(merged)
    with serving(str(beside)) as (client, _):
        reply = client.post("/invocations", json={"inputs": PROMPT})
    assert reply.json()["outputs"] == texts_of(merged)[:1] != texts_of(demo)[:1]


def test_what_a_model_folder_has_of_its_own_comes_along(demo: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(demo, own, ignore=shutil.ignore_patterns(".*"))
    (own / "serving.properties").write_text("engine=Python\noption.entryPoint=model.py\n")
    (own / "model.py").write_text("from words import handle\n")
    (own / "words.py").write_text("from handler import metrics\nfrom handler.model import handle\n")
    (own / "requirements.txt").write_text("# mine\nemoji>=2  # for fun\n")
    folder = unpacked(tmp_path, own, options=[("max_queue", "9")])
    assert properties_of(folder) == {
        "engine": "Python",
        "option.entryPoint": "model.py",
        "option.max_queue": "9",
    }
    assert (folder / "model.py").read_text() == "from words import handle\n"
    assert (folder / "words.py").is_file()
    assert (folder / "handler" / "metrics.py").is_file()
    assert "emoji>=2\n" in (folder / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("line", "words"),
    [("torch==2.1", "could replace the torch of image djl-cpu"), ("-r x.txt", "is not a package")],
)
def test_requirements_that_would_do_harm(demo: Path, tmp_path: Path, line: str, words: str) -> None:
    own = tmp_path / "own"
    shutil.copytree(demo, own, ignore=shutil.ignore_patterns(".*"))
    (own / "requirements.txt").write_text(f"{line}\n")
    with pytest.raises(LoadError, match=words):
        pack(tmp_path / "model.tar.gz", own)


REFUSED = {
    "misspelt": (["--option", "dtpye=int8"], "did you mean dtype?"),
    "bad value": (["--option", "dtype=fp99"], "option.dtype must be one of"),
    "no pair": (["--option", "dtype"], "must be NAME=VALUE"),
    "image": (["--image", "djl_cpu"], "did you mean djl-cpu?"),
    "partition elsewhere": (
        ["--partition", "--option", "s3url=s3://b/p"],
        "leave one of the two out",
    ),
    "no address": (["--s3url", "http://b/p"], "option.s3url=http://b/p must begin with s3://"),
    "no hub id": (["--model-id", "/nowhere"], "option.model_id=/nowhere: no such folder"),
    "entry point": (["--entry-point", "/nowhere.py"], "/nowhere.py cannot be read"),
    "for the wheel": (
        ["--image", "fastertransformer", "--option", "dtype=int8"],
        "dtype=int8 is not supported by backend fastertransformer",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(demo: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["package", str(demo), "-o", str(tmp_path / "model.tar.gz"), *arguments])
    assert words in str(ended.value)
    assert str(ended.value).count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_models_that_are_refused(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.tar.gz"
    with pytest.raises(LoadError, match="no MODEL given, nor --s3url or --model-id"):
        pack(output, None)
    with pytest.raises(LoadError, match="is no folder, and the weights come from"):
        pack(output, "org/name", options=[("s3url", "s3://b/p")])
    broken = write_checkpoint(tmp_path / "broken", "flan-t5", demo)
    weights = load_file(broken / "model.safetensors")
    del weights["shared.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"shared\.weight"):
        pack(output, broken)
    in_shards(write_checkpoint(tmp_path / "shards", "flan-t5", demo))
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LoadError, match="names model-00002-of-00002"):
        pack(output, tmp_path / "shards")
    assert not output.exists()


def test_an_archive_that_is_there_is_replaced_when_told(demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.tar.gz"
    output.write_bytes(b"older")
    with pytest.raises(LoadError, match="is there already; --force replaces it"):
        pack(output, demo)
    assert output.read_bytes() == b"older"
    package(Order(CPU, str(demo)), output, force=True)
    assert output.stat().st_size > 5_000_000


def test_names_and_places_of_archives(demo: Path, tmp_path: Path) -> None:
    for output, words in (
        (tmp_path, "is a folder; name the archive"),
        (tmp_path / "model.zip", "must end in .tar.gz"),
        (demo / "README.md" / "model.tar.gz", "cannot write beside"),
    ):
        with pytest.raises(LoadError, match=words):
            pack(output, demo)


def test_too_little_room(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LoadError, match=r"needs 0\.01 GB of disk, 0\.00 GB are free there"):
        pack(tmp_path / "model.tar.gz", demo)
    with pytest.raises(LoadError, match=r"--partition needs 0\.0. GB beside the archive"):
        pack(tmp_path / "model.tar.gz", demo, partition=True)
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time_and_what_a_killed_one_left(demo: Path, tmp_path: Path) -> None:
    left = tmp_path / ".model.tar.gz.work"
    (left / "partition").mkdir(parents=True)
    (left / "archive").write_bytes(b"half")
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(LoadError, match="is being written by another process"):
        pack(tmp_path / "model.tar.gz", demo)
    assert (left / "archive").read_bytes() == b"half"
    os.close(handle)
    pack(tmp_path / "model.tar.gz", demo)
    assert [file.name for file in tmp_path.iterdir()] == ["model.tar.gz"]


def test_a_run_that_ends_while_another_waits_for_its_lock(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, lock = tmp_path / ".model.tar.gz.work", fcntl.flock

    def locked_too_late(handle: int, kind: int) -> None:
        lock(handle, kind)
        if os.fstat(handle).st_ino == first:
            work.rmdir()
            work.mkdir()  # of a third run

    work.mkdir()
    first = work.stat().st_ino
    keep = os.open(work, os.O_RDONLY)  # so that its number is not given again
    monkeypatch.setattr(fcntl, "flock", locked_too_late)
    pack(tmp_path / "model.tar.gz", demo)
    os.close(keep)
    assert [file.name for file in tmp_path.iterdir()] == ["model.tar.gz"]


def test_memory_is_that_of_a_piece(demo: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    write_checkpoint(large, "flan-t5", demo, d_ff=60_000)
    assert (large / "model.safetensors").stat().st_size > 60_000_000
    pack(tmp_path / "first.tar.gz", demo)  # what is imported is no part of it
    tracemalloc.start()
    pack(tmp_path / "model.tar.gz", large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16_000_000


def test_progress_is_told_in_bytes(demo: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    output = tmp_path / "model.tar.gz"
    package(Order(CPU, str(demo)), output, progress=lambda *p: told.append(p))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    what, done, total = told[-1]
    assert (what, done) == ("archive", total)
    with gzip.open(output) as stream:
        assert total < len(stream.read())


def test_from_an_installed_package(demo: Path, tmp_path: Path) -> None:
    """Where there is no checkout around the package: the same archive."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "handler", source / "handler")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    alone = ["--no-deps", "--no-build-isolation", "--target", tmp_path / "site"]
    subprocess.run([*pip, *alone, source], check=True)
    ran = subprocess.run(
        [*(sys.executable, "-m", "handler", "package", demo), "-o", "model.tar.gz"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    expected = pack(tmp_path / "expected.tar.gz", demo, image="lmi")
    assert (tmp_path / "model.tar.gz").read_bytes() == expected.read_bytes()
