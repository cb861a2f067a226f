"""What no tag in AWS can tell: into which buckets ``deploy`` has uploaded for an endpoint.

Written before the upload, so that ``delete`` finds the archive however early a deploy was cut off.
Everything else that deploy makes carries a tag from its first moment.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)


class UploadRecord:
    """The file of one endpoint, of an account and region."""

    def __init__(self, account: str, region: str, name: str) -> None:
        folder = _folder()
        self._file = folder / "deployments" / account / region / f"{name}.json" if folder else None

    def buckets(self) -> list[str]:
        """Empty where nothing was recorded on this machine, or the record cannot be read."""
        if self._file is None:
            return []
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            return [str(bucket) for bucket in stored["buckets"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read: %s; name the bucket by --bucket", self._file, error)
            return []

    def add(self, bucket: str) -> None:
        """On disk when this returns; only a warning where it cannot be."""
        buckets = self.buckets()
        if self._file is None or bucket in buckets:
            return
        partial = self._file.with_suffix(f".{os.getpid()}.partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as stream:
                json.dump({"buckets": [*buckets, bucket]}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self._file)
        except OSError as error:
            logger.warning(
                "cannot be recorded: %s; should this be cut off, delete with --bucket %s",
                error,
                bucket,
            )

    def forget(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _folder() -> Path | None:
    """None: a user without a home."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return Path(state) / "djl-t5-handler"
