"""Carries a deployment out, from whatever is there of it already.

Each step first looks whether its result is there, so that a deployment that was cut off anywhere
goes on when it is started again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from handler.deployment import autoscaling, container_log, upload
from handler.deployment.aws import Clock, Services, error_code, error_message, is_missing
from handler.deployment.aws import told_as_load_errors as told
from handler.deployment.endpoint import (
    Description,
    Endpoint,
    NotNow,
    config_of,
    is_changing,
    is_tagged,
    lacks_capacity,
    or_none,
)
from handler.deployment.plan import Call, Deployment
from handler.deployment.state import UploadRecord
from handler.errors import LoadError
from handler.packaging.instances import InstanceType

logger = logging.getLogger(__name__)

# Through all instance types, and the wait after a round in vain, which doubles.
_ROUNDS = 4
_FIRST_WAIT = 60.0
# SageMaker's calls may not see for some seconds what was made by the call before.
_SIGHT_ATTEMPTS = 5
_SIGHT_WAIT = 1.0
_PUT_ATTEMPTS = 10
_CLOCKS_DIFFER = 60.0
_LOG_LINES = 20


def deploy(
    services: Services,
    deployment: Deployment,
    *,
    update: bool = False,
    wait: bool = True,
    clock: Clock | None = None,
) -> None:
    """Upload, make the endpoint, and unless ``wait`` is false wait until it is in service.

    update: whether an endpoint that serves something else may be changed. Raises LoadError.
    """
    run = _Run(services, deployment, update, clock or Clock())
    with told():
        run.check()
        run.prepare()
        run.serve(wait)
        run.scale(wait)


def default_bucket(region: str, account: str) -> str:
    """The one that SageMaker's own tools use, too."""
    return f"sagemaker-{region}-{account}"


def account_of(role: str) -> str:
    """Of ``arn:aws:iam::ACCOUNT:role/NAME``: a role can be passed within its account only."""
    return role.split(":")[4]


