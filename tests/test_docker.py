"""docker/: linted, agreeing with the table of images, and its steps done as far as a shell can."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, serving
from djl.client import ask, djl
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from handler.cli.container import IMAGES as CONTAINERS
from handler.packaging.images import IMAGES, Image

DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
BIN = Path(sys.executable).parent
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())

# python3 -m pip install ...: whether every requirement is met here, as a wheel of the same version
# range would meet it there. Nothing is downloaded or installed.
PIP = f"""#!{sys.executable}
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

assert sys.argv[1:5] == ["-m", "pip", "install", "--no-cache-dir"], sys.argv
wanted, rest = [], sys.argv[5:]
while rest:
    one = rest.pop(0)
    wanted += open(rest.pop(0)).read().splitlines() if one == "-r" else [one]
for line in wanted:
    if not line or line.startswith("#"):
        continue
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate():
        version(requirement.name)  # raises where there is none of that name
        print(requirement)
"""


def name_of(dockerfile: Path) -> str:
    return dockerfile.name.removesuffix(".Dockerfile")


def parsed(dockerfile: Path) -> list[dict[str, Any]]:
    with dockerfile.open("rb") as stream:
        steps: list[dict[str, Any]] = DockerfileParser(fileobj=stream).structure
    return [step for step in steps if step["instruction"] != "COMMENT"]


def steps_of(dockerfile: Path, instruction: str) -> list[str]:
    return [s["value"] for s in parsed(dockerfile) if s["instruction"] == instruction]


def test_there_is_one_for_every_image() -> None:
    assert {name_of(file) for file in DOCKERFILES} == set(IMAGES)
    assert {name.replace("cpu", "djl-cpu") for name in CONTAINERS} == set(IMAGES)
    assert {name.replace("cpu", "djl-cpu") for name in COMPOSE["services"]} == set(IMAGES)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=name_of)
def test_its_tag_is_the_tables(dockerfile: Path) -> None:
    assert steps_of(dockerfile, "FROM") == [IMAGES[name_of(dockerfile)].reference]


def needed(image: Image) -> set[str]:
    """Of the table, what a folder with any model needs in it."""
    more = image.transformers_requirements if image.gpu else image.onnx
    return {str(Requirement(line)) for line in (*image.requirements, *more)}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=name_of)
def test_what_the_image_lacks_is_installed(dockerfile: Path) -> None:
    image = IMAGES[name_of(dockerfile)]
    found = set()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            marker, requirement.marker = requirement.marker, None
            if marker is None or marker.evaluate({"python_version": image.python}):
                found.add(str(requirement))
    (run,) = steps_of(dockerfile, "RUN")
    found |= {str(Requirement(quoted)) for quoted in re.findall(r'"([^"]+)"', run)}
    assert needed(image) <= found


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", *DOCKERFILES],
        ["shellcheck", DOCKER / "run.sh"],
        ["check-jsonschema", "--builtin-schema=vendor.compose-spec", DOCKER / "compose.yaml"],
    ],
    ids=lambda command: command[0],
)
def test_lint(command: list[str | Path]) -> None:
    ended = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_builds_the_dockerfiles_and_gives_gpus_where_they_are_used(name: str) -> None:
    service = COMPOSE["services"][name]
    dockerfile = (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve()
    assert service["image"] == f"djl-t5-handler:{name_of(dockerfile)}"
    image = IMAGES[name_of(dockerfile)]
    assert ("deploy" in service) == ("shm_size" in service) == image.gpu


# The steps


def carry_out(dockerfile: Path, root: Path) -> dict[str, str]:
    """COPY and RUN below ``root``; pip only checks, and nobody is made an owner. The environment
    that ENV makes. FROM, USER and HEALTHCHECK are not carried out."""
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    tools = root / "tools"
    tools.mkdir(parents=True)
    for name, script in (("python3", PIP), ("chown", "#!/bin/sh\n[ $1 = djl:djl ] && [ -e $2 ]\n")):
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    environment: dict[str, str] = {}
    for step in parsed(dockerfile):
        value = step["value"]
        if step["instruction"] == "COPY":
            source, target = value.split()
            assert source in allowed
            place = root / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place, ignore=ignored)
            else:
                shutil.copy(ROOT / source, place)
        elif step["instruction"] == "RUN":
            below_root = re.sub(r"(?<= )/(?=(tmp|home|opt|root)/)", f"{root}/", value)
            path = f"{tools}:{os.environ['PATH']}"
            subprocess.run(["sh", "-ec", below_root], env={"PATH": path}, check=True)
        elif step["instruction"] == "ENV":
            environment.update(pair.split("=", 1) for pair in value.split())
    return environment


@pytest.fixture(params=DOCKERFILES, ids=name_of)
def made(request: pytest.FixtureRequest, tmp_path: Path, demo: Path) -> tuple[Path, dict[str, str]]:
    """The model folder that the steps make, and the environment, with the demo mounted."""
    environment = carry_out(request.param, tmp_path)
    checkpoint = tmp_path / environment["OPTION_MODEL_ID"].lstrip("/")
    shutil.copytree(demo, checkpoint, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    model = tmp_path / "opt" / "ml" / "model"
    assert not (model / "requirements.txt").exists()  # or DJLServing would install at each start
    return model, {"OPTION_MODEL_ID": str(checkpoint)}


def test_our_server_serves_what_the_steps_make(made: tuple[Path, dict[str, str]]) -> None:
    """With the package that lies in that folder."""
    folder, environment = made
    with serving(".", environment=environment, cwd=folder) as (client, _):
        reply = client.post("/invocations", json={"inputs": "Write 7 in words."})
        assert reply.json() == {"outputs": ["seven"]}


@pytest.mark.djl
@pytest.mark.skipif(
    shutil.which("mvn") is None and os.environ.get("CI") != "true", reason="needs Java and Maven"
)
@pytest.mark.parametrize("made", [DOCKER / "djl-cpu.Dockerfile"], ids=name_of, indirect=True)
def test_djls_worker_serves_what_the_steps_make(made: tuple[Path, dict[str, str]]) -> None:
    folder, environment = made
    with djl("0.34.0", folder, {}, environment=environment) as client:
        assert client.predict(ask("Write 7 in words.")).json() == {"outputs": ["seven"]}


# run.sh, and serve --container


def run_sh(
    *arguments: str, path: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DOCKER_HOST": "unix:///nobody", **variables}
    environment["PATH"] = path or os.environ["PATH"]
    return subprocess.run(
        [DOCKER / "run.sh", *arguments], env=environment, capture_output=True, text=True
    )


def test_without_an_engine_the_commands_are_printed(tmp_path: Path) -> None:
    ended = run_sh("lmi", str(tmp_path), "-e", "OPTION_DTYPE=bf16", PORT="9000")
    assert ended.returncode == 3
    assert "no Docker engine" in ended.stderr
    build, run = ended.stdout.splitlines()
    assert build == (
        f"docker build --tag djl-t5-handler:lmi --file {DOCKER}/lmi.Dockerfile {ROOT} "
    )
    assert run == (
        "docker run --rm --publish 127.0.0.1:9000:8080 --gpus all --shm-size 12g "
        f"--volume {tmp_path}:/opt/ml/checkpoint:ro -e OPTION_DTYPE=bf16 djl-t5-handler:lmi "
    )


def test_a_model_id_is_no_folder() -> None:
    _, run = run_sh("cpu", "google/flan-t5-large").stdout.splitlines()
    assert run == (
        "docker run --rm --publish 127.0.0.1:8080:8080 --env OPTION_MODEL_ID=google/flan-t5-large "
        "djl-t5-handler:djl-cpu "
    )


def test_fastertransformer_may_write_beside_the_checkpoint(tmp_path: Path) -> None:
    _, run = run_sh("fastertransformer", str(tmp_path)).stdout.splitlines()
    assert f"--volume {tmp_path}:/opt/ml/checkpoint:rw " in run


@pytest.mark.parametrize("arguments", [[], ["other"], ["../x"]], ids=str)
def test_another_image_is_usage(arguments: list[str]) -> None:
    ended = run_sh(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: docker/run.sh IMAGE")


def test_with_an_engine_it_builds_and_runs(tmp_path: Path) -> None:
    """The engine is a double that tells what it was called with."""
    calls = tmp_path / "calls"
    double = tmp_path / "docker"
    double.write_text(f'#!/bin/sh\nfor a; do printf "%s " "$a"; done >>{calls}\necho >>{calls}\n')
    double.chmod(stat.S_IRWXU)
    ended = run_sh("cpu", str(tmp_path), path=f"{tmp_path}:{os.environ['PATH']}")
    assert ended.returncode == 0
    info, build, run = calls.read_text().splitlines()
    assert info == "info "
    printed = run_sh("cpu", str(tmp_path)).stdout.splitlines()
    assert [f"docker {build}", f"docker {run}"] == printed


def test_serve_container_runs_the_script() -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "handler", "serve", "--container", "cpu"),
            *("--port", "9000", "--option", "prompt_template=Write {input}."),
        ],
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": "unix:///nobody"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 3
    _, run = ended.stdout.splitlines()
    demo = ROOT / "examples" / "demo" / "model"
    assert run == (
        f"docker run --rm --publish 127.0.0.1:9000:8080 --volume {demo}:/opt/ml/checkpoint:ro "
        r"--env=OPTION_PROMPT_TEMPLATE=Write\ \{input\}. djl-t5-handler:djl-cpu "
    )
