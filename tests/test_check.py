"""``check``: faults planted one by one are found by name; archives without faults pass."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import DEMO, ROOT
from random_checkpoints import in_shards, write_checkpoint
from safetensors.numpy import load_file, save_file

from handler.cli import main
from handler.cli.common import choose_model
from handler.engines import load_model
from handler.errors import LoadError
from handler.packaging.archive import extract
from handler.packaging.check import BadArchive, check, unpacked
from handler.packaging.findings import Finding
from handler.packaging.images import find_image
from handler.packaging.instances import find_instance
from handler.packaging.package import Order, package

if sys.version_info < (3, 10):
    pytest.skip("for workstations", allow_module_level=True)

CPU = {"image": "djl-cpu", "instance": "ml.c7i.xlarge"}
GPU = {"image": "lmi", "instance": "ml.g5.12xlarge"}
WHEEL = {"image": "fastertransformer", "instance": "ml.g5.12xlarge"}


def packed(folder: Path, image: str, model: Path, **order: object) -> Path:
    archive = folder / "model.tar.gz"
    package(Order(find_image(image), str(model), **order), archive)
    return archive


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("packed"), "lmi", DEMO)


@pytest.fixture(scope="session")
def unpacked_once(archive: Path) -> Path:
    folder = archive.parent / "model"
    extract(archive, folder)
    return folder


@pytest.fixture
def folder(unpacked_once: Path, tmp_path: Path) -> Path:
    """A model folder without faults, to plant one in."""
    return Path(shutil.copytree(unpacked_once, tmp_path / "model"))


def found(folder: Path, image: str | None = None, instance: str | None = None) -> list[Finding]:
    return check(folder, image and find_image(image), instance and find_instance(instance))


def names(findings: list[Finding]) -> set[str]:
    return {finding.name for finding in findings}


# Faults

Plant = Callable[[Path], object]


def setting(**properties: str) -> Plant:
    """Lines of serving.properties in the place of what is there; __ is a dot."""

    def plant(folder: Path) -> None:
        file = folder / "serving.properties"
        told = {key.replace("__", "."): value for key, value in properties.items()}
        lines = [
            line
            for line in file.read_text().splitlines()
            if line.partition("=")[0].strip() not in told
        ]
        lines += [f"{key}={value}" for key, value in told.items() if value]
        file.write_text("\n".join(lines) + "\n")

    return plant


def without(name: str) -> Plant:
    def plant(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return plant


def with_text(name: str, text: str, append: bool = False) -> Plant:
    def plant(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text((file.read_text() if append else "") + text, encoding="utf-8")

    return plant


def config(**changes: object) -> Plant:
    def plant(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return plant


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def tensors(change: Callable[[dict], object]) -> Plant:
    def plant(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return plant


def nan(weights: dict) -> None:
    weights["decoder.final_layer_norm.weight"][3] = np.nan


def lost_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def bad_index(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)


def damaged_tokenizer(folder: Path) -> None:
    without("spiece.model")(folder)
    with_text("tokenizer.json", "{}")(folder)


def nested(folder: Path) -> None:
    inside = folder.with_name("aside")
    folder.rename(inside)
    folder.mkdir()
    inside.rename(folder / "flan")


def bom(folder: Path) -> None:
    file = folder / "serving.properties"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def other_version(folder: Path) -> None:
    file = folder / "handler" / "__init__.py"
    file.write_text('__version__ = "0.0.1"\n')


def partitioned(**changes: object) -> Plant:
    """A partition.json of ours as it would be beside other files, or for another degree."""

    def plant(folder: Path) -> None:
        aside = folder.with_name("partitioned")
        main(["partition", str(folder), "-o", str(aside), "--dtype", "fp32"])
        told = json.loads((aside / "partition.json").read_text())
        (aside / "partition.json").write_text(json.dumps({**told, **changes}))
        for file in aside.iterdir():
            if file.is_file():
                shutil.copy(file, folder)

    return plant


def useless_adapter(folder: Path) -> None:
    with_text("adapter/adapter_config.json", '{"peft_type": "IA3"}')(folder)
    setting(option__merge_adapter="adapter")(folder)


def adapter(folder: Path, width: int = 128) -> None:
    """A LoRA of one matrix of the demo."""
    module = "encoder.block.0.layer.0.SelfAttention.q"
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": module}
    with_text("adapter/adapter_config.json", json.dumps(told))(folder)
    name = f"base_model.model.{module}.lora_{{}}.weight"
    a, b = np.ones((2, width), np.float32), np.ones((128, 2), np.float32)
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name.format("A"): a, name.format("B"): b}, file)
    setting(option__merge_adapter="adapter")(folder)


def wider_adapter(folder: Path) -> None:
    adapter(folder, width=130)


def other_embedding(weights: dict) -> None:
    weights["shared.weight"] = weights["shared.weight"][:-1]


def damaged_rank(folder: Path) -> None:
    partitioned()(folder)
    file = folder / "rank-0-of-1.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:99] + bytes([content[99] ^ 1]) + content[100:])


FAULTS: list[tuple[str, str, Plant, dict]] = [
    # name, severity, plant, where it is to run
    ("missing-weights", "error", without("model.safetensors"), {}),
    ("missing-weights", "error", lost_shard, {}),
    ("damaged-index", "error", bad_index, {}),
    ("damaged-safetensors", "error", cut, {}),
    ("wrong-tensors", "error", tensors(lambda w: w.pop("lm_head.weight")), {}),
    ("wrong-tensors", "error", tensors(other_embedding), {}),
    ("not-finite", "error", tensors(nan), {}),
    ("damaged-bin", "error", lambda f: [without("model.safetensors")(f),
                                        with_text("pytorch_model.bin", "no pickle")(f)], {}),
    ("weights-twice", "warning", with_text("pytorch_model.bin", "unread"), {}),
    ("missing-config", "error", without("config.json"), {}),
    ("damaged-config", "error", with_text("config.json", "{"), {}),
    ("damaged-config", "error", config(d_kv="64"), {}),
    ("missing-tokenizer", "error", without_tokenizer, {}),
    ("damaged-tokenizer", "error", damaged_tokenizer, {}),
    ("wrong-tokenizer", "error", lambda f: [config(vocab_size=600)(f)], {}),
    ("wrong-tokenizer", "warning", config(eos_token_id=2), {}),
    ("wrong-tokenizer", "warning", config(vocab_size=32128), {}),
    ("partition-mismatch", "error", partitioned(files={"model-rank-0.bin": [1, None]}), {}),
    ("partition-mismatch", "error", partitioned(model_path="/home/me/model"), {}),
    ("partition-mismatch", "error", lambda f: [partitioned()(f), setting(option__dtype="int8")(f)],
     {}),
    ("partition-mismatch", "error", damaged_rank, {}),
    ("partition-mismatch", "error", partitioned(format="tensorrt"), {}),
    ("adapter-unusable", "error", useless_adapter, {}),
    ("adapter-unusable", "error", setting(option__merge_adapter="adapter/"), {}),
    ("adapter-unusable", "error", wider_adapter, {}),
    ("entry-point-missing", "error", setting(option__entryPoint="/etc/model.py"), {}),
    ("no-entry-point", "error", lambda f: [without("model.py")(f),
                                           setting(option__entryPoint="")(f)], {}),
    ("entry-point-missing", "error", setting(option__entryPoint="serve.py"), {}),
    ("entry-point-missing", "error", setting(option__entryPoint="handler.main"), {}),
    ("entry-point-damaged", "error", with_text("model.py", "def handle(inputs:\n"), {}),
    ("entry-point-damaged", "error", with_text("model.py", "def answer(inputs): ...\n"), {}),
    ("handler-missing", "error", without("handler"), {}),
    ("handler-version-mismatch", "warning", other_version, {}),
    ("nested-folder", "error", nested, {}),
    ("macos-files", "warning", with_text("._config.json", "Mac OS X"), {}),
    ("training-files", "warning", with_text("optimizer.pt", "state"), {}),
    ("no-properties", "warning", without("serving.properties"), {}),
    ("bom-in-properties", "error", bom, {}),
    ("utf8-in-properties", "warning",
     with_text("serving.properties", "\noption.prompt_template=Übersetze {input}\n", True), {}),
    ("unreadable-properties", "error", with_text("serving.properties", "engine=\\u00g0\n"), {}),
    ("unknown-property", "warning", setting(option__tensor_paralel_degree="4"), {}),
    ("missing-option-prefix", "warning", setting(dtype="int8"), {}),
    ("bad-property-value", "error", setting(option__dtype="float8"), {}),
    ("bad-property-value", "error", setting(batch_size="many"), {}),
    ("bad-property-value", "error", setting(option__predict_timeout="2m"), {}),
    ("conflicting-properties", "error", setting(option__max_rows="4",
                                                option__max_rolling_batch_size="8"), {}),
    ("both-s3url-and-model_id", "error", setting(option__s3url="s3://b/m",
                                                 option__model_id="google/flan-t5-xl"), {}),
    ("missing-model-folder", "error", setting(option__model_id="/home/me/flan"), {}),
    ("engine-unknown", "error", setting(engine="Pyton"), {}),
    ("engine-unknown", "error", setting(engine="FasterTransformer"), GPU),
    ("async-with-batch-size", "error", setting(batch_size="8"), {}),
    ("job-queue-size", "warning", setting(option__async_mode="false", batch_size="8",
                                          job_queue_size="4"), {}),
    ("several-cpu-workers", "warning", setting(minWorkers="", maxWorkers="4"), CPU),
    ("request-timeout-too-long", "error", setting(option__request_timeout="300"), {}),
    ("request-timeout-too-long", "warning", setting(option__request_timeout="90"), {}),
    ("model-loading-timeout", "warning", setting(option__model_loading_timeout="7200"), {}),
    ("requirements-replace-torch", "error",
     with_text("requirements.txt", "torch==2.1\n", True), {}),
    ("requirements-replace-transformers", "warning",
     with_text("requirements.txt", "transformers<4.30\n", True), GPU),
    ("python-too-old", "error", setting(option__backend="onnxruntime"), WHEEL),
    ("image-needs-gpu", "error", setting(), {**WHEEL, "instance": "ml.c7i.xlarge"}),
    ("image-without-gpu", "warning", setting(), {**CPU, "instance": "ml.g5.xlarge"}),
    ("heads-not-divisible", "error", setting(option__tensor_parallel_degree="3",
                                             option__backend="torch"), GPU),
    ("heads-not-divisible", "error", setting(option__tensor_parallel_degree="3"), {}),
    ("degree-exceeds-gpus", "error", setting(option__tensor_parallel_degree="8"), GPU),
    ("degree-exceeds-gpus", "warning", setting(option__tensor_parallel_degree="2"), CPU),
    ("dtype-not-supported", "error", setting(option__dtype="int4"), CPU),
    ("too-large-for-memory", "error", setting(option__max_rows="100000"), CPU),
    ("not-for-fastertransformer", "error", config(model_type="mt5"), WHEEL),
    ("fp16-overflows", "warning", lambda f: [config(d_model=2048)(f),
                                             setting(option__dtype="fp16")(f)], WHEEL),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "severity", "plant", "where"), FAULTS, ids=[name for name, *_ in FAULTS]
)
def test_a_planted_fault_is_found(
    folder: Path, name: str, severity: str, plant: Plant, where: dict
) -> None:
    plant(folder)
    findings = found(folder, **where)
    (told,) = [f for f in findings if f.name == name][:1]
    assert told.severity == severity
    assert "\n" not in told.message
    assert str(folder) not in told.message


REFUSED_AT_LOAD = {
    *("missing-weights", "damaged-index", "damaged-safetensors", "damaged-bin", "wrong-tensors"),
    *("not-finite", "missing-config", "damaged-config", "missing-tokenizer", "damaged-tokenizer"),
    *("partition-mismatch", "adapter-unusable", "both-s3url-and-model_id", "dtype-not-supported"),
    *(
        "heads-not-divisible",
        "missing-model-folder",
        "conflicting-properties",
        "unreadable-properties",
    ),
}


@pytest.mark.parametrize(
    "plant", [pytest.param(p, id=name) for name, _, p, _ in FAULTS if name in REFUSED_AT_LOAD]
)
def test_the_server_refuses_it_too(folder: Path, plant: Plant) -> None:
    plant(folder)
    with pytest.raises(LoadError):
        load_model(choose_model(str(folder), ["device_id=-1"]).configuration)


@pytest.mark.parametrize("name", ["as packed", "shards", "CRLF", "a subfolder", "partitioned"])
def test_the_server_loads_what_passes(folder: Path, name: str) -> None:
    GOOD[name][0](folder)
    setting(option__model_id="flan" if name == "a subfolder" else "")(folder)  # not in /opt here
    load_model(choose_model(str(folder), ["device_id=-1"]).configuration).close()


def test_every_finding_is_planted_and_documented() -> None:
    sources = [p.read_text() for p in (ROOT / "handler" / "packaging").glob("check*.py")]
    source = "\n".join([*sources, (ROOT / "handler/packaging/trial.py").read_text()])
    used = set(re.findall(r'(?:error|warning|kind)\(\s*"([\w-]+)"', source))
    planned = set(
        re.findall(r'problem="([\w-]+)"', (ROOT / "handler/packaging/plan.py").read_text())
    )
    documented = set(
        re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "checking.md").read_text(), re.MULTILINE)
    )
    by_other_tests = {
        *("does-not-serve", "bin-without-torch", "unsafe-member", "damaged-archive"),
        "too-large-for-disk",
    }
    planted = {name for name, *_ in FAULTS}
    assert used | planned <= planted | by_other_tests
    assert documented == planted | by_other_tests


def test_damage_hides_no_other_fault(folder: Path) -> None:
    for plant in (
        cut,
        without_tokenizer,
        setting(option__dtype="x", option__max_rows="0", engine="J"),
    ):
        plant(folder)
    findings = found(folder, **GPU)
    assert {"damaged-safetensors", "missing-tokenizer", "engine-unknown"} <= names(findings)
    assert sum(f.name == "bad-property-value" for f in findings) == 2
    severities = [f.severity for f in findings]
    assert severities == sorted(severities)


def test_the_nearest_property_is_told(folder: Path) -> None:
    setting(option__tensor_paralel_degree="4")(folder)
    (finding,) = found(folder)
    assert "did you mean option.tensor_parallel_degree?" in finding.message


def test_a_small_disk_is_told(folder: Path) -> None:
    small = replace(find_instance("ml.g5.xlarge"), local_disk=10**6)
    assert names(check(folder, None, small)) == {"too-large-for-disk"}


def test_a_bin_needs_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("model.safetensors")(folder)
    with_text("pytorch_model.bin", "unread")(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert names(found(folder)) == {"bin-without-torch"}
    (finding,) = check(folder, find_image("djl-cpu"), None)
    assert (finding.name, finding.severity) == ("bin-without-torch", "warning")


# Archives


def tar_of(place: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(place / "model.tar.gz", "w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return place / "model.tar.gz"


def link(name: str, to: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, to
    return info


@pytest.mark.parametrize(
    "member",
    [("../evil", b"x"), ("/etc/evil", b"x"), link("model.py", "/etc/passwd")],
    ids=["above", "absolute", "link"],
)
def test_unsafe_members_are_not_unpacked(tmp_path: Path, member: object) -> None:
    archive = tar_of(tmp_path, ("config.json", b"{}"), member)
    with pytest.raises(BadArchive) as refused, unpacked(archive):
        pass
    assert refused.value.finding.name == "unsafe-member"


def test_a_cut_archive_is_damaged(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "model.tar.gz"
    damaged.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(SystemExit) as ended:
        main(["check", str(damaged)])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("error: damaged-archive: ")


def test_no_room_to_unpack(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(LoadError, match="make room, or set TMPDIR"), unpacked(archive):
        pass


def with_crlf(folder: Path) -> None:
    file = folder / "serving.properties"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


def as_bin(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    weights = load_file(folder / "model.safetensors")
    torch.save({n: torch.from_numpy(w) for n, w in weights.items()}, folder / "pytorch_model.bin")
    without("model.safetensors")(folder)


def in_a_subfolder(folder: Path) -> None:
    (folder / "flan").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder / "flan" / name)
    setting(option__model_id="/opt/ml/model/flan")(folder)


def from_the_hub(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        without(name)(folder)
    setting(option__model_id="google/flan-t5-xl")(folder)


def dynamic_batches(folder: Path) -> None:
    setting(option__async_mode="false", batch_size="16", max_batch_delay="50")(folder)


GOOD: dict[str, tuple[Plant, dict]] = {
    "as packed": (setting(), GPU),
    "as packed, nothing told": (setting(), {}),
    "on a CPU": (setting(), CPU),
    "int8 on a CPU": (setting(option__dtype="int8"), CPU),
    "shared by GPUs": (setting(option__tensor_parallel_degree="4"), GPU),
    "shards": (in_shards, GPU),
    "pytorch_model.bin": (as_bin, GPU),
    "CRLF": (with_crlf, CPU),
    "a subfolder": (in_a_subfolder, CPU),
    "weights of the hub": (from_the_hub, GPU),
    "weights in S3": (lambda f: [from_the_hub(f), setting(option__model_id="s3://b/flan")(f)], GPU),
    "dynamic batches": (dynamic_batches, GPU),
    "the package as entry point": (setting(option__entryPoint="handler.model"), CPU),
    "partitioned": (partitioned(), CPU),
    "an adapter": (adapter, CPU),
    "an adapter of the hub": (setting(option__merge_adapter="me/flan-lora"), CPU),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_folders_pass(folder: Path, name: str) -> None:
    plant, where = GOOD[name]
    plant(folder)
    assert found(folder, **where) == []


@pytest.mark.parametrize("image", ["lmi", "djl-cpu", "pytorch-gpu", "fastertransformer"])
@pytest.mark.parametrize("variant", ["flan-t5", "byt5"])
def test_what_package_writes_passes(image: str, variant: str, demo: Path, tmp_path: Path) -> None:
    archive = packed(tmp_path, image, write_checkpoint(tmp_path / "model", variant, demo, d_kv=32))
    where = {"instance": "ml.c7i.xlarge" if image == "djl-cpu" else "ml.g5.xlarge"}
    with unpacked(archive) as folder:
        assert found(folder, image, **where) == []
    assert not folder.exists()


# The command


def run(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    import os

    paths = ":".join(map(str, filter(None, (ROOT, path))))
    return subprocess.run(
        [sys.executable, "-m", "handler", "check", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_serve_answers_with_the_archives_own_handler(archive: Path) -> None:
    ended = run(archive, "--serve", "--prompt", "Write 7 in words.", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    told = json.loads(ended.stdout)
    assert told["findings"] == []
    assert json.loads(told["answers"][0]["answer"]) == {"outputs": ["seven"]}


def test_what_fails_only_when_served_is_told(folder: Path) -> None:
    with_text("model.py", "import no_such_thing\nfrom handler.model import handle\n")(folder)
    ended = run(folder, "--serve")
    assert ended.returncode == 1
    assert "error: does-not-serve: through the handler: ModuleNotFoundError" in ended.stdout


def test_exit_codes_and_one_line_each(folder: Path) -> None:
    with_text("._x", "")(folder)
    warned = run(folder)
    assert (warned.returncode, warned.stdout.splitlines()[-1]) == (0, "0 errors, 1 warnings")
    setting(engine="Java")(folder)
    failed = run(folder, "--image", "lmi")
    assert failed.returncode == 1
    assert re.match(r"error: engine-unknown: engine='Java' ", failed.stdout)
    assert run(folder / "none").stderr.startswith("error: ")
