"""What deploy is told: defaults, and errors that say what is allowed; requests that AWS takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.validate import ParamValidator
from hypothesis import given
from hypothesis import strategies as st
from moto import mock_aws
from sagemaker_double import ROLE, archive_file, error

from handler.cli import main
from handler.deployment import autoscaling, plan
from handler.deployment.aws import Services, role_of_notebook
from handler.deployment.plan import Archive, Autoscale, Call, Deployment
from handler.deployment.settings import checked_name, find_ami, find_role
from handler.errors import LoadError
from handler.packaging.instances import INSTANCES, find_instance

GB = 10**9


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name in ("SAGEMAKER_ROLE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    told = ["--name", "t5", "--instance-type", "ml.g5.2xlarge", "--role", ROLE]
    return ["deploy", str(archive_file(tmp_path)), *told, "--region", "eu-west-1", "--dry-run"]


def requests(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(arguments)
    return {call["operation"]: call["request"] for call in json.loads(capsys.readouterr().out)}


def variant(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (found,) = requests(arguments, capsys)["create_endpoint_config"]["ProductionVariants"]
    return dict(found)


def test_the_image_fits_the_instances(dry: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def image(*arguments: str) -> str:
        model = requests([*dry, *arguments], capsys)["create_model"]
        return str(model["PrimaryContainer"]["Image"])

    registry = "763104351884.dkr.ecr.eu-west-1.amazonaws.com/djl-inference"
    assert image() == f"{registry}:0.36.0-lmi27.0.0-cu130"
    assert image("--instance-type", "ml.m5.xlarge") == f"{registry}:0.36.0-cpu-full"
    assert "fastertransformer" in image("--image", "fastertransformer")
    own = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/own:1"
    assert image("--image", own) == own


def test_the_host_fits_the_images_cuda(dry: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    newest = "al2023-ami-sagemaker-inference-gpu-4-1"
    assert variant(dry, capsys)["InferenceAmiVersion"] == newest
    old = variant([*dry, "--image", "fastertransformer"], capsys)
    assert "InferenceAmiVersion" not in old
    assert "InferenceAmiVersion" not in variant([*dry, "--inference-ami", "none"], capsys)
    named = "al2-ami-sagemaker-inference-gpu-2"
    assert variant([*dry, "--inference-ami", named], capsys)["InferenceAmiVersion"] == named
    assert find_ami("auto", "x:0.31.0-lmi13.0.0-cu124") == "al2-ami-sagemaker-inference-gpu-3-1"


def test_a_volume_only_where_there_is_no_disk(
    dry: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "VolumeSizeInGB" not in variant(dry, capsys)
    of_ebs = [*dry, "--instance-type", "ml.m5.xlarge"]
    assert variant(of_ebs, capsys)["VolumeSizeInGB"] == 24
    assert variant([*of_ebs, "--volume-size", "99"], capsys)["VolumeSizeInGB"] == 99
    said = error([*dry, "--volume-size", "99"])
    assert "--volume-size cannot be set for ml.g5.2xlarge: it has a disk of its own, of 450" in said


@pytest.mark.parametrize(
    ("size", "download", "startup", "volume"),
    [(1, 360, 1560, 24), (11 * GB, 960, 2160, 64), (100 * GB, 3600, 3600, 420)],
)
def test_bounds_by_the_archives_size(size: int, download: int, startup: int, volume: int) -> None:
    assert plan.download_timeout(size) == download
    assert plan.startup_timeout(size) == startup
    assert plan.volume_size(size) == volume


def test_the_container_may_load_longer_than_djlserving_lets_it() -> None:
    """So that DJLServing gives up first, and says why."""
    properties = (Path(__file__).parents[1] / "serving.properties").read_text()
    assert "option.model_loading_timeout=1200\n" in properties
    assert plan.startup_timeout(0) > 1200


def test_the_scaling_target_follows_the_rows(
    dry: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def target(*arguments: str) -> float:
        policy = requests([*dry, "--autoscale", "2:4", *arguments], capsys)["put_scaling_policy"]
        return float(policy["TargetTrackingScalingPolicyConfiguration"]["TargetValue"])

    assert target() == 48  # of 64
    assert target("--instance-type", "ml.m5.xlarge") == 12  # of 16
    assert target("--env", "OPTION_MAX_ROLLING_BATCH_SIZE=32") == 24
    assert target("--autoscale-target", "5.5") == 5.5
    assert variant([*dry, "--autoscale", "2:4"], capsys)["InitialInstanceCount"] == 2


def test_the_dry_run_of_several_types(dry: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*dry, "--instance-type", "ml.g5.2xlarge,ml.g6.2xlarge", "--update"])
    calls = json.loads(capsys.readouterr().out)
    assert [call.get("only_if") for call in calls] == [
        *[None] * 4,
        *["no ml.g5.2xlarge is to be had"] * 2,
    ]
    assert calls[3]["operation"] == calls[5]["operation"] == "update_endpoint"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "a_b"], "--name must be 1 to 63 letters, digits and hyphens"),
        (["--instance-type", "ml.g5.3xlarge"], "no instance type 'ml.g5.3xlarge' is known; did"),
        (["--instance-type", "ml.g5.2xlarge,"], "--instance-type must be TYPE or TYPE,TYPE"),
        (["--instance-type", "ml.g5.xlarge,ml.m5.xlarge"], "types with and without GPUs"),
        (["--image", "lmj"], "image 'lmj' is not known"),
        (["--image", "pytorch-gpu"], "image pytorch-gpu is not in SageMaker's registries"),
        (["--image", "docker.io/a/b"], "--image docker.io/a/b is not in ECR"),
        (["--image", "lmi", "--instance-type", "ml.m5.xlarge"], "image lmi needs a GPU, and ml.m5"),
        (["--region", "eu-west-9"], "region 'eu-west-9' has no registry"),
        (["--role", "t5"], "the role must be as arn:aws:iam::123456789012:role/NAME, got 't5'"),
        (["--env", "A"], "--env must be NAME=VALUE, got 'A'"),
        (["--env", "OPTION_DTYP=bf16"], "OPTION_DTYP is no property of this handler or of DJLS"),
        (["--env", "1A=b"], "--env must be NAME=VALUE, got '1A=b'"),
        (["--env", "A=" + "b" * 1025], "--env A must have at most 1024 characters, got 1025"),
        (
            ["--autoscale", "3"],
            "--autoscale must be MIN:MAX with 1 <= MIN <= MAX instances, or off",
        ),
        (["--autoscale", "0:3"], "--autoscale must be MIN:MAX"),
        (["--autoscale", "3:2"], "--autoscale must be MIN:MAX"),
        (["--autoscale", "1:2", "--no-wait"], "--autoscale needs --wait"),
        (["--autoscale", "1:2", "--autoscale-target", "nan"], "--autoscale-target must be above 0"),
        (["--autoscale-target", "4"], "--autoscale-target needs --autoscale MIN:MAX"),
        (
            ["--download-timeout", "59"],
            "--download-timeout must be from 60 to 3600 seconds, got 59",
        ),
        (["--startup-timeout", "3601"], "--startup-timeout must be from 60 to 3600 seconds"),
        (["--volume-size", "0"], "--volume-size must be from 1 to 512 GB, got 0"),
        (["--variant", "-"], "--variant must be 1 to 63 letters"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said(dry: list[str], arguments: list[str], words: str) -> None:
    assert words in error([*dry, *arguments])


def test_what_is_no_archive(dry: list[str], tmp_path: Path) -> None:
    dry[1] = str(tmp_path / "none.tar.gz")
    assert "none.tar.gz cannot be read: No such file or directory" in error(dry)
    dry[1] = str(tmp_path / "model.zip")
    Path(dry[1]).write_bytes(b"PK")
    assert "model.zip is not a .tar.gz" in error(dry)


def test_the_region_of_the_environment(
    dry: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = [argument for argument in dry if argument not in ("--region", "eu-west-1")]
    assert "no region: give --region, as us-east-1, or set AWS_REGION" in error(dry)
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert requests(dry, capsys)["upload_file"]["Bucket"] == "sagemaker-us-west-2-123456789012"


def test_where_the_role_comes_from(tmp_path: Path) -> None:
    notebook, other = tmp_path / "metadata.json", ROLE.replace("t5", "notebook")
    notebook.write_text(json.dumps({"ExecutionRoleArn": other}))
    assert find_role(ROLE, {"SAGEMAKER_ROLE": other}, notebook) == ROLE
    assert find_role(None, {"SAGEMAKER_ROLE": ROLE}, notebook) == ROLE
    assert find_role(None, {}, notebook) == other
    for content in ("{}", "[]", "{", '{"ExecutionRoleArn": ""}'):
        notebook.write_text(content)
        with pytest.raises(LoadError, match="give --role ARN or set SAGEMAKER_ROLE"):
            find_role(None, {}, notebook)


def test_a_notebook_instance_is_asked_for_its_role(tmp_path: Path) -> None:
    notebook = tmp_path / "metadata.json"
    notebook.write_text(json.dumps({"ResourceName": "mine"}))
    with mock_aws():
        sagemaker = boto3.client("sagemaker", region_name="us-east-1")
        sagemaker.create_notebook_instance(
            NotebookInstanceName="mine", InstanceType="ml.t2.medium", RoleArn=ROLE
        )

        def ask(name: str) -> str:
            return role_of_notebook(Services("us-east-1"), name)

        assert find_role(None, {}, notebook, ask) == ROLE
        notebook.write_text(json.dumps({"ResourceName": "other"}))
        with pytest.raises(LoadError, match="role of the notebook other: DescribeNotebook"):
            find_role(None, {}, notebook, ask)
    with pytest.raises(LoadError, match="give --role ARN"):
        find_role(None, {}, notebook)  # as for --dry-run


# Requests


def valid(call: Call) -> None:
    """By botocore's own models of the services."""
    if call.operation == "upload_file":
        return
    client = boto3.client(call.service, region_name="us-east-1")
    name = client.meta.method_to_api_mapping[call.operation]
    model = botocore.session.get_session().get_service_model(call.service)
    report = ParamValidator().validate(dict(call.request), model.operation_model(name).input_shape)
    assert not report.has_errors(), report.generate_report()


