"""What a batch's answers depend on besides its input: they are not gone on with under others."""

from __future__ import annotations

import hashlib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from handler import __version__
from handler.batch.lines import LineForm
from handler.checkpoints.find import find_adapter, find_checkpoint
from handler.checkpoints.selection import ADAPTER, CHECKPOINT, Selection
from handler.config import Configuration
from handler.engines import choose_backend

# Where the model lies, which its digest stands for, and what changes the speed alone.
_WITHOUT_EFFECT = frozenset(
    """
    backend model_id revision s3url merge_adapter model_dir cache_dir threads max_rows max_queue
    encoder_cache request_timeout log_prompts save_mp_checkpoint_path model_path_on_host
    enable_streaming trust_remote_code strict_dtype
    """.split()
)
_ENDS = 1 << 20  # bytes of a weight file's beginning and end; training changes all of it


def settings_of(c: Configuration, form: LineForm) -> dict[str, Any]:
    """name, as a person set it -> value. Finds, and so downloads, the checkpoint. Raises
    LoadError."""
    adapter, checkpoint = find_adapter(c), find_checkpoint(c)
    backend, _ = choose_backend(c, checkpoint)
    return {
        "the version of this handler": __version__,
        "the engine": backend,
        "the checkpoint": _digest(checkpoint, CHECKPOINT),
        "option.merge_adapter": adapter and _digest(adapter, ADAPTER),
        "--parameters": dict(form.parameters),
        "--input-field": form.input_field,
        "--output-field": form.output_field,
        **{
            f"option.{f.name}": getattr(c, f.name)
            for f in fields(c)
            if f.name not in _WITHOUT_EFFECT
        },
    }


def _digest(folder: Path, selection: Selection) -> str:
    """By the files' names, sizes, beginnings and ends."""
    sha = hashlib.sha256()
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    for name in selection.chosen(names):
        with (folder / name).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            sha.update(f"{name} {size} ".encode())
            sha.update(stream.read(_ENDS))
            stream.seek(max(0, size - _ENDS))
            sha.update(stream.read(_ENDS))
    return sha.hexdigest()
