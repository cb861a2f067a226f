"""AWS's services for this package: clients made when they are needed, their errors in one line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from handler.errors import LoadError

# Of one HTTP request: botocore waits longer each time, and lets throttled calls wait, too.
_ATTEMPTS = 5
_REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")


@dataclass(frozen=True)
class Clock:
    """What waits, so that tests need not."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Services:
    """boto3's clients of one region, each made at its first use."""

    def __init__(self, region: str) -> None:
        self.region = region
        self._session = new_session(region)
        self._clients: dict[str, Any] = {}

    def __getitem__(self, service: str) -> Any:
        """The client of a service as boto3 names it: ``sagemaker``, ``s3``, ``logs`` ..."""
        if service not in self._clients:
            from botocore.config import Config

            retries = {"total_max_attempts": _ATTEMPTS, "mode": "standard"}
            config = Config(retries=retries, connect_timeout=20, read_timeout=60)
            self._clients[service] = self._session.client(service, config=config)
        return self._clients[service]


def new_session(region: str | None) -> Any:
    """A boto3 session. Raises LoadError where boto3 is not installed."""
    try:
        import boto3
    except ImportError as error:
        raise LoadError(
            "working with SageMaker needs the package boto3: pip install boto3 (in a checkout "
            "'.[sagemaker]')"
        ) from error
    with told_as_load_errors():
        return boto3.session.Session(region_name=region)


def find_region(given: str | None) -> str:
    """``given``, or what the environment or the profile of the AWS configuration says.

    Raises LoadError without any.
    """
    named = given or next(
        (os.environ[name] for name in _REGION_VARIABLES if name in os.environ), ""
    )
    region: str | None = named or new_session(None).region_name
    if not region:
        raise LoadError("no region: give --region, as us-east-1, or set AWS_REGION")
    return region


def role_of_notebook(services: Services, name: str) -> str:
    """Of a notebook instance. Raises LoadError."""
    with told_as_load_errors(f"role of the notebook {name}"):
        answer = services["sagemaker"].describe_notebook_instance(NotebookInstanceName=name)
    return str(answer["RoleArn"])


def error_code(error: Exception) -> str:
    """S3's, SageMaker's ... code of a refused call; "" for another exception."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def error_message(error: Exception) -> str:
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Message", "")) or str(error)


def is_missing(error: Exception) -> bool:
    """Whether a call was refused since what it names is not there."""
    code, message = error_code(error), error_message(error)
    return code in _MISSING or (code == "ValidationException" and "ould not find" in message)


_MISSING = (
    *("ResourceNotFound", "ResourceNotFoundException", "ObjectNotFoundException"),
    *("NoSuchKey", "NoSuchBucket", "NoSuchUpload", "404"),
)
_THROTTLED = (
    *("ThrottlingException", "Throttling", "TooManyRequestsException"),
    *("RequestLimitExceeded", "SlowDown"),
)
_CREDENTIALS = (
    *("ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "InvalidToken"),
    *("UnrecognizedClientException", "SignatureDoesNotMatch", "InvalidAccessKeyId"),
)
_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403")


def is_passing(error: Exception) -> bool:
    """Whether the same call may well be answered in a while: throttled, or nobody answered."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in _THROTTLED or status >= 500
    return isinstance(error, (ConnectionError, HTTPClientError))


@contextmanager
def told_as_load_errors(what: str = "") -> Iterator[None]:
    """Makes LoadErrors of boto3's exceptions: what failed, and what to do about it."""
    try:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:  # there are no such exceptions then
        yield
        return
    try:
        yield
    except ClientError as error:
        prefix = f"{what}: " if what else ""
        raise LoadError(f"{prefix}{_advice(error)}") from error
    except (BotoCoreError, Boto3Error) as error:
        prefix = f"{what}: " if what else ""
        raise LoadError(f"{prefix}{advice_without_answer(error)}") from error


def _advice(error: Any) -> str:
    code, message = error_code(error), error_message(error)
    operation = f"{error.operation_name}: {message or code}"
    if code in _DENIED:
        return f"no permission for {operation}; let your IAM identity do it"
    if code in _THROTTLED:
        return f"AWS takes no more calls now ({operation}); run the same command again in a minute"
    if code in _CREDENTIALS:
        return f"the AWS credentials are not accepted ({operation}); renew them"
    return f"{operation} ({code})"


def advice_without_answer(error: Exception) -> str:
    """What botocore says where no service answered, and what to do about it."""
    name = type(error).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return f"{error}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if name in ("EndpointConnectionError", "ConnectTimeoutError"):
        return f"{error}; is --region (or --endpoint-url) right, and the network there?"
    return f"{error} ({name})"
