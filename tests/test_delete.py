"""delete: all that deploy made, nothing else, wherever deploy or delete itself were cut off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sagemaker_double import (
    ACCOUNT,
    BUCKET,
    REGION,
    ROLE,
    Aws,
    FakeClock,
    Fault,
    Killed,
    Outcome,
    archive_file,
    error,
)

from handler.cli import main
from handler.deployment.aws import Services
from handler.deployment.plan import Autoscale, Deployment
from handler.deployment.removal import Remover
from handler.deployment.runner import deploy
from handler.deployment.state import UploadRecord
from handler.deployment.upload import read_archive
from handler.packaging.instances import find_instance

pytest_plugins = ["sagemaker_fixtures"]
pytestmark = pytest.mark.usefixtures("clock")

DELETE = ["delete", "t5", "--region", REGION, "--yes"]
NO_CAPACITY = Outcome(status="Failed", reason="due to InsufficientInstanceCapacity error")


def make_foreign_things(cloud: Aws) -> None:
    """With names that look like ours: of another endpoint's deploy, and of people."""
    sagemaker, s3 = cloud.client("sagemaker"), cloud.client("s3")
    others = [{"Key": "djl-t5-handler:endpoint", "Value": "t5-large"}]
    for name, tags in (("t5-large-0123456789ab", others), ("t5-0123456789ab", [])):
        sagemaker.create_model(
            ModelName=name, ExecutionRoleArn=ROLE, PrimaryContainer={"Image": "i"}, Tags=tags
        )
        variant = {"VariantName": "v", "ModelName": name, "InstanceType": "ml.c5.large"}
        sagemaker.create_endpoint_config(
            EndpointConfigName=name, ProductionVariants=[variant], Tags=tags
        )
    sagemaker.create_endpoint(
        EndpointName="t5-large", EndpointConfigName="t5-large-0123456789ab", Tags=others
    )
    sagemaker.describe_endpoint(EndpointName="t5-large")
    cloud.client("application-autoscaling").register_scalable_target(
        ServiceNamespace="sagemaker",
        ResourceId="endpoint/t5-large/variant/v",
        ScalableDimension="sagemaker:variant:DesiredInstanceCount",
        MinCapacity=1,
        MaxCapacity=2,
    )
    s3.put_object(Bucket=BUCKET, Key="djl-t5-handler/t5-large/0123456789abcdef/model.tar.gz")
    s3.put_object(Bucket=BUCKET, Key="djl-t5-handler/t5/notes.txt")
    s3.create_multipart_upload(Bucket=BUCKET, Key="djl-t5-handler/t5/video.mp4")


