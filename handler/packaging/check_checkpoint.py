"""The checkpoint: what the engines refuse when they load it, found the way they find it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from handler.checkpoints.architecture import T5_FAMILY, T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.lora import MergedWeights
from handler.checkpoints.partitioned import check_content, check_partition, read_partition
from handler.checkpoints.read import MODEL_WEIGHTS, CheckpointWeights
from handler.checkpoints.tensors import check_tensors
from handler.errors import LoadError
from handler.packaging.findings import (
    SERVED_FROM,
    Finding,
    Subject,
    error,
    folder_inside,
    warning,
)
from handler.tokenizer import load_tokenizer

# Vocabularies are padded by at most so many ids: T5's by 28, umT5's by 84.
_MOST_PADDING = 512


def config(s: Subject) -> Iterator[Finding]:
    if s.checkpoint is None:
        return
    if not (s.checkpoint / "config.json").is_file():
        yield error(
            "missing-config",
            "the archive has no config.json beside its weights; add the checkpoint's own, or set "
            "option.model_id to where the model is",
        )
        return
    try:
        told = model_config(s.checkpoint)
        if told["model_type"] in T5_FAMILY:
            T5Architecture.from_config(told)
    except LoadError as problem:
        yield error("damaged-config", s.relative(problem))


def weights(s: Subject) -> Iterator[Finding]:
    """Headers first, then every number: nothing else finds damage that keeps a file's length."""
    if s.checkpoint is None or s.config is None or _is_partitioned(s):
        return
    try:
        stored = CheckpointWeights(s.checkpoint)
    except LoadError as problem:
        is_index = "is damaged" in str(problem)
        yield error("damaged-index" if is_index else "missing-weights", s.relative(problem))
        return
    is_torch = stored.paths[0].suffix == ".bin"
    damaged = "damaged-bin" if is_torch else "damaged-safetensors"
    if is_torch and s.image is not None and s.image.torch is None:
        yield error(
            "bin-without-torch",
            f"{stored.paths[0].name} is read by torch, which image {s.image.name} lacks; save the "
            "checkpoint as safetensors",
        )
        return
    try:
        list(stored)
    except LoadError as problem:
        missing = is_torch and "not installed" in str(problem)
        if missing and s.image is not None:  # which has it
            yield warning(
                "bin-without-torch",
                f"{stored.paths[0].name} was not checked: torch, which image {s.image.name} has, "
                "is not installed here",
            )
        else:
            yield error("bin-without-torch" if missing else damaged, s.relative(problem))
        return
    try:
        a = s.architecture
        if a is not None:
            check_tensors(stored, a)
    except LoadError as problem:
        yield error("wrong-tensors", s.relative(problem))
        return
    try:
        for name in stored:
            stored.get(name, stored.shape(name))
    except LoadError as problem:
        wrong = "not-finite" if "NaN or infinity" in str(problem) else damaged
        yield error(wrong, s.relative(problem))


def weights_twice(s: Subject) -> Iterator[Finding]:
    if s.checkpoint is None:
        return
    names = {file.name for file in s.checkpoint.iterdir()}
    safe, other = MODEL_WEIGHTS
    if names & {safe, f"{safe}.index.json"} and names & {other, f"{other}.index.json"}:
        yield warning(
            "weights-twice",
            f"{other} beside safetensors is never read, and downloaded at every start; remove it",
        )


def tokenizer(s: Subject) -> Iterator[Finding]:
    a = s.architecture
    if s.checkpoint is None or a is None:
        return
    try:
        found = load_tokenizer(s.checkpoint, a.vocab_size)
    except LoadError as problem:
        absent = "has no tokenizer" in str(problem)
        yield error("missing-tokenizer" if absent else "damaged-tokenizer", s.relative(problem))
        return
    if found.size > a.vocab_size:
        yield error(
            "wrong-tokenizer",
            f"the tokenizer has {found.size} tokens, config.json vocab_size={a.vocab_size}: some "
            "have no embedding; add the checkpoint's own tokenizer",
        )
    elif a.vocab_size - found.size > _MOST_PADDING:
        yield warning(
            "wrong-tokenizer",
            f"the tokenizer has {found.size} tokens, config.json vocab_size={a.vocab_size}, which "
            "is more than padding; is it the checkpoint's own?",
        )
    eos = (s.config or {}).get("eos_token_id", found.eos_token_id)
    if eos != found.eos_token_id:
        yield warning(
            "wrong-tokenizer",
            f"config.json has eos_token_id={eos}, the tokenizer's </s> is {found.eos_token_id}: "
            "texts would not end where the model ends them; add the checkpoint's own tokenizer",
        )


def partition(s: Subject) -> Iterator[Finding]:
    c = s.configuration
    if s.checkpoint is None or c is None:
        return
    try:
        told = read_partition(s.checkpoint)
        if told is None:
            return
        check_partition(replace(told, model_path=None), s.checkpoint, c)
        check_content(told, s.checkpoint)
    except LoadError as problem:
        yield error("partition-mismatch", s.relative(problem))
        return
    inside = s.checkpoint.relative_to(s.folder).as_posix()
    place = SERVED_FROM if inside == "." else f"{SERVED_FROM}/{inside}"
    if told.model_path not in (None, place):
        yield error(
            "partition-mismatch",
            f"the folder was partitioned to be served from {told.model_path}, it will be {place}, "
            f"where FasterTransformer deletes it; partition with --model-path-on-host {place}",
        )


def adapter(s: Subject) -> Iterator[Finding]:
    c = s.configuration
    if c is None or c.merge_adapter is None or s.checkpoint is None or _is_partitioned(s):
        return
    try:
        place = folder_inside(s.folder, "merge_adapter", c.merge_adapter)
    except LoadError as problem:
        yield error("adapter-unusable", problem)
        return
    if place is None:
        return
    if not (place / "adapter_config.json").is_file():
        yield error("adapter-unusable", f"{s.relative(place)} has no adapter_config.json; add it")
        return
    try:
        base = CheckpointWeights(s.checkpoint)
        list(base)
    except LoadError:  # told by weights
        return
    tied = (s.config or {}).get("tie_word_embeddings") is not False
    try:
        result = MergedWeights(base, place, tied=tied)
        for name in result.changed:
            result.get(name, result.shape(name))
    except LoadError as problem:
        yield error("adapter-unusable", s.relative(problem))


def _is_partitioned(s: Subject) -> bool:
    return s.checkpoint is not None and (s.checkpoint / "partition.json").is_file()


CHECKS = (config, weights, weights_twice, tokenizer, partition, adapter)
