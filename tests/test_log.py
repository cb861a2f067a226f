"""The log of a process of ours."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import logging, sys
from handler.log import start_log
start_log(quiet=sys.argv[1] == "quiet")
logging.getLogger("handler").info("loaded")
logging.getLogger("httpx").info("GET")
logging.getLogger("handler").warning("careful")
"""


def lines(how: str) -> list[str]:
    ran = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True)
    return [line.split(" ", 2)[2] for line in ran.stderr.splitlines()]


def test_ours_goes_to_stderr_and_chatter_of_libraries_does_not() -> None:
    assert lines("full") == ["INFO handler loaded", "WARNING handler careful"]
    assert lines("quiet") == ["WARNING handler careful"]
