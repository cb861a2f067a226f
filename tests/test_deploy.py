"""deploy: what it makes in AWS, from whatever is there already, and what it says when it cannot."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import botocore.awsrequest
import pytest
from sagemaker_double import BUCKET, ROLE, Aws, FakeClock, Outcome, archive_file, error

from handler.cli import main
from handler.deployment import upload

CHANGES = [
    "s3.PutObject",
    "sagemaker.CreateModel",
    "sagemaker.CreateEndpointConfig",
    "sagemaker.CreateEndpoint",
]
NO_CAPACITY = Outcome(
    status="Failed",
    reason="Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity "
    "error. Please retry using a different ML instance type or after some time.",
)
INVALID = "ValidationException"

pytest_plugins = ["sagemaker_fixtures"]
pytestmark = pytest.mark.usefixtures("clock")


def variant_of(cloud: Aws) -> dict[str, Any]:
    """What serves."""
    sagemaker = cloud.client("sagemaker")
    endpoint = sagemaker.describe_endpoint(EndpointName="t5")
    assert endpoint["EndpointStatus"] == "InService"
    config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    (variant,) = config["ProductionVariants"]
    found: dict[str, Any] = variant
    return found


def model_of(cloud: Aws) -> dict[str, Any]:
    found: dict[str, Any] = cloud.client("sagemaker").describe_model(
        ModelName=variant_of(cloud)["ModelName"]
    )
    return found


def types(*names: str) -> list[str]:
    return ["--instance-type", ",".join(names)]


# Making


def test_makes_an_endpoint(cloud: Aws, command: list[str]) -> None:
    main(command)
    assert cloud.changes() == CHANGES
    variant = variant_of(cloud)
    assert (variant["InstanceType"], variant["VolumeSizeInGB"]) == ("ml.c5.2xlarge", 24)
    container = model_of(cloud)["PrimaryContainer"]
    assert container["Image"].endswith("djl-inference:0.36.0-cpu-full")
    bucket, _, key = container["ModelDataUrl"][len("s3://") :].partition("/")
    assert bucket == BUCKET
    assert cloud.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read() == b"\x1f\x8bmodel"


def test_dry_run_prints_the_calls_that_are_made(
    cloud: Aws, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command, "--dry-run", "--autoscale", "1:3"])
    assert cloud.calls == []
    told = json.loads(capsys.readouterr().out)
    assert [call["operation"] for call in told] == [
        *("upload_file", "create_model", "create_endpoint_config", "create_endpoint"),
        *("register_scalable_target", "put_scaling_policy"),
    ]
    main([*command, "--autoscale", "1:3"])
    sagemaker = cloud.client("sagemaker")
    for call in told[1:4]:
        (name,) = [n for n in call["request"] if n.endswith("Name")][:1]
        described = getattr(sagemaker, call["operation"].replace("create", "describe"))(
            **{name: call["request"][name]}
        )
        assert {
            k: v for k, v in call["request"].items() if k != "Tags"
        }.items() <= described.items()


def test_a_second_deploy_of_the_same_changes_nothing(cloud: Aws, command: list[str]) -> None:
    main(command)
    before = cloud.everything()
    cloud.calls.clear()
    main(command)
    assert cloud.changes() == []
    assert cloud.everything() == before


def test_settings_reach_the_container_and_the_host(cloud: Aws, command: list[str]) -> None:
    main(
        [
            *command,
            *types("ml.g4dn.xlarge"),
            *("--env", "OPTION_DTYPE=fp16", "--env", "A=b=c", "--variant", "one"),
            *("--download-timeout", "700", "--startup-timeout", "900"),
        ]
    )
    variant = variant_of(cloud)
    assert variant["VariantName"] == "one"
    assert variant["ModelDataDownloadTimeoutInSeconds"] == 700
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 900
    assert variant["InferenceAmiVersion"] == "al2023-ami-sagemaker-inference-gpu-4-1"
    assert "VolumeSizeInGB" not in variant  # it has a disk of its own
    environment = model_of(cloud)["PrimaryContainer"]["Environment"]
    assert environment == {"OPTION_DTYPE": "fp16", "A": "b=c"}


def test_without_waiting(
    cloud: Aws, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.outcomes = [Outcome(looks=5)]
    main([*command, "--no-wait"])
    assert cloud.changes() == CHANGES
    assert "the same command without --no-wait waits" in capsys.readouterr().out
    main(command)
    assert cloud.changes() == CHANGES


def test_large_archives_go_in_parts(
    cloud: Aws, command: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(upload, "_PART", 5 << 20)
    content = os.urandom(11 << 20)
    archive_file(Path(command[1]).parent, content)
    with caplog.at_level(logging.INFO):
        main(command)
    assert cloud.changes().count("s3.UploadPart") == 3
    assert "uploaded 100 %" in caplog.text
    (found,) = cloud.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]
    assert found["Size"] == len(content) + 2


def test_an_archive_that_changes_during_its_upload(
    cloud: Aws, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(command[1])
    enter = upload._Progress.__enter__

    def meddle(progress: Any) -> Any:
        file.write_bytes(file.read_bytes() + b"more")
        return enter(progress)

    monkeypatch.setattr(upload._Progress, "__enter__", meddle)
    assert "was changed during the upload" in error(command)
    assert cloud.everything() == set()


# Changing what is there


def test_another_model_needs_update(cloud: Aws, command: list[str]) -> None:
    main(command)
    first = model_of(cloud)["PrimaryContainer"]["ModelDataUrl"]
    archive_file(Path(command[1]).parent, b"better")
    cloud.calls.clear()
    said = error(command)
    assert (
        "endpoint t5 is InService with another model, image or settings: --update changes" in said
    )
    assert cloud.changes() == []
    main([*command, "--update"])
    assert cloud.changes()[-1] == "sagemaker.UpdateEndpoint"
    assert model_of(cloud)["PrimaryContainer"]["ModelDataUrl"] != first


def test_going_back_only_updates(cloud: Aws, command: list[str]) -> None:
    main(command)
    main([*command, "--env", "A=b", "--update"])
    cloud.calls.clear()
    main([*command, "--update"])
    assert cloud.changes() == ["sagemaker.UpdateEndpoint"]
    assert model_of(cloud)["PrimaryContainer"]["Environment"] == {}


def test_an_update_that_fails_leaves_what_serves(
    cloud: Aws, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    main(command)
    before = model_of(cloud)
    cloud.outcomes = [Outcome(reason="The container did not pass the ping health check")]
    said = error([*command, "--env", "A=b", "--update"])
    assert "endpoint t5 has failed: The container did not pass the ping health check" in said
    assert model_of(cloud)["ModelName"] == before["ModelName"]


def test_an_endpoint_that_is_being_changed_is_waited_for(cloud: Aws, command: list[str]) -> None:
    cloud.outcomes = [Outcome(looks=9)]
    main([*command, "--no-wait"])
    main([*command, "--env", "A=b", "--update"])
    assert model_of(cloud)["PrimaryContainer"]["Environment"] == {"A": "b"}


def test_a_failed_endpoint_is_made_anew(cloud: Aws, command: list[str]) -> None:
    cloud.outcomes = [Outcome(status="Failed", reason="out of memory")]
    assert "endpoint t5 has failed: out of memory" in error(command)
    main([*command, "--env", "OPTION_DTYPE=int8"])
    assert model_of(cloud)["PrimaryContainer"]["Environment"] == {"OPTION_DTYPE": "int8"}


def test_a_foreign_endpoint_is_left_alone(cloud: Aws, command: list[str]) -> None:
    sagemaker = cloud.client("sagemaker")
    sagemaker.create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer={"Image": "i"})
    sagemaker.create_endpoint_config(
        EndpointConfigName="c",
        ProductionVariants=[{"VariantName": "v", "ModelName": "m", "InstanceType": "ml.c5.large"}],
    )
    sagemaker.create_endpoint(EndpointName="t5", EndpointConfigName="c")
    cloud.calls.clear()
    for arguments in (command, [*command, "--update"]):
        assert "there is an endpoint t5 that deploy did not make: choose another" in error(
            arguments
        )
    assert cloud.changes() == []


# When AWS refuses


def test_the_next_instance_type_is_tried(cloud: Aws, command: list[str]) -> None:
    cloud.outcomes = [NO_CAPACITY]
    main([*command, *types("ml.g4dn.2xlarge", "ml.g4dn.xlarge")])
    assert variant_of(cloud)["InstanceType"] == "ml.g4dn.xlarge"
    assert cloud.changes()[3:] == [
        *("sagemaker.CreateEndpoint", "sagemaker.CreateEndpointConfig"),
        *("sagemaker.DeleteEndpoint", "sagemaker.CreateEndpoint"),
    ]
    cloud.calls.clear()
    main([*command, *types("ml.g4dn.2xlarge", "ml.g4dn.xlarge")])
    assert cloud.changes() == [], "it serves, on one of them"


def test_capacity_that_is_refused_at_once(cloud: Aws, command: list[str]) -> None:
    refusal = ("InsufficientInstanceCapacity", "no ml.g4dn.2xlarge now")
    cloud.refusals = {"sagemaker.CreateEndpoint": [refusal]}
    main([*command, *types("ml.g4dn.2xlarge", "ml.g4dn.xlarge"), "--no-wait"])
    assert cloud.changes()[-3:] == [
        *("sagemaker.CreateEndpoint", "sagemaker.CreateEndpointConfig", "sagemaker.CreateEndpoint"),
    ]


def test_a_single_type_is_tried_again_later(
    cloud: Aws, command: list[str], clock: FakeClock
) -> None:
    cloud.outcomes = [NO_CAPACITY, NO_CAPACITY]
    main(command)
    assert [pause for pause in clock.pauses if pause >= 60] == [60, 120]


def test_capacity_that_never_comes(cloud: Aws, command: list[str], clock: FakeClock) -> None:
    cloud.outcomes = [NO_CAPACITY] * 4
    assert "no ml.c5.2xlarge is to be had now: Unable to provision" in error(command)
    assert [pause for pause in clock.pauses if pause >= 60] == [60, 120, 240]


def test_an_update_without_capacity_keeps_what_serves_and_goes_on(
    cloud: Aws, command: list[str]
) -> None:
    main([*command, *types("ml.g4dn.xlarge")])
    cloud.outcomes = [Outcome(reason=NO_CAPACITY.reason)]
    main([*command, *types("ml.g4dn.4xlarge", "ml.g4dn.2xlarge"), "--update"])
    assert variant_of(cloud)["InstanceType"] == "ml.g4dn.2xlarge"
    assert "sagemaker.DeleteEndpoint" not in cloud.calls


def test_a_quota_is_not_waited_for(cloud: Aws, command: list[str], clock: FakeClock) -> None:
    quota = "The account-level service limit 'ml.c5.2xlarge for endpoint usage' is 0 Instances"
    cloud.refusals = {"sagemaker.CreateEndpoint": [("ResourceLimitExceeded", quota)]}
    said = error(command)
    assert "your account's quota of ml.c5.2xlarge is used up" in said
    assert "Service Quotas console" in said
    assert clock.pauses == []


def test_a_failed_endpoint_shows_the_containers_last_lines(
    cloud: Aws, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    logs, group = cloud.client("logs"), "/aws/sagemaker/Endpoints/t5"
    logs.create_log_group(logGroupName=group)
    logs.create_log_stream(logGroupName=group, logStreamName="AllTraffic/i-1")
    now = int(time.time() * 1000)
    written = [
        {"timestamp": now + 5000 + n, "message": message}
        for n, message in enumerate(["loading", "LoadError: heads\x1b[31m", "stopped"])
    ]
    logs.put_log_events(logGroupName=group, logStreamName="AllTraffic/i-1", logEvents=written)
    cloud.outcomes = [Outcome(status="Failed", reason="The container did not pass the ping")]
    with caplog.at_level(logging.ERROR):
        assert (
            error(command) == "error: endpoint t5 has failed: The container did not pass the ping"
        )
    told = [record.getMessage() for record in caplog.records]
    assert told[-4] == "the last lines of the container's log:"
    assert [line.rpartition("i-1 ")[2] for line in told[-3:]] == [
        *("loading", "LoadError: heads?[31m", "stopped"),
    ]


def test_a_container_that_never_started_has_no_log(
    cloud: Aws, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cloud.outcomes = [Outcome(status="Failed", reason="image not found")]
    error(command)
    assert "(nothing: the container has not started)" in caplog.text


def test_waiting_has_an_end(cloud: Aws, command: list[str]) -> None:
    cloud.outcomes = [Outcome(looks=10_000)]
    said = error(command)
    assert "endpoint t5 is still Creating after 3720 s; the same command waits on" in said


def test_waiting_outlives_an_aws_that_does_not_answer(cloud: Aws, command: list[str]) -> None:
    throttled = ("ThrottlingException", "Rate exceeded")

    def twice() -> None:
        cloud.refusals["sagemaker.DescribeEndpoint"] = [throttled] * 2

    cloud.on_call = {"sagemaker.CreateEndpoint": twice}
    main(command)
    assert cloud.refusals["sagemaker.DescribeEndpoint"] == []


@pytest.mark.parametrize(
    ("operation", "code", "message", "words"),
    [
        (
            "sagemaker.CreateModel",
            "AccessDeniedException",
            "User u is not authorized to perform: iam:PassRole",
            "no permission for CreateModel: User u is not authorized to perform: iam:PassRole",
        ),
        (
            "sagemaker.CreateModel",
            INVALID,
            "Could not assume role arn:aws:iam::123456789012:role/t5",
            "CreateModel: Could not assume role arn:aws:iam::123456789012:role/t5",
        ),
        (
            "sagemaker.CreateEndpointConfig",
            "ThrottlingException",
            "Rate exceeded",
            "AWS takes no more calls now (CreateEndpointConfig: Rate exceeded); run the same",
        ),
        (
            "s3.HeadBucket",
            "403",
            "Forbidden",
            f"bucket {BUCKET} is not yours, or your IAM identity may not use it",
        ),
        (
            "s3.PutObject",
            "AccessDenied",
            "Access Denied",
            "upload of ",
        ),
        (
            "sagemaker.DescribeEndpoint",
            "ExpiredTokenException",
            "The security token included in the request is expired",
            "the AWS credentials are not accepted",
        ),
        (
            "application-autoscaling.PutScalingPolicy",
            "AccessDeniedException",
            "cloudwatch:PutMetricAlarm",
            "no permission for PutScalingPolicy: cloudwatch:PutMetricAlarm",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[:30] else "",
)
def test_what_aws_refuses_is_one_line(
    cloud: Aws, command: list[str], operation: str, code: str, message: str, words: str
) -> None:
    cloud.refusals = {operation: [(code, message)] * 9}
    assert words in error([*command, "--autoscale", "1:2"])
    cloud.refusals = {}
    main([*command, "--autoscale", "1:2"])


def test_what_was_just_made_may_not_be_seen_yet(
    cloud: Aws, command: list[str], clock: FakeClock
) -> None:
    unseen = (INVALID, "Could not find endpoint configuration")
    cloud.refusals = {"sagemaker.CreateEndpoint": [unseen, unseen]}
    main(command)
    assert clock.pauses[:2] == [2, 4]


def test_what_sagemaker_tells_may_be_of_before_the_update(cloud: Aws, command: list[str]) -> None:
    """The first looks after the call still find the old one in service."""
    main(command)
    cloud.outcomes = [Outcome(unseen=2)]
    main([*command, "--env", "A=b", "--update"])
    assert model_of(cloud)["PrimaryContainer"]["Environment"] == {"A": "b"}


def test_somebody_who_makes_the_endpoint_at_the_same_time(cloud: Aws, command: list[str]) -> None:
    taken = (INVALID, "Cannot create already existing endpoint")
    cloud.refusals = {"sagemaker.CreateEndpoint": [taken] * 99}
    assert "endpoint t5 is changed by somebody else, too" in error(command)


def test_ctrl_c_says_how_to_go_on(
    cloud: Aws, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    cloud.on_call = {"sagemaker.CreateEndpoint": interrupt}
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 130
    assert "the same command goes on, delete t5 gives up" in capsys.readouterr().err


def test_throttled_calls_are_made_again(
    cloud: Aws, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By botocore, under our calls: here HTTP answers say so."""
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)
    left = [1, 1, 1]

    def throttle(request: Any, **_: Any) -> Any:
        if not left:
            return None
        left.pop()
        body = json.dumps({"__type": "ThrottlingException", "message": "Rate exceeded"}).encode()
        raw = type("Raw", (), {"stream": lambda self: iter([body])})()
        return botocore.awsrequest.AWSResponse(request.url, 400, {}, raw)

    cloud.session.events.register_first("before-send.sagemaker.CreateModel", throttle)
    main(command)
    assert left == []
    assert variant_of(cloud)["InstanceType"] == "ml.c5.2xlarge"


