"""The archive on its way into S3: read, checked, uploaded unless the same bytes are there."""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path
from typing import Any

from handler.deployment.aws import Services, error_code, is_missing, told_as_load_errors
from handler.deployment.plan import Archive, Deployment
from handler.errors import LoadError

logger = logging.getLogger(__name__)

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 22
_PART = 32 << 20  # bytes; boto3 makes them larger where there would be more than 10,000
_AT_A_TIME = 10
_LOG_PERCENT = 10


def read_archive(path: Path) -> Archive:
    """Raises LoadError where it is no gzipped file."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            if stream.read(2) != _GZIP:
                raise LoadError(f"{path} is not a .tar.gz: make it with python -m handler package")
            stream.seek(0)
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}") from error
    return Archive(path, size, digest.hexdigest())


def check_bucket(services: Services, bucket: str, owner: str | None) -> None:
    """That the bucket is there, in the endpoint's region, and may be used. Raises LoadError.

    owner: the account that it must belong to; somebody else may have taken the name of the default
    bucket.
    """
    from botocore.exceptions import ClientError

    told = {"ExpectedBucketOwner": owner} if owner else {}
    with told_as_load_errors(f"bucket {bucket}"):
        try:
            answer = services["s3"].head_bucket(Bucket=bucket, **told)
        except ClientError as error:
            if is_missing(error):
                raise LoadError(
                    f"there is no bucket {bucket}: aws s3 mb s3://{bucket} --region "
                    f"{services.region} makes it, --bucket names another"
                ) from error
            if error_code(error) == "403":
                raise LoadError(
                    f"bucket {bucket} is not yours, or your IAM identity may not use it; "
                    "--bucket names another"
                ) from error
            region = _region(error.response)
            if region is None:
                raise
        else:
            region = answer.get("BucketRegion") or _region(answer)
    if region not in (None, services.region):
        raise LoadError(
            f"bucket {bucket} is in {region}, but the endpoint in {services.region}, and SageMaker "
            "takes models from its own region only: change --bucket or --region"
        )


def upload(services: Services, deployment: Deployment) -> None:
    """Raises LoadError, also when the file has changed since it was read."""
    if _is_there(services, deployment):
        logger.info("s3://%s/%s is there already", deployment.bucket, deployment.key)
        return
    from boto3.s3.transfer import TransferConfig

    archive = deployment.archive
    config = TransferConfig(
        multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=_AT_A_TIME
    )
    logger.info("uploading %.1f MB to s3://%s/%s", archive.size / 1e6, *_place(deployment))
    request = dict(deployment.upload().request)
    with _Progress(archive.size) as progress, told_as_load_errors(f"upload of {archive.path}"):
        services["s3"].upload_file(**request, Callback=progress, Config=config)
    if read_archive(archive.path) != archive:
        services["s3"].delete_object(Bucket=deployment.bucket, Key=deployment.key)
        raise LoadError(f"{archive.path} was changed during the upload: deploy it again")


def _is_there(services: Services, deployment: Deployment) -> bool:
    from botocore.exceptions import ClientError

    with told_as_load_errors(f"bucket {deployment.bucket}"):
        try:
            head = services["s3"].head_object(Bucket=deployment.bucket, Key=deployment.key)
        except ClientError as error:
            # without the permission to list a bucket, S3 answers 403 for what is not there
            if is_missing(error) or error_code(error) == "403":
                return False
            raise
    archive = deployment.archive
    there = (head["ContentLength"], head["Metadata"].get("sha256"))
    return there == (archive.size, archive.sha256)


def _place(deployment: Deployment) -> tuple[str, str]:
    return deployment.bucket, deployment.key


def _region(response: Any) -> str | None:
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region: str | None = headers.get("x-amz-bucket-region")
    return region


class _Progress:
    """A bar on a terminal, else a line in the log for each tenth. Called by boto3's threads."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._total = total
        self._done = 0
        self._told = 0
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._bar.update(count)
            percent = 100 * self._done // max(self._total, 1)
            if self._bar.disable and percent >= self._told + _LOG_PERCENT:
                self._told = percent
                logger.info("uploaded %d %%", percent)
