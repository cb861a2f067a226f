"""moto's AWS in this process, with what it lacks of SageMaker.

Names that are taken, statuses that change and may end in a failure, UpdateEndpoint, tags of
scalable targets, what SageMaker refuses while an endpoint changes or is scaled. And calls that
fail, or after which this process is as good as dead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.applicationautoscaling.models import applicationautoscaling_backends
from moto.logs.models import logs_backends
from moto.s3.models import s3_backends
from moto.sagemaker.models import sagemaker_backends

from handler.cli import main
from handler.deployment.aws import Clock

ACCOUNT, REGION = "123456789012", "us-east-1"
BUCKET = f"sagemaker-{REGION}-{ACCOUNT}"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/service-role/t5"
_BACKENDS = (sagemaker_backends, s3_backends, applicationautoscaling_backends, logs_backends)


class Killed(BaseException):
    """This process does nothing any more."""


@dataclass
class Outcome:
    """What becomes of an endpoint that is created or updated, after so many looks at it.

    unseen: the first looks still find what was before.
    """

    looks: int = 1
    unseen: int = 0
    status: str = "InService"
    reason: str = ""


@dataclass
class _State:
    outcome: Outcome
    changing: str
    pending: str = ""


@dataclass
class Fault:
    """When call number ``at`` (from 0) has been answered; of all, or of those that change
    something."""

    at: int
    of_changes: bool = False


class FakeClock:
    """Passes as it is slept through."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.pauses.append(seconds)

    def clock(self) -> Clock:
        return Clock(now=lambda: self.seconds, sleep=self.sleep)


