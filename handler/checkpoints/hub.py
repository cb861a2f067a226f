"""Downloads from the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from handler.checkpoints.selection import Selection
from handler.errors import LoadError

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST_REASON = 300


def is_hub_id(text: str) -> bool:
    return not text.startswith(("/", ".", "~")) and bool(_ID.fullmatch(text))


def download(
    hub_id: str, selection: Selection, *, option: str, revision: str | None, cache_dir: str | None
) -> Path:
    """The folder with the selection's files, from the cache as far as they are there.

    option: the property to name in errors. The token is huggingface_hub's own: HF_TOKEN, or what
    ``hf auth login`` stored. Raises LoadError.
    """
    place = f"option.{option}={hub_id}" + (f" at revision {revision}" if revision else "")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise LoadError(
            f"{place} is no folder, and downloading it needs the package huggingface_hub: {error}"
        ) from error
    logger.info("downloading %s", place)

    def snapshot(form: str) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=selection.wanted(form),
                ignore_patterns=selection.unwanted(form),
            )
        )

    best, other = selection.weights
    try:
        folder = snapshot(best)
        if selection.form([file.name for file in folder.iterdir()]) != best:
            folder = snapshot(other)
    except Exception as error:  # of the hub, of the name, of its HTTP client (which one changes)
        raise LoadError(f"{place} is no folder and could not be downloaded: {_why(error)}") from (
            error
        )
    return folder


def download_file(hub_id: str, name: str, *, revision: str | None, cache_dir: str | None) -> Path:
    """One file of a model on the hub. Raises LoadError."""
    place = f"{hub_id} is no folder, and {name} of it on the hub"
    try:
        from huggingface_hub import snapshot_download  # hf_hub_download tries for 25 s offline

        folder = snapshot_download(
            hub_id, revision=revision, cache_dir=cache_dir, allow_patterns=[name]
        )
    except Exception as error:
        raise LoadError(f"{place} could not be downloaded: {_why(error)}") from error
    if not (Path(folder) / name).is_file():
        raise LoadError(f"{place} could not be downloaded: the model has no such file")
    return Path(folder) / name


_KNOWN_REASONS = (
    # by name: where the classes are imported from depends on the library's version; the first is a
    # kind of the last
    (
        "GatedRepoError",
        "it is gated; accept its terms on its page and set HF_TOKEN to a token of that account",
    ),
    ("RevisionNotFoundError", "the hub has no such revision; change option.revision"),
    (
        "RepositoryNotFoundError",
        "the hub has no such model, or hides it; correct the name or set HF_TOKEN to its token",
    ),
)


def _why(error: BaseException) -> str:
    """What to do about it, where that is known; else what the library says."""
    found: BaseException | None = error
    while found is not None:  # the library wraps the reason in "not in the cache either"
        kinds = {kind.__name__ for kind in type(found).__mro__}
        for kind, advice in _KNOWN_REASONS:
            if kind in kinds:
                return advice
        found = found.__cause__
    return " ".join(str(error).split())[:_LONGEST_REASON]
