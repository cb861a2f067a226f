"""What talks to S3: the s5cmd program, which is the faster one, or boto3."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# Where DJLServing's images have it, older ones not on PATH.
_S5CMD_OF_DJL = "/opt/djl/bin/s5cmd"
_ENDPOINT_VARIABLES = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_RETRIES = 5  # of one HTTP request, by the tool itself
_POLL_SECONDS = 0.2
_LONGEST_REASON = 300


class S3Object(NamedTuple):
    """name: relative to the prefix that was listed; size in bytes."""

    name: str
    size: int
    etag: str


class S3Details(NamedTuple):
    """What a listing does not tell: whether the ETag is made of the content (it is not under
    SSE-KMS and SSE-C), and the first part's size in bytes where that is known."""

    etag_is_md5: bool
    part_size: int | None


class S3Failure(Exception):
    """One line; ``final``: trying again cannot help; ``unreachable``: nobody answered."""

    def __init__(self, reason: str, *, final: bool = False, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.final = final
        self.unreachable = unreachable


@dataclass(frozen=True)
class S3Place:
    """prefix: "" or ending in a slash."""

    bucket: str
    prefix: str


class S3Tool(Protocol):
    """Raises S3Failure."""

    def listing(self, place: S3Place) -> list[S3Object]:
        """The objects right below the prefix."""

    def details(self, place: S3Place, name: str) -> S3Details: ...

    def fetch(
        self, place: S3Place, names: Sequence[str], folder: Path, stalled: Callable[[], bool]
    ) -> None:
        """Write the objects into the folder, each under its name when it is complete."""


def find_tool() -> S3Tool | None:
    s5cmd = _s5cmd_program()
    if s5cmd is not None:
        return S5cmd(s5cmd)
    return Boto3() if importlib.util.find_spec("boto3") else None


def endpoint() -> str | None:
    """The S3 service that the environment names instead of AWS's."""
    return next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), None)


def _s5cmd_program() -> str | None:
    return shutil.which("s5cmd") or shutil.which(_S5CMD_OF_DJL)


_WORDS: Mapping[str, tuple[str, bool]] = {
    # error code -> what it means, whether trying again is in vain
    "NoSuchBucket": ("there is no such bucket", True),
    "NoSuchKey": ("there is no such key", True),
    "no object found": ("there is no such key", True),
    "AccessDenied": ("no permission", True),
    "AllAccessDisabled": ("no permission", True),
    "InvalidAccessKeyId": ("the access key is not known", True),
    "SignatureDoesNotMatch": ("the secret key is wrong", True),
    "ExpiredToken": ("the credentials have expired", True),
    "InvalidToken": ("the session token is wrong", True),
    "NoCredentialProviders": ("there are no credentials", True),
    "NoCredentialsError": ("there are no credentials", True),
    "no space left on device": ("the disk is full", True),
    # statuses, where S3 sends no code, as for HEAD; last, since s5cmd adds the status to every code
    "404": ("there is no such key", True),
    "403": ("no permission", True),
}
_UNREACHABLE = re.compile(
    "connection refused|no such host|send request failed|EndpointConnectionError|ConnectTimeout|"
    "ProxyConnectionError|i/o timeout"
)


def _failure(code: str, text: str, what: str = "") -> S3Failure:
    """code: S3's own, or "" to look for one in the text. what: it was about; not looked at."""
    reason = " ".join(f"{what}{text}".split())[:_LONGEST_REASON]
    # First, since such a text has the address, which may hold anything. Credentials are looked for
    # at an address, too.
    if _UNREACHABLE.search(f"{code} {text}") and "NoCredentialProviders" not in text:
        where = endpoint() or "AWS"
        return S3Failure(f"the endpoint {where} cannot be reached ({reason})", unreachable=True)
    for known, (words, final) in _WORDS.items():
        told = f"status code: {known}" if known.isdigit() else known
        if code == known or (not code and told in text):
            return S3Failure(f"{words} ({reason})", final=final)
    return S3Failure(reason or code)