class _Run:
    def __init__(
        self, services: Services, deployment: Deployment, update: bool, clock: Clock
    ) -> None:
        self._services = services
        self._deployment = deployment
        self._update = update
        self._clock = clock
        self._sagemaker = services["sagemaker"]
        self._endpoint = Endpoint(services, deployment.name, clock)

    def check(self) -> None:
        """What would end in vain, before anything is uploaded."""
        d = self._deployment
        default = default_bucket(d.region, account_of(d.role))
        owner = account_of(d.role) if d.bucket == default else None
        upload.check_bucket(self._services, d.bucket, owner)
        description = self._endpoint.describe()
        if description is not None:
            self._check_ours(description)
            if not self._is_free(description) and config_of(description) not in self._configs():
                self._check_update(description)
        if d.autoscale:
            autoscaling.target_of(self._services, d.name, d.variant)

    def prepare(self) -> None:
        """The archive in S3 and the model."""
        d = self._deployment
        UploadRecord(account_of(d.role), d.region, d.name).add(d.bucket)
        upload.upload(self._services, d)
        self._ensure(
            d.create_model(),
            lambda: self._sagemaker.describe_model(ModelName=d.model_name)["ModelArn"],
        )

    def serve(self, wait: bool) -> None:
        """The endpoint, on the first instance type of the list that is to be had."""
        failure: NotNow | None = None
        for round_ in range(_ROUNDS):
            if failure is not None:
                pause = _FIRST_WAIT * 2 ** (round_ - 1)
                logger.warning("%s; next attempt in %.0f s", failure, pause)
                self._clock.sleep(pause)
            again = False
            for instance in self._preferred():
                try:
                    self._serve_on(instance, wait)
                    return
                except NotNow as error:
                    logger.warning("%s", error)
                    failure = error
                    again |= error.again
            if not again:
                break
        assert failure is not None
        raise failure

    def scale(self, waited: bool) -> None:
        """Autoscaling, which can be set up when the endpoint is in service only."""
        d = self._deployment
        if d.autoscale and waited:
            autoscaling.set_up(self._services, d)
        elif d.fixed_size:
            for target in self._targets():
                autoscaling.remove(self._services, target)

    def _serve_on(self, instance: InstanceType, wait: bool) -> None:
        d, config = self._deployment, self._deployment.config_name(instance)
        self._ensure(
            d.create_config(instance),
            lambda: self._sagemaker.describe_endpoint_config(EndpointConfigName=config)[
                "EndpointConfigArn"
            ],
        )
        began = time.time() - _CLOCKS_DIFFER
        self._put(instance)
        if wait:
            self._wait(instance, began)

    def _put(self, instance: InstanceType) -> None:
        """The endpoint has this instance type's configuration, or is about to."""
        from botocore.exceptions import ClientError

        for _ in range(_PUT_ATTEMPTS):
            try:
                if self._put_once(instance):
                    return
            except ClientError as error:
                if not _exists_already(error):
                    raise _refusal(error, instance) from error
                self._clock.sleep(_SIGHT_WAIT)
        raise LoadError(f"endpoint {self._deployment.name} is changed by somebody else, too")

    def _put_once(self, instance: InstanceType) -> bool:
        """False: something was in the way, and is not any more."""
        d = self._deployment
        description = self._endpoint.describe()
        if description is None:
            self._execute(d.create_endpoint(instance))
            return True
        self._check_ours(description)
        if self._has(description, instance):
            return True
        if is_changing(description):
            self._endpoint.settled(d.seconds_to_wait)
            return False
        if description["EndpointStatus"] == "Failed":
            logger.info("endpoint %s has failed before, making it anew", d.name)
            self._endpoint.delete(d.seconds_to_wait)
            return False
        self._check_update(description)
        # SageMaker does not change the instance type of what is scaled: it is set up again later
        for target in self._targets():
            autoscaling.remove(self._services, target)
        variants = [v["VariantName"] for v in description.get("ProductionVariants", ())]
        self._execute(d.update_endpoint(instance, keep_instances=variants == [d.variant]))
        return True

    def _wait(self, instance: InstanceType, began: float) -> None:
        """Until it serves on this type. began: seconds after 1970."""
        d = self._deployment
        description = self._seen(instance)
        if description is None:
            raise LoadError(f"endpoint {d.name} was deleted meanwhile")
        if self._has(description, instance):
            logger.info("endpoint %s is in service on %s", d.name, instance.name)
            return
        reason = description.get("FailureReason") or f"it is {description['EndpointStatus']}"
        if lacks_capacity(reason):
            raise NotNow(f"no {instance.name} is to be had now: {reason}")
        if description["EndpointStatus"] == "Failed":  # by AWS's own clock
            began = description["CreationTime"].timestamp()
        logger.error("the last lines of the container's log:")
        since_ms = int(began * 1000)
        for line in container_log.last_lines(self._services, d.name, since_ms, _LOG_LINES):
            logger.error("  %s", line)
        raise LoadError(f"endpoint {d.name} has failed: {reason}")

    def _seen(self, instance: InstanceType) -> Description | None:
        """What became of it; for a while SageMaker may still tell what was before the call."""
        for attempt in range(1, _SIGHT_ATTEMPTS + 1):
            description = self._endpoint.settled(self._deployment.seconds_to_wait)
            if description is not None and (
                self._has(description, instance)
                or description["EndpointStatus"] != "InService"
                or description.get("FailureReason")
            ):
                break
            self._clock.sleep(_SIGHT_WAIT * 2**attempt)
        return description

    # What is there

    def _targets(self) -> list[autoscaling.Target]:
        """Of autoscaling, those that deploy registered."""
        name = self._deployment.name
        found = autoscaling.targets(self._services, name)
        return [each for each in found if autoscaling.is_ours(self._services, each, name)]

    def _preferred(self) -> list[InstanceType]:
        """The list, but what the endpoint has already comes first."""
        description = self._endpoint.describe()
        has = config_of(description) if description and not self._is_free(description) else ""
        d = self._deployment
        return sorted(d.instance_types, key=lambda instance: d.config_name(instance) != has)

    def _configs(self) -> list[str]:
        return [self._deployment.config_name(each) for each in self._deployment.instance_types]

    def _has(self, description: Description, instance: InstanceType) -> bool:
        alive = not self._is_free(description)
        return alive and config_of(description) == self._deployment.config_name(instance)

    def _is_free(self, description: Description) -> bool:
        """Whether it serves nothing, so that its name can be taken."""
        return description["EndpointStatus"] in ("Failed", "Deleting")

    def _check_ours(self, description: Description) -> None:
        if not self._endpoint.is_ours(description):
            raise LoadError(
                f"there is an endpoint {self._deployment.name} that deploy did not make: choose "
                "another --name"
            )

    def _check_update(self, description: Description) -> None:
        d = self._deployment
        if not self._update:
            raise LoadError(
                f"endpoint {d.name} is {description['EndpointStatus']} with another model, image "
                "or settings: --update changes it while it serves, or choose another --name"
            )
        for target in () if d.autoscale or d.fixed_size else self._targets():
            range_ = f"{target['MinCapacity']}:{target['MaxCapacity']}"
            raise LoadError(
                f"endpoint {d.name} scales itself: say --autoscale {range_} to keep that, or off"
            )

    # Calls

    def _execute(self, call: Call) -> None:
        from botocore.exceptions import ClientError

        for attempt in range(1, _SIGHT_ATTEMPTS + 1):
            logger.info("%s", call.operation)
            try:
                getattr(self._services[call.service], call.operation)(**call.request)
                return
            except ClientError as error:
                if not is_missing(error) or attempt == _SIGHT_ATTEMPTS:
                    raise
            self._clock.sleep(_SIGHT_WAIT * 2**attempt)

    def _ensure(self, call: Call, arn: Callable[[], Any]) -> None:
        """Make what is not there. What is has the same content: that is in its name."""
        from botocore.exceptions import ClientError

        found = or_none(arn)
        if found is None:
            try:
                self._execute(call)
                return
            except ClientError as error:
                if not _exists_already(error):
                    raise
            found = arn()
        if not is_tagged(self._services, found, self._deployment.name):
            raise LoadError(f"{found} was not made by deploy: choose another --name")


def _exists_already(error: Exception) -> bool:
    """As for a call that was answered too late, and made again."""
    return error_code(error) == "ValidationException" and "already exist" in error_message(error)


def _refusal(error: Exception, instance: InstanceType) -> Exception:
    code, message = error_code(error), error_message(error)
    if lacks_capacity(f"{code} {message}"):
        return NotNow(f"no {instance.name} is to be had now: {message}")
    if code == "ResourceLimitExceeded":
        return NotNow(
            f"your account's quota of {instance.name} is used up: {message}; ask for more in the "
            "Service Quotas console, or name another type in --instance-type",
            again=False,
        )
    return error