def test_a_bucket_that_is_not_there(cloud: Aws, command: list[str]) -> None:
    said = error([*command, "--bucket", "nowhere"])
    assert "there is no bucket nowhere: aws s3 mb s3://nowhere --region us-east-1 makes it" in said


def test_a_default_bucket_that_somebody_else_has_taken(cloud: Aws, command: list[str]) -> None:
    """Its name can be guessed; what is told by --bucket may be another account's."""
    cloud.buckets_owner = "210987654321"
    assert f"bucket {BUCKET} is not yours" in error(command)
    assert cloud.changes() == []
    cloud.client("s3").create_bucket(Bucket="shared")
    main([*command, "--bucket", "shared"])


def test_a_bucket_in_another_region(cloud: Aws, command: list[str]) -> None:
    cloud.client("s3").create_bucket(
        Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    said = error([*command, "--bucket", "far"])
    assert "bucket far is in eu-west-1, but the endpoint in us-east-1" in said
    assert cloud.changes() == ["s3.CreateBucket"]


def test_without_credentials(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    assert "Unable to locate credentials; set AWS_PROFILE or" in error(command)


def test_without_boto3(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] in ("boto3", "botocore")]:
        monkeypatch.setitem(sys.modules, name, None)
    asked = ["--region", "us-east-1"]
    for arguments in (
        command,
        ["logs", "t5", *asked],
        ["delete", "t5", *asked],
        ["invoke", "t5", "x", *asked],
    ):
        assert "needs the package boto3: pip install boto3" in error(arguments)
    main([*command, "--dry-run"])
    assert "create_endpoint" in capsys.readouterr().out


def test_asks_first(
    cloud: Aws, command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command.remove("--yes")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "empty").open("w+"))
    assert "there is no terminal to ask on: --yes goes on without" in error(command)
    for answer, changes in (("\n", []), ("no\n", []), ("y\n", CHANGES)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        if changes:
            main(command)
        else:
            assert error(command) == "error: nothing was done"
        assert cloud.changes() == changes


class Terminal:
    def __init__(self, answer: str) -> None:
        self._answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self._answer
