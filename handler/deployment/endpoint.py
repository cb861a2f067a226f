"""An endpoint in SageMaker: what it is now, and waiting until that has changed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar

from handler.deployment.aws import (
    Clock,
    Services,
    error_code,
    error_message,
    is_missing,
    is_passing,
    told_as_load_errors,
)
from handler.deployment.plan import TAG
from handler.errors import LoadError

logger = logging.getLogger(__name__)

Description = dict[str, Any]
T = TypeVar("T")

_CHANGING = ("Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting")
_POLL_SECONDS = 15.0
_TELL_SECONDS = 60.0
_CAPACITY = re.compile(
    "InsufficientInstanceCapacity|insufficient (instance )?capacity|"
    "unable to provision requested ML compute capacity",
    re.IGNORECASE,
)


class NotNow(LoadError):
    """No instance of a type is to be had. ``again``: later there may be one, it is not a quota."""

    def __init__(self, message: str, *, again: bool = True) -> None:
        super().__init__(message)
        self.again = again


def lacks_capacity(reason: str) -> bool:
    """Whether a FailureReason or a refusal says that AWS has no such instances left now."""
    return bool(_CAPACITY.search(reason))


def is_tagged(services: Services, arn: str, name: str) -> bool:
    """Whether ``deploy`` made this resource of SageMaker for the endpoint ``name``."""
    pages = services["sagemaker"].get_paginator("list_tags").paginate(ResourceArn=arn)
    return {"Key": TAG, "Value": name} in [tag for page in pages for tag in page["Tags"]]


def or_none(describe: Callable[[], T]) -> T | None:
    """What is described, None where it is not there."""
    from botocore.exceptions import ClientError

    try:
        return describe()
    except ClientError as error:
        if is_missing(error):
            return None
        raise


class Endpoint:
    """The endpoint of that name, whether it is there or not."""

    def __init__(self, services: Services, name: str, clock: Clock) -> None:
        self._services = services
        self._client = services["sagemaker"]
        self._name = name
        self._clock = clock

    def describe(self) -> Description | None:
        return or_none(lambda: self._client.describe_endpoint(EndpointName=self._name))

    def is_ours(self, description: Description) -> bool:
        return is_tagged(self._services, description["EndpointArn"], self._name)

    def settled(self, seconds: float) -> Description | None:
        """Waits while it is created, updated or deleted; None when it is gone.

        Raises LoadError after so many seconds. Goes on when AWS is not reached for a while.
        """
        start = self._clock.now()
        told_status, told_at = "", start
        while True:
            description = self._patiently(self.describe, start, seconds)
            status = description["EndpointStatus"] if description else "gone"
            now = self._clock.now()
            if status != told_status or now - told_at >= _TELL_SECONDS:
                logger.info("endpoint %s: %s (%.0f s)", self._name, status, now - start)
                told_status, told_at = status, now
            if status not in _CHANGING:
                return description
            if now - start >= seconds:
                raise LoadError(
                    f"endpoint {self._name} is still {status} after {seconds:.0f} s; the same "
                    f"command waits on, delete {self._name} gives up"
                )
            self._clock.sleep(_POLL_SECONDS)

    def delete(self, seconds: float) -> None:
        """Returns when it is gone. One that is being changed is waited for before."""
        from botocore.exceptions import ClientError

        description = self.describe()
        while description is not None and description["EndpointStatus"] != "Deleting":
            try:
                self._client.delete_endpoint(EndpointName=self._name)
                break
            except ClientError as error:
                if is_missing(error):
                    return
                if not is_changing(description):
                    raise
                logger.info("cannot be deleted yet: %s", error_message(error))
                description = self.settled(seconds)
        if self.settled(seconds) is not None:
            raise LoadError(f"endpoint {self._name} was deleted, but is there again")

    def _patiently(self, describe: Callable[[], T], start: float, seconds: float) -> T:
        while True:
            with told_as_load_errors(f"endpoint {self._name}"):
                try:
                    return describe()
                except Exception as error:
                    if not is_passing(error) or self._clock.now() - start >= seconds:
                        raise
                    logger.warning("no answer, asking again: %s", error_code(error) or error)
            self._clock.sleep(_POLL_SECONDS)


def is_changing(description: Description) -> bool:
    return description["EndpointStatus"] in _CHANGING


def config_of(description: Description) -> str:
    """The configuration that it has, or is about to have."""
    pending = description.get("PendingDeploymentSummary") or {}
    return str(pending.get("EndpointConfigName") or description.get("EndpointConfigName", ""))
