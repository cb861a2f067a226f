"""Autoscaling of an endpoint: set up, kept, changed, ended; never somebody's own."""

from __future__ import annotations

from typing import Any

import pytest
from sagemaker_double import Aws, error

from handler.cli import main

pytest_plugins = ["sagemaker_fixtures"]
pytestmark = pytest.mark.usefixtures("clock")

PLACE = {
    "ServiceNamespace": "sagemaker",
    "ResourceId": "endpoint/t5/variant/AllTraffic",
    "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
}
OTHER_TYPE = ["--instance-type", "ml.m5.xlarge", "--update"]


def target(cloud: Aws) -> tuple[int, int] | None:
    scaling = cloud.client("application-autoscaling")
    found = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    return (found[0]["MinCapacity"], found[0]["MaxCapacity"]) if found else None


def policies(cloud: Aws) -> list[dict[str, Any]]:
    scaling = cloud.client("application-autoscaling")
    found: list[dict[str, Any]] = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")[
        "ScalingPolicies"
    ]
    return [policy["TargetTrackingScalingPolicyConfiguration"] for policy in found]


def test_is_set_up_when_the_endpoint_serves(cloud: Aws, command: list[str]) -> None:
    main([*command, "--autoscale", "1:3"])
    assert target(cloud) == (1, 3)
    metric = "SageMakerVariantConcurrentRequestsPerModelHighResolution"
    assert policies(cloud) == [
        {
            "TargetValue": 12,
            "PredefinedMetricSpecification": {"PredefinedMetricType": metric},
        }
    ]


def test_can_be_added_and_changed_without_an_update(cloud: Aws, command: list[str]) -> None:
    main(command)
    main([*command, "--autoscale", "2:3"])
    assert target(cloud) == (2, 3)
    main([*command, "--autoscale", "3:5", "--autoscale-target", "4"])
    assert target(cloud) == (3, 5)
    assert [policy["TargetValue"] for policy in policies(cloud)] == [4]
    assert "sagemaker.UpdateEndpoint" not in cloud.calls


def test_is_never_lost_silently_in_an_update(cloud: Aws, command: list[str]) -> None:
    main([*command, "--autoscale", "2:4"])
    said = error([*command, *OTHER_TYPE])
    assert "endpoint t5 scales itself: say --autoscale 2:4 to keep that, or off" in said
    assert cloud.changes()[-1] == "application-autoscaling.PutScalingPolicy", "of the first deploy"
    assert target(cloud) == (2, 4)
    main([*command, *OTHER_TYPE, "--autoscale", "2:4"])
    assert target(cloud) == (2, 4)
    assert len(policies(cloud)) == 1


def test_can_be_ended(cloud: Aws, command: list[str]) -> None:
    main([*command, "--autoscale", "2:4"])
    main([*command, "--autoscale", "off"])
    assert (target(cloud), policies(cloud)) == (None, [])
    main([*command, "--autoscale", "2:4"])
    main([*command, *OTHER_TYPE, "--autoscale", "off"])
    assert (target(cloud), policies(cloud)) == (None, [])


def test_an_update_keeps_the_number_of_instances(cloud: Aws, command: list[str]) -> None:
    requests: list[dict[str, Any]] = []
    update = cloud._before_UpdateEndpoint
    cloud._before_UpdateEndpoint = lambda request: requests.append(request) or update(request)  # type: ignore
    main(command)
    main([*command, "--env", "A=b", "--update"])
    main([*command, "--variant", "other", "--update"])
    assert [request["RetainAllVariantProperties"] for request in requests] == [True, False]


def test_somebodys_own_scaling_is_left_alone(cloud: Aws, command: list[str]) -> None:
    main(command)
    scaling = cloud.client("application-autoscaling")
    scaling.register_scalable_target(**PLACE, MinCapacity=1, MaxCapacity=9)
    cloud.calls.clear()
    said = error([*command, "--autoscale", "1:3"])
    assert "is scaled by a target that deploy did not register" in said
    assert cloud.changes() == []
    main([*command, "--env", "A=b", "--update"])
    assert target(cloud) == (1, 9)