class S5cmd:
    """See S3Tool."""

    def __init__(self, program: str) -> None:
        at = ["--endpoint-url", str(endpoint())] if endpoint() else []
        self._command = [program, "--json", "--retry-count", str(_RETRIES), *at]

    def listing(self, place: S3Place) -> list[S3Object]:
        listed = self._run("ls", f"s3://{place.bucket}/{place.prefix}")
        start = len(f"s3://{place.bucket}/{place.prefix}")
        return [
            S3Object(entry["key"][start:], int(entry.get("size", 0)), entry["etag"].strip('"'))
            for entry in listed
            if entry["type"] == "file" and len(entry["key"]) > start
        ]

    def details(self, place: S3Place, name: str) -> S3Details:
        if importlib.util.find_spec("boto3"):  # s5cmd cannot ask for a part
            return Boto3().details(place, name)
        (head,) = self._run("head", f"s3://{place.bucket}/{place.prefix}{name}")
        encryption = str(head.get("server_side_encryption", ""))
        return S3Details(not encryption.startswith("aws:kms"), None)

    def fetch(
        self, place: S3Place, names: Sequence[str], folder: Path, stalled: Callable[[], bool]
    ) -> None:
        commands = "".join(
            f"cp --raw {shlex.quote(f's3://{place.bucket}/{place.prefix}{name}')} "
            f"{shlex.quote(str(folder / name))}\n"
            for name in names
        )
        with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as input_:
            input_.write(commands)
            input_.seek(0)
            # a session of its own: PyPI's s5cmd is a script, whose child is to end with it
            process = subprocess.Popen(
                [*self._command, "run"],
                stdin=input_,
                stdout=subprocess.DEVNULL,
                stderr=told,
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    if stalled():
                        raise S3Failure("no data arrived for a while")
                    _wait(process)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            told.seek(0)
            if process.returncode != 0:
                raise _s5cmd_failure(told.read())

    def _run(self, *arguments: str) -> list[dict[str, Any]]:
        ended = subprocess.run(
            [*self._command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if ended.returncode != 0:
            raise _s5cmd_failure(ended.stderr)
        return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        pass


def _s5cmd_failure(told: str) -> S3Failure:
    """Of the last line that tells an error, with the command that had it."""
    for line in reversed(told.splitlines()):
        try:
            entry = json.loads(line)
            return _failure("", str(entry["error"]), f"{entry.get('command', 's5cmd')}: ")
        except (ValueError, KeyError, TypeError):
            continue
    return _failure("", told or "s5cmd ended without a word")


class Boto3:
    """See S3Tool."""

    def __init__(self) -> None:
        import boto3
        from botocore.config import Config

        settings = Config(
            retries={"max_attempts": _RETRIES, "mode": "standard"},
            connect_timeout=20,
            read_timeout=60,
        )
        with _boto3_failures():
            # a session of its own: the shared one keeps credentials that have changed
            session = boto3.session.Session()
            self._client = session.client("s3", endpoint_url=endpoint(), config=settings)

    def listing(self, place: S3Place) -> list[S3Object]:
        with _boto3_failures(f"bucket {place.bucket}: "):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=place.bucket, Prefix=place.prefix, Delimiter="/"
            )
            return [
                S3Object(entry["Key"][len(place.prefix) :], entry["Size"], entry["ETag"].strip('"'))
                for page in pages
                for entry in page.get("Contents", ())
                if len(entry["Key"]) > len(place.prefix)
            ]

    def details(self, place: S3Place, name: str) -> S3Details:
        with _boto3_failures(f"key {place.prefix}{name}: "):
            head = self._client.head_object(
                Bucket=place.bucket, Key=place.prefix + name, PartNumber=1
            )
        encryption = str(head.get("ServerSideEncryption", ""))
        by_customer = "SSECustomerAlgorithm" in head
        return S3Details(
            not by_customer and not encryption.startswith("aws:kms"), head["ContentLength"]
        )

    def fetch(
        self, place: S3Place, names: Sequence[str], folder: Path, stalled: Callable[[], bool]
    ) -> None:
        for name in names:  # its parts in parallel; a stalled one ends by read_timeout
            with _boto3_failures(f"key {place.prefix}{name}: "):
                self._client.download_file(place.bucket, place.prefix + name, str(folder / name))


@contextmanager
def _boto3_failures(what: str = "") -> Iterator[None]:
    """Makes S3Failures of boto3's exceptions."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        raise _failure(code, str(error), what) from error
    except (BotoCoreError, Boto3Error) as error:
        raise _failure(type(error).__name__, str(error), what) from error
    except OSError as error:  # of the disk
        raise S3Failure(f"{what}{error}", final=True) from error
