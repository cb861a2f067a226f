"""Partitioning is for DJL's partition command, never for a client's request."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from djl.client import (
    SYNC,
    Answer,
    DjlClient,
    DjlStartFailed,
    Request,
    StartDjl,
    ask,
    djl,
    form,
)
from djl.jars import jars_of
from handler.checkpoints.partitioned import read_partition
from handler.engines import Model, init_inference

pytestmark = pytest.mark.djl

PROMPTS = ["Write 7 in words.", "Sort these words: warm, cat, apple"]

# What run_partition.py of DJLServing's containers does, with the djl_python that it does it with.
RUN_PARTITION = """
import json, sys
from djl_python.inputs import Input
from djl_python.service_loader import load_model_service

properties = json.loads(sys.argv[1])
inputs = Input()
inputs.properties = properties
service = load_model_service(properties["model_dir"], properties["entryPoint"], None)
service.invoke_handler(properties.get("partition_handler", "partition"), inputs)
"""


def attempts(output: Path) -> list[Request]:
    """A client's: DJL's sync mode calls the function that a header names."""
    headers = {"handler": "partition", "save_mp_checkpoint_path": str(output)}
    request = ask("Write 7 in words.")
    return [
        form({}, **headers),  # it looks like the first call
        form({}, **headers, model_id="/nowhere", function_name=""),
        Request(request.content, {**request.properties, **headers}),
    ]


def refused(answer: Answer) -> bool:
    return answer.code == 400 and "partition is not for requests" in answer.json()["error"]


def test_a_client_cannot_partition(sync: DjlClient, model: Model, tmp_path: Path) -> None:
    answers = sync.predict_in_turn(attempts(tmp_path / "out"))
    assert all(map(refused, answers)), answers
    assert list(tmp_path.iterdir()) == []
    expected = {"outputs": model.pipeline_generate(["Write 7 in words."])}
    assert sync.predict(ask("Write 7 in words.")).json() == expected


def test_nor_in_async_mode(asynchronous: DjlClient, model: Model, tmp_path: Path) -> None:
    answers = asynchronous.predict_together(attempts(tmp_path / "out"))
    assert all(map(refused, answers)), answers
    assert list(tmp_path.iterdir()) == []
    expected = {"outputs": model.pipeline_generate(["Write 7 in words."])}
    assert asynchronous.predict(ask("Write 7 in words.")).json() == expected


def test_nor_from_a_worker_that_failed_to_load(start_djl: StartDjl, tmp_path: Path) -> None:
    """DJL 0.20 sends requests to it all the same."""
    with start_djl("0.20.0", {"dtype": "fp99"}) as client:
        answers = client.predict_in_turn(attempts(tmp_path / "out"))
        answer = client.predict(ask("Write 7 in words."))
    assert all(map(refused, answers)), answers
    assert answer.code == 424
    assert list(tmp_path.iterdir()) == []


def test_nor_as_the_workers_first_call(start_djl: StartDjl, tmp_path: Path) -> None:
    """option.handler=partition in serving.properties: a worker serves, it does not partition."""
    output = tmp_path / "out"
    options = {"handler": "partition", "save_mp_checkpoint_path": str(output)}
    with (
        pytest.raises(DjlStartFailed, match="partition is not for requests"),
        start_djl("0.34.0", {**options, **SYNC["0.34.0"]}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


OWN_ENTRY_POINT = """
from djl_python.outputs import Output
from handler.model import partition

def handle(inputs):
    return None if inputs.is_empty() else Output().add("mine")
"""


@pytest.mark.parametrize("version", SYNC)
def test_nor_where_the_handler_is_not_ours(unpacked: Path, tmp_path: Path, version: str) -> None:
    """Whoever wraps us may never call our handle: the client's call would be our first one."""
    folder = shutil.copytree(unpacked, tmp_path / "model")
    (folder / "mine.py").write_text(OWN_ENTRY_POINT)
    with djl(version, folder, {"entryPoint": "mine.py", **SYNC[version]}) as client:
        assert client.predict(ask("x")).body == b"mine"
        answers = client.predict_in_turn(attempts(tmp_path / "out"))
    assert all(map(refused, answers)), answers
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module", params=SYNC)
def djl_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The djl_python package of that version."""
    folder = tmp_path_factory.mktemp("djl_python")
    with zipfile.ZipFile(jars_of(request.param) / f"python-{request.param}.jar") as jar:
        jar.extractall(folder, [name for name in jar.namelist() if name.startswith("djl_python/")])
    return folder


def run_partition(
    djl_python: Path, unpacked: Path, rank: str = "", **properties: str
) -> subprocess.CompletedProcess[str]:
    told = {"model_dir": str(unpacked), "entryPoint": "model.py", "engine": "Python", **properties}
    return subprocess.run(
        [sys.executable, "-c", RUN_PARTITION, json.dumps(told)],
        cwd=unpacked,
        env={
            "PYTHONPATH": f"{unpacked}:{djl_python}",
            **({"OMPI_COMM_WORLD_RANK": rank} if rank else {}),
        },
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )


def test_the_partition_command_partitions(djl_python: Path, unpacked: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()  # DJL makes it where it will upload it
    ended = run_partition(djl_python, unpacked, save_mp_checkpoint_path=str(output), dtype="int8")
    assert ended.returncode == 0, ended.stderr
    expected = init_inference(str(unpacked), dtype="int8", backend="onnxruntime")
    partitioned = init_inference(str(output))
    for model in (expected, partitioned):
        assert all(model.pipeline_generate(PROMPTS))
        model.close()


def test_the_backend_says_which_layout(djl_python: Path, unpacked: Path, tmp_path: Path) -> None:
    ended = run_partition(
        djl_python,
        unpacked,
        save_mp_checkpoint_path=str(tmp_path / "out"),
        backend="fastertransformer",
        tensor_parallel_degree="2",
        model_path_on_host="/m",
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "2-gpu" / "verify").read_bytes() == b"/m-fp32-2-1"


def test_of_mpi_ranks_one_writes(djl_python: Path, unpacked: Path, tmp_path: Path) -> None:
    options = {"save_mp_checkpoint_path": str(tmp_path / "out"), "tensor_parallel_degree": "2"}
    assert run_partition(djl_python, unpacked, rank="1", **options).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert run_partition(djl_python, unpacked, rank="0", **options).returncode == 0
    told = read_partition(tmp_path / "out")
    assert told is not None
    assert told.tensor_parallel_degree == 2


def test_a_failure_is_the_commands(djl_python: Path, unpacked: Path, tmp_path: Path) -> None:
    ended = run_partition(djl_python, unpacked)
    assert ended.returncode != 0
    assert "LoadError: set option.save_mp_checkpoint_path to the folder" in ended.stderr
