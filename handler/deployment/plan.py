"""What a deployment is, and the calls that make it: pure data, nothing here talks to AWS."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handler.packaging.instances import InstanceType

# On everything that deploy makes; its value is the endpoint's name.
TAG = "djl-t5-handler:endpoint"
# The same on an object in S3: metadata, which needs no permission of its own as tags do.
METADATA = "djl-t5-handler-endpoint"
KEY_PREFIX = "djl-t5-handler"

LONGEST_NAME = 63
_DIGEST = 12  # hex digits in names

GB = 10**9
# SageMaker's bounds
TIMEOUTS = range(60, 3601)
VOLUMES = range(1, 513)


@dataclass(frozen=True)
class Archive:
    """A model.tar.gz: ``size`` in bytes, ``sha256`` of its content in hex digits."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Autoscale:
    """From ``least`` to ``most`` instances, so many that each has ``target`` requests at a time."""

    least: int
    most: int
    target: float


@dataclass(frozen=True)
class Call:
    """One call of boto3: the client's name, its method, the arguments."""

    service: str
    operation: str
    request: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "service": self.service,
            "operation": self.operation,
            "request": dict(self.request),
        }


@dataclass(frozen=True)
class Deployment:
    """One endpoint with one variant, as ``deploy`` is told.

    instance_types: the first that has capacity is taken. volume_size in GB, the timeouts in
    seconds; None: chosen from the archive's size. inference_ami: of the host, None for SageMaker's
    own choice.
    """

    name: str
    region: str
    role: str
    bucket: str
    archive: Archive
    image: str
    instance_types: tuple[InstanceType, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    variant: str = "AllTraffic"
    volume_size: int | None = None
    download_timeout: int | None = None
    startup_timeout: int | None = None
    inference_ami: str | None = None
    autoscale: Autoscale | None = None
    # ends the autoscaling that an earlier deploy set up
    fixed_size: bool = False

    @property
    def seconds_to_download(self) -> int:
        return self.download_timeout or download_timeout(self.archive.size)

    @property
    def seconds_to_start(self) -> int:
        return self.startup_timeout or startup_timeout(self.archive.size)

    @property
    def seconds_to_wait(self) -> int:
        """Until the endpoint must be in service: half an hour for the instances themselves."""
        return self.seconds_to_download + self.seconds_to_start + 1800

    # Names

    @property
    def key(self) -> str:
        return f"{KEY_PREFIX}/{self.name}/{self.archive.sha256[:16]}/model.tar.gz"

    @property
    def model_name(self) -> str:
        return f"{name_prefix(self.name)}{_digest(self._model())}"

    def config_name(self, instance: InstanceType) -> str:
        """Another for every other content, so that the same deployment finds its own again.

        But for the first number of instances, which autoscaling changes anyway.
        """
        content = {k: v for k, v in self._variant(instance).items() if k != "InitialInstanceCount"}
        return f"{name_prefix(self.name)}{_digest(content)}"

    # Calls

    def calls(self, *, update: bool = False) -> Iterator[Call]:
        """In their order, for the first instance type; only those that change something."""
        yield self.upload()
        yield self.create_model()
        yield from self.endpoint_calls(self.instance_types[0], update=update)

    def endpoint_calls(self, instance: InstanceType, *, update: bool = False) -> Iterator[Call]:
        yield self.create_config(instance)
        yield self.update_endpoint(instance) if update else self.create_endpoint(instance)

    def upload(self) -> Call:
        metadata = {METADATA: self.name, "sha256": self.archive.sha256}
        request = {
            "Filename": str(self.archive.path),
            "Bucket": self.bucket,
            "Key": self.key,
            "ExtraArgs": {"Metadata": metadata},
        }
        return Call("s3", "upload_file", request)

    def create_model(self) -> Call:
        request = {"ModelName": self.model_name, **self._model(), "Tags": tags(self.name)}
        return Call("sagemaker", "create_model", request)

    def create_config(self, instance: InstanceType) -> Call:
        request = {
            "EndpointConfigName": self.config_name(instance),
            "ProductionVariants": [self._variant(instance)],
            "Tags": tags(self.name),
        }
        return Call("sagemaker", "create_endpoint_config", request)

    def create_endpoint(self, instance: InstanceType) -> Call:
        request = {
            "EndpointName": self.name,
            "EndpointConfigName": self.config_name(instance),
            "Tags": tags(self.name),
        }
        return Call("sagemaker", "create_endpoint", request)

    def update_endpoint(self, instance: InstanceType, *, keep_instances: bool = True) -> Call:
        """keep_instances: as many as run now, not as many as a new endpoint has."""
        request = {
            "EndpointName": self.name,
            "EndpointConfigName": self.config_name(instance),
            "RetainAllVariantProperties": keep_instances,
        }
        return Call("sagemaker", "update_endpoint", request)

    def _model(self) -> dict[str, Any]:
        container = {
            "Image": self.image,
            "ModelDataUrl": f"s3://{self.bucket}/{self.key}",
            "Environment": dict(self.environment),
        }
        return {"PrimaryContainer": container, "ExecutionRoleArn": self.role}

    def _variant(self, instance: InstanceType) -> dict[str, Any]:
        size = self.archive.size
        variant: dict[str, Any] = {
            "VariantName": self.variant,
            "ModelName": self.model_name,
            "InstanceType": instance.name,
            "InitialInstanceCount": self.autoscale.least if self.autoscale else 1,
            "InitialVariantWeight": 1.0,
            "ModelDataDownloadTimeoutInSeconds": self.seconds_to_download,
            "ContainerStartupHealthCheckTimeoutInSeconds": self.seconds_to_start,
            # Requests differ in length: the next goes where the fewest are in flight.
            "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        }
        if instance.local_disk is None:  # SageMaker refuses it for the others
            variant["VolumeSizeInGB"] = self.volume_size or volume_size(size)
        if self.inference_ami and instance.gpus:
            variant["InferenceAmiVersion"] = self.inference_ami
        return variant


def tags(name: str) -> list[dict[str, str]]:
    return [{"Key": TAG, "Value": name}]


def name_prefix(name: str) -> str:
    """How the names of an endpoint's models and configs begin; several endpoints may share one."""
    return f"{name[: LONGEST_NAME - _DIGEST - 1].rstrip('-')}-"


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]


# Bounds from the archive's size, generous rather than tight: one that is too short costs the whole
# deployment, one that is too long only the wait for an error.


def download_timeout(size: int) -> int:
    """Seconds to download and unpack ``size`` bytes of archive: 5 minutes, 1 more for each GB."""
    return min(300 + 60 * math.ceil(size / GB), TIMEOUTS[-1])


def startup_timeout(size: int) -> int:
    """Seconds until the container must answer /ping: 25 minutes, 1 more for each GB.

    Above serving.properties' option.model_loading_timeout of 20 minutes, so that it is DJLServing
    that gives up first, and says in its log why.
    """
    return min(1500 + 60 * math.ceil(size / GB), TIMEOUTS[-1])


def volume_size(size: int) -> int:
    """GB of a volume: the archive and what is unpacked of it, the graphs made of that, 20 more."""
    return min(20 + 4 * math.ceil(size / GB), VOLUMES[-1])
