"""The article's way: FLAN-T5 on the fastertransformer wheel, under DJL's MPI engine and without.

The wheel is a double (tests/fastertransformer_double), the GPUs a stub; Java, mpirun, the worker
processes and their sockets are real. DJL's jars have no engine named FasterTransformer; DeepSpeed
is the other engine of those versions that starts ranks and gives each of them every request.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from mpi import DOUBLE, MPI_ENVIRONMENT, are_gone

from djl.client import DjlClient, DjlStartFailed, djl, post
from djl.conftest import ROOT
from handler.engines import Model

pytestmark = pytest.mark.djl

# As the article has them; DJLServing's Java reads the engine's name, here the test names it.
PROPERTIES = {
    "mpi": "engine=FasterTransformer\noption.tensor_parallel_degree=4\noption.dtype=fp32\n",
    "python": "engine=Python\noption.tensor_parallel_degree=1\noption.dtype=bf16\n",
}
# The notebook's payloads.
TITLE = "Title: Count from 3 to 9."
PAYLOADS = {
    "sampled": (
        b'{"inputs": ["Title: Count from 3 to 9."],'
        b' "parameters": {"max_seq_len": 200, "temperature": 0.7}, "padding": true}'
    ),
    "plain": b'{"batch_size": 1, "inputs": "Title: Count from 3 to 9.", "parameters": {}}',
    "several": (
        b'{"inputs": ["Title: Count from 3 to 9.", "Write 7 in words."],'
        b' "parameters": {"min_length": 20, "max_seq_len": 100, "temperature": 0.1}}'
    ),
}


@pytest.fixture(scope="session")
def endpoint(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The article's folder: serving.properties that name the model, model.py, and our package."""
    folder = tmp_path_factory.mktemp("article")
    for name, properties in PROPERTIES.items():
        (folder / name).mkdir()
        text = f"{properties}option.model_id={demo}\n"
        (folder / name / "serving.properties").write_text(text)
        shutil.copy(ROOT / "model.py", folder / name)
        shutil.copytree(
            ROOT / "handler",
            folder / name / "handler",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return folder


def under_mpi(
    gpus: Path, endpoint: Path, version: str, engine: str = "DeepSpeed", **more: str
) -> AbstractContextManager[DjlClient]:
    """OPTION_* and FT_DOUBLE_* in ``more`` are environment, the rest options."""
    environment = {name: value for name, value in more.items() if name.isupper()}
    options = {name: value for name, value in more.items() if name not in environment}
    return djl(
        version,
        endpoint / "mpi",
        options,
        engine=engine,
        environment={
            **MPI_ENVIRONMENT,
            "LD_LIBRARY_PATH": str(gpus),
            "PYTHONPATH": f"{DOUBLE}{os.pathsep}{ROOT / 'tests'}",
            "FT_DOUBLE_FORM": "0.21",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


@pytest.fixture(
    scope="module",
    params=["alone", *(pytest.param(form, marks=pytest.mark.long) for form in ("ranks", "triton"))],
)
def article(request: pytest.FixtureRequest, gpus: Path, endpoint: Path) -> Iterator[DjlClient]:
    """engine=FasterTransformer with four ranks, and engine=Python on both forms of the wheel."""
    if request.param == "ranks":
        starts = under_mpi(gpus, endpoint, "0.25.0")
    else:
        environment = {
            "PYTHONPATH": str(DOUBLE),
            "FT_DOUBLE_FORM": "0.21" if request.param == "alone" else "0.23",
            "OPTION_BACKEND": "fastertransformer",  # by itself it would want a GPU
        }
        starts = djl("0.25.0", endpoint / "python", {}, environment=environment)
    with starts as client:
        yield client


def expected(model: Model, *texts: str, **parameters: Any) -> dict[str, Any]:
    return {"outputs": model.pipeline_generate(list(texts), **parameters)}


def test_the_notebooks_payloads(article: DjlClient, model: Model) -> None:
    answers = article.predict_in_turn([post(body) for body in PAYLOADS.values()])
    assert [answer.code for answer in answers] == [200, 200, 200], article.log()
    sampled, plain, several = (answer.json() for answer in answers)
    assert len(sampled["outputs"]) == 1
    assert plain == expected(model, TITLE)
    assert len(several["outputs"]) == 2


def test_a_dynamic_batch_of_requests_that_differ(article: DjlClient, model: Model) -> None:
    """DJL's built-in handler refuses such a batch."""
    bodies = [PAYLOADS["plain"], b'{"inputs": 5}', PAYLOADS["sampled"], PAYLOADS["several"]]
    plain, bad, sampled, several = article.batch_predict([post(body) for body in bodies])
    assert plain.json() == expected(model, TITLE)
    assert bad.json()["code"] == 400
    assert len(sampled.json()["outputs"]) == 1
    assert len(several.json()["outputs"]) == 2


def test_it_goes_on_after_a_bad_request(article: DjlClient, model: Model) -> None:
    refused = article.predict(post(b'{"inputs": "x", "parameters": {"typical_p": 0.5}}'))
    assert refused.code == 400
    assert "not supported by backend fastertransformer" in refused.message
    assert article.predict(post(PAYLOADS["plain"])).json() == expected(model, TITLE)


@pytest.mark.long
def test_a_rank_killed_in_a_request_fails_it_and_leaves_no_process(
    gpus: Path, endpoint: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    two = {"tensor_parallel_degree": "2", "FT_DOUBLE_GATE": str(gate)}
    with (
        under_mpi(gpus, endpoint, "0.25.0", **two) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        answer = thread.submit(client.predict, post(PAYLOADS["plain"]))
        pids = [held_rank(gate, rank, client) for rank in range(2)]
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(AssertionError, match="disconnected"):
            answer.result()
        assert are_gone(pids)


def held_rank(gate: Path, rank: int, client: DjlClient) -> int:
    """The process id of a rank, as soon as it is held in a call."""
    file, deadline = Path(f"{gate}.{rank}"), time.monotonic() + 180
    while not file.exists():
        assert time.monotonic() < deadline, client.log()
        time.sleep(0.05)
    return int(file.read_text())


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        pytest.param(
            *({"FT_DOUBLE_FAIL": "1:load"}, "rank 1 of 2 failed and ends the job"),
            marks=pytest.mark.long,
        ),
        (
            {"OPTION_DTYPE": "int8", "dtype": "int8"},
            "option.dtype=int8 is not supported by backend",
        ),
    ],
    ids=["one rank", "all ranks"],
)
def test_a_load_that_fails_tells_why_and_does_not_hang(
    gpus: Path, endpoint: Path, environment: dict[str, str], words: str
) -> None:
    two = {"tensor_parallel_degree": "2", **environment}
    with (
        pytest.raises(DjlStartFailed) as failed,
        under_mpi(gpus, endpoint, "0.25.0", **two),
    ):
        pass
    assert words in str(failed.value)


@pytest.mark.long
def test_the_engine_before_those_images(gpus: Path, endpoint: Path, model: Model) -> None:
    with under_mpi(gpus, endpoint, "0.20.0", tensor_parallel_degree="2") as client:
        answers = client.predict_in_turn([post(body) for body in PAYLOADS.values()])
    assert answers[1].json() == expected(model, TITLE)
    assert [answer.code for answer in answers] == [200, 200, 200]


@pytest.mark.long
def test_the_module_of_the_package_as_entry_point(gpus: Path, endpoint: Path, model: Model) -> None:
    two = {"tensor_parallel_degree": "2", "entryPoint": "handler.model"}
    with under_mpi(gpus, endpoint, "0.25.0", **two) as client:
        assert client.predict(post(PAYLOADS["plain"])).json() == expected(model, TITLE)


@pytest.mark.long
def test_newer_engines_must_give_every_rank_its_requests(
    gpus: Path, endpoint: Path, model: Model
) -> None:
    two = {"tensor_parallel_degree": "2", "async_mode": "false", "backend": "fastertransformer"}
    with (
        pytest.raises(DjlStartFailed) as failed,
        under_mpi(gpus, endpoint, "0.34.0", "MPI", **two),
    ):
        pass
    assert "option.use_passive_workers=true" in str(failed.value)
    two["use_passive_workers"] = "false"
    with under_mpi(gpus, endpoint, "0.34.0", "MPI", **two) as client:
        assert client.predict(post(PAYLOADS["plain"])).json() == expected(model, TITLE)