def deployment(**changes: Any) -> Deployment:
    told = Deployment(
        name="t5",
        region="us-east-1",
        role=ROLE,
        bucket="bucket",
        archive=Archive(Path("model.tar.gz"), 3 * GB, "0" * 64),
        image="image",
        instance_types=tuple(INSTANCES.values()),
        environment={"A": "b"},
        inference_ami="al2-ami-sagemaker-inference-gpu-2",
        autoscale=Autoscale(1, 4, 12.5),
    )
    return replace(told, **changes)


def test_requests_are_as_the_services_want_them() -> None:
    told = deployment()
    for call in (
        *told.calls(),
        *told.calls(update=True),
        *autoscaling.calls(told),
        *autoscaling.calls(told, is_new=False),
    ):
        valid(call)


NAMES = st.from_regex(r"[a-zA-Z0-9](-{0,2}[a-zA-Z0-9]){0,30}", fullmatch=True).filter(
    lambda name: len(name) <= 63
)


@given(NAMES, NAMES)
def test_names_are_allowed_and_carry_the_prefix(name: str, other: str) -> None:
    for long in (name, (name + other)[:63].rstrip("-")):
        told = deployment(name=checked_name(long, "--name"))
        instance = find_instance("ml.g5.xlarge")
        for made in (told.model_name, told.config_name(instance)):
            checked_name(made, "made")
            assert made.startswith(plan.name_prefix(long))


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a" * 64, "\u00e9"])
def test_names_that_sagemaker_does_not_take(name: str) -> None:
    with pytest.raises(LoadError, match="--name must be 1 to 63 letters"):
        checked_name(name, "--name")


def test_another_content_has_another_name() -> None:
    instance, other = find_instance("ml.g5.xlarge"), find_instance("ml.g6.xlarge")
    told = deployment()
    for change in ({"image": "i"}, {"environment": {}}, {"role": ROLE + "2"}, {"bucket": "b2"}):
        assert deployment(**change).model_name != told.model_name
        assert deployment(**change).config_name(instance) != told.config_name(instance)
    assert told.config_name(other) != told.config_name(instance)
    assert deployment(startup_timeout=99).config_name(instance) != told.config_name(instance)
    # scaled otherwise, it is the same
    assert deployment(autoscale=None).config_name(instance) == told.config_name(instance)
