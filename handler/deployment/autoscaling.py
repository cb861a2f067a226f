"""So many instances as the requests in flight need: Application Auto Scaling.

The metric is the number of concurrent requests, not of invocations a minute: a request takes as
long as its text, and what an instance can hold at a time is known (``max_rows``), while how many
requests it ends in a minute is not. It counts streams until their last token and comes every 10
seconds instead of every 60
(https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-add-code-define.html).
"""

from __future__ import annotations

import logging
from typing import Any

from handler.deployment.aws import Services
from handler.deployment.endpoint import or_none
from handler.deployment.plan import TAG, Call, Deployment, tags
from handler.errors import LoadError

logger = logging.getLogger(__name__)

Target = dict[str, Any]

POLICY = "djl-t5-handler-concurrent-requests"
_SERVICE = "application-autoscaling"
_NAMESPACE = "sagemaker"
_DIMENSION = "sagemaker:variant:DesiredInstanceCount"
_METRIC = "SageMakerVariantConcurrentRequestsPerModelHighResolution"


def calls(deployment: Deployment, *, is_new: bool = True) -> list[Call]:
    """What sets it up. is_new: no scalable target is there, whose tags cannot be given again."""
    scale = deployment.autoscale
    if scale is None:
        return []
    place = _place(_resource_id(deployment.name, deployment.variant))
    target = {
        **place,
        "MinCapacity": scale.least,
        "MaxCapacity": scale.most,
        **({"Tags": {tag["Key"]: tag["Value"] for tag in tags(deployment.name)}} if is_new else {}),
    }
    policy = {
        **place,
        "PolicyName": POLICY,
        "PolicyType": "TargetTrackingScaling",
        "TargetTrackingScalingPolicyConfiguration": {
            "TargetValue": scale.target,
            "PredefinedMetricSpecification": {"PredefinedMetricType": _METRIC},
        },
    }
    return [
        Call(_SERVICE, "register_scalable_target", target),
        Call(_SERVICE, "put_scaling_policy", policy),
    ]


def targets(services: Services, name: str) -> list[Target]:
    """The scalable targets on the endpoint's variants, whoever registered them."""
    pages = (
        services[_SERVICE]
        .get_paginator("describe_scalable_targets")
        .paginate(ServiceNamespace=_NAMESPACE)
    )
    start = _resource_id(name, "")
    return [
        target
        for page in pages
        for target in page["ScalableTargets"]
        if target["ResourceId"].startswith(start)
    ]


def is_ours(services: Services, target: Target, name: str) -> bool:
    found: Any = or_none(
        lambda: services[_SERVICE].list_tags_for_resource(ResourceARN=target["ScalableTargetARN"])
    )
    return found is not None and bool(found["Tags"].get(TAG) == name)


def target_of(services: Services, name: str, variant: str) -> Target | None:
    """The variant's own. Raises LoadError for one that deploy did not register."""
    wanted = _resource_id(name, variant)
    for target in targets(services, name):
        if target["ResourceId"] == wanted:
            if not is_ours(services, target, name):
                raise LoadError(
                    f"{wanted} is scaled by a target that deploy did not register; deregister it, "
                    "or deploy without --autoscale"
                )
            return target
    return None


def set_up(services: Services, deployment: Deployment) -> None:
    """The target and its policy, new or changed. The endpoint must be in service."""
    found = target_of(services, deployment.name, deployment.variant)
    for call in calls(deployment, is_new=found is None):
        getattr(services[call.service], call.operation)(**call.request)
    scale = deployment.autoscale
    assert scale is not None
    logger.info(
        "scales from %d to %d instances, %g requests at a time on each",
        scale.least,
        scale.most,
        scale.target,
    )


def remove(services: Services, target: Target) -> None:
    """The policy first: until its target is deregistered, it could still start instances."""
    place = _place(target["ResourceId"])
    client = services[_SERVICE]
    policies = client.describe_scaling_policies(**place)["ScalingPolicies"]
    if any(policy["PolicyName"] == POLICY for policy in policies):
        or_none(lambda: client.delete_scaling_policy(PolicyName=POLICY, **place))
    or_none(lambda: client.deregister_scalable_target(**place))


def _resource_id(name: str, variant: str) -> str:
    return f"endpoint/{name}/variant/{variant}"


def _place(resource_id: str) -> dict[str, str]:
    return {
        "ServiceNamespace": _NAMESPACE,
        "ResourceId": resource_id,
        "ScalableDimension": _DIMENSION,
    }