def test_deletes_all_of_it_and_nothing_else(
    cloud: Aws, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make_foreign_things(cloud)
    foreign = cloud.everything()
    main([*command, "--autoscale", "1:3"])
    main([*command, "--autoscale", "2:3", "--env", "A=b", "--update"])
    assert len(cloud.everything() - foreign) == 2 + 2 + 1 + 1 + 2  # models, configs, the others
    capsys.readouterr()
    main(DELETE)
    assert cloud.everything() == foreign
    told = capsys.readouterr().out
    assert f"left alone, deploy did not make it: s3://{BUCKET}/djl-t5-handler/t5/notes.txt" in told
    assert "endpoint t5\n" in told
    assert "the log /aws/sagemaker/Endpoints/t5 stays in CloudWatch" in told


def test_nothing_there(cloud: Aws) -> None:
    assert f"in {REGION} there is nothing that deploy made for t5" in error(DELETE)


def test_asks_first(cloud: Aws, command: list[str]) -> None:
    main(command)
    before = cloud.everything()
    assert "--yes goes on without" in error(DELETE[:-1])
    assert cloud.everything() == before


def test_a_foreign_endpoint_of_that_name(
    cloud: Aws, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As when deploy and somebody else took the name at the same time."""
    make_foreign_things(cloud)
    cloud.client("sagemaker").create_endpoint(
        EndpointName="t5", EndpointConfigName="t5-0123456789ab"
    )
    assert "nothing that deploy made for t5" in error(DELETE)
    assert "left alone, deploy did not make it: endpoint t5\n" in capsys.readouterr().out
    assert cloud.endpoint("t5") is not None


def test_an_endpoint_that_is_being_made_is_waited_for(
    cloud: Aws, command: list[str], clock: FakeClock
) -> None:
    cloud.outcomes = [Outcome(looks=7)]
    main([*command, "--no-wait"])
    main(DELETE)
    assert cloud.everything() == set()
    assert len(clock.pauses) > 5


def test_what_was_deleted_by_hand_meanwhile(cloud: Aws, command: list[str]) -> None:
    main(command)
    remover = Remover(Services(REGION), "t5", clock=FakeClock().clock())
    found = remover.find()
    main(DELETE)
    remover.remove(found)
    assert cloud.everything() == set()


def test_archives_in_another_bucket_are_found(cloud: Aws, command: list[str]) -> None:
    """By the model; by the record of uploads; on another machine by --bucket."""
    cloud.client("s3").create_bucket(Bucket="mine")
    main([*command, "--bucket", "mine"])
    UploadRecord(ACCOUNT, REGION, "t5").forget()
    main(DELETE)
    assert cloud.everything() == set()

    cloud.refusals = {"sagemaker.CreateModel": [("AccessDeniedException", "no")]}
    error([*command, "--bucket", "mine"])
    UploadRecord(ACCOUNT, REGION, "t5").forget()
    assert "nothing that deploy made" in error(DELETE)
    main([*DELETE, "--bucket", "mine"])
    assert cloud.everything() == set()


def test_a_default_bucket_that_is_not_there(cloud: Aws, command: list[str]) -> None:
    cloud.client("s3").create_bucket(Bucket="mine")
    cloud.client("s3").delete_bucket(Bucket=BUCKET)
    main([*command, "--bucket", "mine"])
    main(DELETE)
    assert cloud.everything() == set()


def test_a_bucket_that_was_deleted_by_hand(cloud: Aws, command: list[str]) -> None:
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket="mine")
    main([*command, "--bucket", "mine"])
    for entry in s3.list_objects_v2(Bucket="mine")["Contents"]:
        s3.delete_object(Bucket="mine", Key=entry["Key"])
    s3.delete_bucket(Bucket="mine")
    assert "NoSuchBucket" in error([*DELETE, "--bucket", "mine"])
    main(DELETE)
    assert cloud.client("sagemaker").list_endpoints()["Endpoints"] == []


def test_what_may_not_be_deleted_is_said(cloud: Aws, command: list[str]) -> None:
    main(command)
    denied = ("AccessDeniedException", "sagemaker:DeleteModel")
    cloud.refusals = {"sagemaker.DeleteModel": [denied]}
    assert "no permission for DeleteModel: sagemaker:DeleteModel" in error(DELETE)
    main(DELETE)
    assert cloud.everything() == set()


# Cut off after every call


@dataclass
class Scenario:
    """A deploy, in an account where others are; before it, perhaps, another one."""

    cloud: Aws
    services: Services
    deployment: Deployment
    outcomes: list[Outcome]
    before: Deployment | None = None

    def start(self, fault: int | None = None) -> int:
        """Up to that call, or to its end; the number of calls then."""
        self.cloud.reset()
        make_foreign_things(self.cloud)
        self.foreign = self.cloud.everything()
        if self.before:
            deploy(self.services, self.before, clock=FakeClock().clock())
        self.cloud.calls.clear()
        self.cloud.outcomes = list(self.outcomes)
        if fault is None:
            self.deploy()
        else:
            self.cloud.fault = Fault(fault)
            with pytest.raises(Killed):
                self.deploy()
        calls = len(self.cloud.calls)
        self.cloud.revive()
        return calls

    def deploy(self) -> None:
        deploy(self.services, self.deployment, update=True, clock=FakeClock().clock())

    def delete(self) -> None:
        remover = Remover(self.services, "t5", clock=FakeClock().clock())
        remover.remove(remover.find())

    def serves(self) -> bool:
        endpoint = self.cloud.client("sagemaker").describe_endpoint(EndpointName="t5")
        configs = [self.deployment.config_name(each) for each in self.deployment.instance_types]
        scaled = "target endpoint/t5/variant/AllTraffic" in self.cloud.everything()
        return (
            endpoint["EndpointStatus"] == "InService"
            and endpoint["EndpointConfigName"] in configs
            and scaled
        )


@pytest.fixture(
    params=[
        "new",
        pytest.param("the second type", marks=pytest.mark.long),
        pytest.param("update", marks=pytest.mark.long),
    ]
)
def scenario(request: pytest.FixtureRequest, cloud: Aws, tmp_path: Path) -> Scenario:
    first = Deployment(
        name="t5",
        region=REGION,
        role=ROLE,
        bucket=BUCKET,
        archive=read_archive(archive_file(tmp_path)),
        image="i",
        instance_types=(find_instance("ml.c5.xlarge"), find_instance("ml.c5.2xlarge")),
        autoscale=Autoscale(1, 3, 12),
    )
    services = Services(REGION)
    if request.param == "update":
        better = tmp_path / "better"
        better.mkdir()
        second = replace(
            first,
            archive=read_archive(archive_file(better, b"better")),
            instance_types=(find_instance("ml.m5.xlarge"),),
        )
        return Scenario(cloud, services, second, [], first)
    return Scenario(cloud, services, first, [NO_CAPACITY] if request.param != "new" else [])


def test_deploy_cut_off_anywhere_is_deleted(scenario: Scenario) -> None:
    calls = scenario.start()
    assert scenario.serves()
    assert calls > 15
    for call in range(calls):
        scenario.start(fault=call)
        scenario.delete()
        assert scenario.cloud.everything() == scenario.foreign, call


def test_deploy_cut_off_anywhere_goes_on(scenario: Scenario) -> None:
    for call in range(scenario.start()):
        scenario.start(fault=call)
        scenario.deploy()
        assert scenario.serves(), call
    scenario.delete()
    assert scenario.cloud.everything() == scenario.foreign


def test_delete_cut_off_after_each_thing_goes_on(scenario: Scenario) -> None:
    scenario.start()
    things = len(scenario.cloud.everything() - scenario.foreign)
    cut_off = 0
    while True:
        scenario.cloud.fault = Fault(0, of_changes=True)
        try:
            scenario.delete()
            break
        except Killed:
            cut_off += 1
            scenario.cloud.revive()
    assert cut_off == things >= 6
    assert scenario.cloud.everything() == scenario.foreign
