"""The log of a process that DJLServing did not start."""

from __future__ import annotations

import logging


def start_log(quiet: bool = False) -> None:
    """Our own log and warnings to stderr."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    for chatty in ("botocore", "httpx", "huggingface_hub", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
