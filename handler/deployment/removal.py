"""Takes away what ``deploy`` made for an endpoint, all of it and nothing else."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from handler.deployment import autoscaling
from handler.deployment.aws import Clock, Services, error_code, is_missing
from handler.deployment.aws import told_as_load_errors as told
from handler.deployment.endpoint import Endpoint, is_tagged, or_none
from handler.deployment.plan import KEY_PREFIX, METADATA, name_prefix
from handler.deployment.runner import default_bucket
from handler.deployment.state import UploadRecord

logger = logging.getLogger(__name__)

# SageMaker itself gives an endpoint up after 1 hour; while it is created it cannot be deleted.
_LONGEST_WAIT = 2 * 3600
_KEY = re.compile(r"[0-9a-f]{16}/model\.tar\.gz")  # see Deployment.key


class Object(NamedTuple):
    bucket: str
    key: str


class Upload(NamedTuple):
    """One that was cut off: its parts are kept, and paid for, until it is aborted."""

    bucket: str
    key: str
    upload_id: str


@dataclass
class Belongings:
    """What deploy made for the endpoint ``name``. foreign: what has its name, but is not ours."""

    name: str
    endpoint: str | None = None
    targets: list[autoscaling.Target] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    objects: list[Object] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def described(self) -> list[str]:
        """A line for each."""
        return [
            *(f"autoscaling of {target['ResourceId']}" for target in self.targets),
            *([f"endpoint {self.endpoint}"] if self.endpoint else []),
            *(f"endpoint configuration {config}" for config in self.configs),
            *(f"model {model}" for model in self.models),
            *(f"s3://{each.bucket}/{each.key}" for each in self.objects),
            *(f"unfinished upload to s3://{each.bucket}/{each.key}" for each in self.uploads),
        ]


class Remover:
    """Finds and deletes. bucket: where to look for archives besides the places that are known."""

    def __init__(
        self, services: Services, name: str, bucket: str | None = None, clock: Clock | None = None
    ) -> None:
        self._services = services
        self._sagemaker = services["sagemaker"]
        self._name = name
        self._bucket = bucket
        self._endpoint = Endpoint(services, name, clock or Clock())
        with told():
            self._account = services["sts"].get_caller_identity()["Account"]
        self._record = UploadRecord(self._account, services.region, name)

    def find(self) -> Belongings:
        """Raises LoadError."""
        found = Belongings(self._name)
        with told():
            description = self._endpoint.describe()
            if description is not None:
                if self._endpoint.is_ours(description):
                    found.endpoint = self._name
                else:
                    found.foreign.append(f"endpoint {self._name}")
            for target in autoscaling.targets(self._services, self._name):
                if autoscaling.is_ours(self._services, target, self._name):
                    found.targets.append(target)
            found.configs = list(
                self._tagged("list_endpoint_configs", "EndpointConfigs", "EndpointConfig")
            )
            found.models = list(self._tagged("list_models", "Models", "Model"))
            for bucket in self._buckets(found.models):
                self._look_into(bucket, found)
        return found

    def remove(self, found: Belongings) -> None:
        """In an order in which what is left is found again, wherever this is cut off.

        Models tell the bucket of their archives, so they go after these. Raises LoadError.
        """
        sagemaker, s3 = self._sagemaker, self._services["s3"]
        with told():
            for target in found.targets:
                autoscaling.remove(self._services, target)
            if found.endpoint:
                logger.info("deleting endpoint %s", found.endpoint)
                self._endpoint.delete(_LONGEST_WAIT)
            for each in found.uploads:
                _if_there(
                    s3.abort_multipart_upload,
                    Bucket=each.bucket,
                    Key=each.key,
                    UploadId=each.upload_id,
                )
            for place in found.objects:
                s3.delete_object(Bucket=place.bucket, Key=place.key)
            for config in found.configs:
                _if_there(sagemaker.delete_endpoint_config, EndpointConfigName=config)
            for model in found.models:
                _if_there(sagemaker.delete_model, ModelName=model)
        self._record.forget()

    def _tagged(self, operation: str, list_: str, kind: str) -> Iterator[str]:
        """Names of what carries the endpoint's tag."""
        prefix = name_prefix(self._name)
        pages = self._sagemaker.get_paginator(operation).paginate(NameContains=prefix)
        for page in pages:
            for entry in page[list_]:
                name = entry[f"{kind}Name"]
                if name.startswith(prefix) and is_tagged(
                    self._services, entry[f"{kind}Arn"], self._name
                ):
                    yield name

    def _buckets(self, models: list[str]) -> Iterator[str]:
        """Where deploy may have uploaded to, each once."""
        told_by_models = [
            self._sagemaker.describe_model(ModelName=model)["PrimaryContainer"]["ModelDataUrl"]
            for model in models
        ]
        yield from dict.fromkeys(
            [
                *([self._bucket] if self._bucket else []),
                *(url.removeprefix("s3://").partition("/")[0] for url in told_by_models),
                *self._record.buckets(),
                default_bucket(self._services.region, self._account),
            ]
        )

    def _look_into(self, bucket: str, found: Belongings) -> None:
        from botocore.exceptions import ClientError

        s3, prefix = self._services["s3"], f"{KEY_PREFIX}/{self._name}/"
        default = default_bucket(self._services.region, self._account)
        try:
            for entry in _entries(s3, "list_objects_v2", "Contents", bucket, prefix):
                place = Object(bucket, entry["Key"])
                if self._is_ours(place):
                    found.objects.append(place)
                else:
                    found.foreign.append(f"s3://{bucket}/{place.key}")
            for entry in _entries(s3, "list_multipart_uploads", "Uploads", bucket, prefix):
                # what is not finished has no metadata yet
                if not _KEY.fullmatch(entry["Key"][len(prefix) :]):
                    continue
                found.uploads.append(Upload(bucket, entry["Key"], entry["UploadId"]))
        except ClientError as error:
            if is_missing(error) and bucket != self._bucket:
                logger.debug("there is no bucket %s any more", bucket)
                return
            known = bucket == self._bucket or bucket in self._record.buckets()
            refused = error_code(error) in ("AccessDenied", "403")
            if known or bucket != default or not refused:
                raise
            logger.debug("the default bucket %s is not to be read", bucket)

    def _is_ours(self, place: Object) -> bool:
        head: Any = or_none(
            lambda: self._services["s3"].head_object(Bucket=place.bucket, Key=place.key)
        )
        return head is not None and head["Metadata"].get(METADATA) == self._name


def _if_there(call: Callable[..., Any], **request: str) -> None:
    or_none(lambda: call(**request))


def _entries(
    s3: Any, operation: str, list_: str, bucket: str, prefix: str
) -> Iterator[dict[str, Any]]:
    for page in s3.get_paginator(operation).paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get(list_, ())