@dataclass
class Aws:
    """outcomes: of the endpoints to come. refusals: (code, message) for the next calls of an
    operation. calls: what was asked for, as ``sagemaker.CreateModel``. on_call: what is done when
    an operation is called."""

    session: Any
    outcomes: list[Outcome] = field(default_factory=list)
    refusals: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    fault: Fault | None = None
    on_call: dict[str, Callable[[], None]] = field(default_factory=dict)
    buckets_owner: str = ACCOUNT
    _states: dict[str, _State] = field(default_factory=dict)
    _scaling_tags: dict[str, dict[str, str]] = field(default_factory=dict)
    _dead: bool = False
    _clients: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """An empty account, but for the default bucket."""
        for backend in _BACKENDS:
            backend.reset()
        self.outcomes, self.refusals, self.calls, self.fault = [], {}, [], None
        self._states, self._scaling_tags, self._dead = {}, {}, False
        self.on_call, self.buckets_owner = {}, ACCOUNT
        self.client("s3").create_bucket(Bucket=BUCKET)
        self.calls.clear()

    def revive(self) -> None:
        self.fault, self._dead = None, False
        self.calls.clear()

    def client(self, service: str) -> Any:
        if service not in self._clients:
            self._clients[service] = self.session.client(service)
        return self._clients[service]

    def changes(self) -> list[str]:
        """The calls that change something."""
        return [c for c in self.calls if not c.partition(".")[2].startswith(_READING)]

    def everything(self) -> set[str]:
        """All that the account has."""
        sagemaker = sagemaker_backends[ACCOUNT][REGION]
        scaling = applicationautoscaling_backends[ACCOUNT][REGION]
        s3 = s3_backends[ACCOUNT]["aws"]
        return {
            *(f"model {name}" for name in sagemaker._models),
            *(f"config {name}" for name in sagemaker.endpoint_configs),
            *(f"endpoint {name}" for name in sagemaker.endpoints),
            *(f"target {name}" for targets in scaling.targets.values() for name in targets),
            *(f"policy {p.resource_id} {p.policy_name}" for p in scaling.policies.values()),
            *(f"object {b.name}/{key}" for b in s3.buckets.values() for key in b.keys),
            *(f"upload {b.name}/{u.key_name}" for b in s3.buckets.values() for u in _uploads(b)),
        }

    def endpoint(self, name: str) -> Any:
        return sagemaker_backends[ACCOUNT][REGION].endpoints.get(name)

    # Hooks

    def before(self, model: Any, params: dict[str, Any], **_: Any) -> Any:
        name = f"{model.service_model.service_name}.{model.name}"
        if self._dead:
            raise Killed
        self.calls.append(name)
        self.on_call.get(name, lambda: None)()
        if self.refusals.get(name):
            return refused(*self.refusals[name].pop(0))
        hook = getattr(self, f"_before_{model.name}", None)
        return hook(_request(params)) if hook else None

    def after(self, model: Any, parsed: dict[str, Any], **_: Any) -> None:
        if model.name == "DescribeEndpoint" and "EndpointName" in parsed:
            self._show_status(parsed)
        if self.fault is not None:
            calls = self.changes() if self.fault.of_changes else self.calls
            self._dead |= len(calls) == self.fault.at + 1
        if self._dead:
            raise Killed

    def _show_status(self, parsed: dict[str, Any]) -> None:
        state = self._states.get(parsed["EndpointName"])
        if state is None:
            return
        if state.outcome.unseen > 0:
            state.outcome.unseen -= 1
            return
        if state.outcome.looks > 0:
            state.outcome.looks -= 1
            parsed["EndpointStatus"] = state.changing
            if state.pending:
                parsed["PendingDeploymentSummary"] = {"EndpointConfigName": state.pending}
            return
        parsed["EndpointStatus"] = state.outcome.status
        if state.outcome.reason:
            parsed["FailureReason"] = state.outcome.reason
        if state.pending and not state.outcome.reason:
            self._set_config(parsed["EndpointName"], state.pending)
            parsed["EndpointConfigName"] = state.pending
        state.pending = ""

    def _set_config(self, name: str, config: str) -> None:
        sagemaker = sagemaker_backends[ACCOUNT][REGION]
        variants = sagemaker.endpoint_configs[config].production_variants
        self.endpoint(name).endpoint_config_name = config
        self.endpoint(name).production_variants = variants

    def _next(self) -> Outcome:
        return replace(self.outcomes.pop(0) if self.outcomes else Outcome())

    def _is_changing(self, name: str) -> bool:
        return name in self._states and self._states[name].outcome.looks > 0

    def _before_HeadBucket(self, headers: Any) -> Any:
        expected = headers.get("x-amz-expected-bucket-owner", self.buckets_owner)
        return None if expected == self.buckets_owner else refused("403", "Forbidden", 403)

    def _before_CreateModel(self, request: Any) -> Any:
        taken = request["ModelName"] in sagemaker_backends[ACCOUNT][REGION]._models
        return refused(_INVALID, "Cannot create already existing model") if taken else None

    def _before_CreateEndpointConfig(self, request: Any) -> Any:
        name = request["EndpointConfigName"]
        taken = name in sagemaker_backends[ACCOUNT][REGION].endpoint_configs
        return refused(_INVALID, "Cannot create already existing config") if taken else None

    def _before_CreateEndpoint(self, request: Any) -> Any:
        name = request["EndpointName"]
        if self.endpoint(name):
            return refused(_INVALID, "Cannot create already existing endpoint")
        self._states[name] = _State(self._next(), "Creating")
        return None

    def _before_UpdateEndpoint(self, request: Any) -> Any:
        name, config = request["EndpointName"], request["EndpointConfigName"]
        if self._is_changing(name):
            return refused(_INVALID, "Cannot update in-progress endpoint")
        configs = sagemaker_backends[ACCOUNT][REGION].endpoint_configs
        types = [
            configs[each].production_variants[0]["InstanceType"]
            for each in (self.endpoint(name).endpoint_config_name, config)
        ]
        if types[0] != types[1] and any(f"endpoint/{name}/" in t for t in self.everything()):
            return refused(_INVALID, "variants with a scalable target cannot change their type")
        self._states[name] = _State(self._next(), "Updating", config)
        return answered(EndpointArn=self.endpoint(name).arn)

    def _before_DeleteEndpoint(self, request: Any) -> Any:
        name = request["EndpointName"]
        if self._is_changing(name):
            return refused(_INVALID, "Cannot update in-progress endpoint")
        if self.endpoint(name):
            self._states[name] = _State(Outcome(looks=1, status="gone"), "Deleting")
        return answered() if self.endpoint(name) else None

    def _before_DescribeEndpoint(self, request: Any) -> Any:
        name = request["EndpointName"]
        state = self._states.get(name)
        if state and state.outcome.status == "gone" and state.outcome.looks == 0:
            sagemaker_backends[ACCOUNT][REGION].delete_endpoint(name)
            del self._states[name]
        return None

    def _before_RegisterScalableTarget(self, request: Any) -> Any:
        place = request["ResourceId"]
        name = place.split("/")[1]
        if not self.endpoint(name) or self._is_changing(name):
            return refused(_INVALID, f"{place} is not in service")
        if f"target {place}" in self.everything():
            return refused(_INVALID, "tagged by TagResource") if "Tags" in request else None
        self._scaling_tags[place] = request.get("Tags", {})
        return None

    def _before_ListTagsForResource(self, request: Any) -> Any:
        scaling = applicationautoscaling_backends[ACCOUNT][REGION]
        for targets in scaling.targets.values():
            for place, target in targets.items():
                if target.arn == request["ResourceARN"]:
                    return answered(Tags=self._scaling_tags.get(place, {}))
        return refused("ResourceNotFoundException", "no such target")


_INVALID = "ValidationException"
_READING = ("Describe", "List", "Head", "Get")


def refused(code: str, message: str, status: int = 400) -> Any:
    error = {"Code": code, "Message": message}
    return SimpleNamespace(status_code=status), {
        "Error": error,
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}},
    }


def answered(**content: Any) -> Any:
    return SimpleNamespace(status_code=200), {**content, "ResponseMetadata": {"HTTPHeaders": {}}}


def _request(params: dict[str, Any]) -> Any:
    """The body, or the headers of a call without."""
    if not params.get("body"):
        return params["headers"]
    try:
        return json.loads(params["body"])
    except (ValueError, TypeError, KeyError):
        return {}


def _uploads(bucket: Any) -> list[Any]:
    return list(bucket.multiparts.values())


@contextmanager
def aws() -> Iterator[Aws]:
    with mock_aws():
        session = boto3.session.Session("key", "secret", region_name=REGION)
        found = Aws(session)
        session.events.register("before-call", found.before)
        session.events.register("after-call", found.after)
        found.reset()
        yield found


def archive_file(folder: Path, content: bytes = b"model") -> Path:
    file = folder / "model.tar.gz"
    file.write_bytes(b"\x1f\x8b" + content)
    return file


def error(arguments: list[str]) -> str:
    """What the command says when it fails, one line."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    text = str(caught.value)
    assert text.startswith("error: ")
    assert text.isprintable()
    return text
