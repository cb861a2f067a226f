"""What the containers of an endpoint wrote, from CloudWatch."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from handler.deployment.aws import Clock, Services, is_missing, is_passing, told_as_load_errors
from handler.errors import LoadError, shown

logger = logging.getLogger(__name__)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FOLLOW_SECONDS = 2.0
_NEWEST = 10  # streams that are looked at for the last lines, and how many are read
_STREAMS = 3
# Lines may come that much later than younger ones of another instance.
_LATE_MS = 30_000


def group(name: str) -> str:
    return f"/aws/sagemaker/Endpoints/{name}"


def parsed_age(text: str) -> int:
    """Seconds of ``30s``, ``10m``, ``2h``, ``1d``. Raises LoadError."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise LoadError(f"--since must be a number and s, m, h or d, as 10m, got {shown(text)}")
    return int(match[1]) * _SECONDS[match[2]]


def lines(services: Services, name: str, since_ms: int) -> Iterator[str]:
    """From ``since_ms`` after 1970, oldest first. Raises LoadError."""
    with told_as_load_errors(f"log of {name}"):
        for event in _events(services, name, since_ms):
            yield _line(event)


def follow(services: Services, name: str, since_ms: int, clock: Clock) -> Iterator[str]:
    """The same without end. A log that is not there yet is waited for."""
    seen: dict[str, int] = {}
    told = False
    while True:
        with told_as_load_errors(f"log of {name}"):
            try:
                for event in _events(services, name, since_ms):
                    if event["eventId"] not in seen:
                        seen[event["eventId"]] = event["timestamp"]
                        yield _line(event)
            except LoadError as error:
                if not told:
                    logger.info("%s; waiting for it", error)
                told = True
            except Exception as error:
                if not is_passing(error):
                    raise
                logger.warning("no answer, asking again: %s", error)
        since_ms = max([since_ms, *(at - _LATE_MS for at in seen.values())])
        seen = {event: at for event, at in seen.items() if at >= since_ms}
        clock.sleep(_FOLLOW_SECONDS)


def last_lines(services: Services, name: str, since_ms: int, count: int) -> list[str]:
    """The last of them, oldest first, of a few instances together: of those that started since.

    Never an error: it is asked for when something else went wrong, which is to be told.
    """
    try:
        streams = services["logs"].describe_log_streams(
            logGroupName=group(name), orderBy="LastEventTime", descending=True, limit=_NEWEST
        )["logStreams"]
        # in an update, those that served before go on writing
        new = [each for each in streams if each.get("firstEventTimestamp", 0) >= since_ms]
        events = []
        for stream in (new or streams)[:_STREAMS]:
            answer = services["logs"].get_log_events(
                logGroupName=group(name),
                logStreamName=stream["logStreamName"],
                startTime=since_ms,
                limit=count,
                startFromHead=False,
            )
            events += [
                {**event, "logStreamName": stream["logStreamName"]} for event in answer["events"]
            ]
    except Exception as error:
        if is_missing(error):
            return ["(nothing: the container has not started)"]
        return [f"(cannot be read: {error})"]
    events.sort(key=lambda event: event["timestamp"])
    return [_line(event) for event in events[-count:]] or ["(nothing)"]


def _events(services: Services, name: str, since_ms: int) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import ClientError

    pages = (
        services["logs"]
        .get_paginator("filter_log_events")
        .paginate(logGroupName=group(name), startTime=since_ms)
    )
    try:
        for page in pages:
            yield from page["events"]
    except ClientError as error:
        if not is_missing(error):
            raise
        raise LoadError(
            f"endpoint {name} has no log {group(name)} in {services.region}: no container of it "
            "has started, or its name or region is another"
        ) from error


def _line(event: dict[str, Any]) -> str:
    """Time in UTC, the instance, what was written; without what would move the cursor."""
    at = datetime.fromtimestamp(event["timestamp"] / 1000, timezone.utc)
    stream = event["logStreamName"].partition("/")[2] or event["logStreamName"]
    text = "".join(c if c.isprintable() or c == "\t" else "?" for c in event["message"].rstrip())
    return f"{at:%Y-%m-%d %H:%M:%S} {stream} {text}"
