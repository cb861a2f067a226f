"""logs: what the containers wrote, in CloudWatch as moto has it."""

from __future__ import annotations

import time

import pytest
from sagemaker_double import REGION, Aws, FakeClock, error

from handler.cli import main
from handler.deployment.aws import Services
from handler.deployment.container_log import follow, last_lines, parsed_age
from handler.errors import LoadError

pytest_plugins = ["sagemaker_fixtures"]

GROUP = "/aws/sagemaker/Endpoints/t5"
LOGS = ["logs", "t5", "--region", REGION]


@pytest.fixture
def now() -> int:
    return int(time.time() * 1000)


@pytest.fixture
def group(cloud: Aws) -> str:
    cloud.client("logs").create_log_group(logGroupName=GROUP)
    return GROUP


def write(cloud: Aws, stream: str, at: int, *messages: str) -> None:
    logs = cloud.client("logs")
    if not logs.describe_log_streams(logGroupName=GROUP, logStreamNamePrefix=stream)["logStreams"]:
        logs.create_log_stream(logGroupName=GROUP, logStreamName=stream)
    events = [{"timestamp": at + n, "message": message} for n, message in enumerate(messages)]
    logs.put_log_events(logGroupName=GROUP, logStreamName=stream, logEvents=events)


def test_lines_of_all_instances_by_time(
    cloud: Aws, group: str, now: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(cloud, "AllTraffic/i-1", now - 5000, "one", "three\n")
    write(cloud, "AllTraffic/i-2", now - 4999, "a \x1b[31m b")
    write(cloud, "AllTraffic/i-2", now - 3_600_000, "long ago")
    main(LOGS)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" ", 2)[2] for line in lines) == [
        *("i-1 one", "i-1 three", "i-2 a ?[31m b"),
    ]
    assert all(line.startswith(time.strftime("20%y-%m-", time.gmtime())) for line in lines)
    main([*LOGS, "--since", "2h"])
    assert "i-2 long ago" in capsys.readouterr().out


def test_follows(cloud: Aws, group: str, now: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """New lines once each, also late ones; throttling is passed over."""
    write(cloud, "AllTraffic/i-1", now, "one")
    clock = FakeClock()
    steps = iter(
        [
            lambda: write(cloud, "AllTraffic/i-1", now + 10, "two"),
            lambda: cloud.refusals.update({"logs.FilterLogEvents": [("Throttling", "slow")]}),
            lambda: write(cloud, "AllTraffic/i-2", now + 5, "late"),
        ]
    )

    def sleep(seconds: float) -> None:
        next(steps)()

    clock.sleep = sleep  # type: ignore[method-assign]
    lines = follow(Services(REGION), "t5", now - 1000, clock.clock())
    assert [next(lines).rpartition(" ")[2] for _ in range(3)] == ["one", "two", "late"]
    with pytest.raises((StopIteration, RuntimeError)):  # no more lines, no more steps
        next(lines)


def test_a_log_that_is_not_there_yet_is_followed(
    cloud: Aws, now: int, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()

    def start(seconds: float) -> None:
        if clock.pauses:
            cloud.client("logs").create_log_group(logGroupName=GROUP)
            write(cloud, "AllTraffic/i-1", now, "hello")
        clock.pauses.append(seconds)

    clock.sleep = start  # type: ignore[method-assign]
    with caplog.at_level("INFO"):
        assert next(follow(Services(REGION), "t5", now, clock.clock())).endswith(" hello")
    assert caplog.text.count("waiting for it") == 1


def test_an_endpoint_without_log(cloud: Aws) -> None:
    assert f"endpoint t5 has no log {GROUP} in {REGION}: no container" in error(LOGS)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200)])
def test_ages(text: str, seconds: int) -> None:
    assert parsed_age(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "1w", "1.5h"])
def test_other_ages(text: str) -> None:
    with pytest.raises(LoadError, match="--since must be a number and s, m, h or d, as 10m"):
        parsed_age(text)


def test_the_last_lines_of_the_instances_that_started_since(
    cloud: Aws, group: str, now: int
) -> None:
    write(cloud, "AllTraffic/i-0", now - 9000, "before")
    write(cloud, "AllTraffic/i-0", now + 60, "it goes on")
    write(cloud, "AllTraffic/i-1", now + 1, *(f"line{n}" for n in range(30)))
    write(cloud, "AllTraffic/i-2", now + 50, "other")
    lines = last_lines(Services(REGION), "t5", now, 4)
    assert [line.rpartition(" ")[2] for line in lines] == ["line27", "line28", "line29", "other"]
    assert last_lines(Services(REGION), "t5", now + 55, 4)[0].endswith("it goes on")
    assert last_lines(Services(REGION), "t5", now + 10_000, 4) == ["(nothing)"]


def test_the_last_lines_are_never_an_error(cloud: Aws, group: str) -> None:
    cloud.refusals = {"logs.DescribeLogStreams": [("AccessDeniedException", "not you")]}
    (line,) = last_lines(Services(REGION), "t5", 0, 4)
    assert line.startswith("(cannot be read: ")
    assert "not you" in line
