"""Loading for hf_generate: a model on its devices, its token rules, its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.checkpoints.architecture import T5_FAMILY, T5Architecture
from handler.checkpoints.find import find_adapter
from handler.config import Configuration
from handler.engines.hf_weights import (
    checked_files,
    merge_adapter,
    refuse_numbers_that_are_none,
    refuse_what_transformers_passed_over,
)
from handler.errors import LoadError
from handler.tokenizer import Tokenizer, TokenizerBase, load_tokenizer

if TYPE_CHECKING:
    import torch

# Part of a GPU's free memory that weights may take; the rest is for caches and activations.
_WEIGHTS_SHARE = 0.8

# What a checkpoint's generation_config.json may say: which tokens, never how to search.
_KEPT_OF_GENERATION_CONFIG = """
    bos_token_id pad_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    bad_words_ids suppress_tokens begin_suppress_tokens
""".split()
_LONGEST_REASON = 300


class TransformersTokenizer(TokenizerBase):
    """A tokenizer that only transformers can read (Marian, M2M100, ...). See Tokenizer."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        try:
            self._library = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
            self.eos_token_id = int(self._library.eos_token_id)
            self.pad_token_id = int(self._library.pad_token_id)
        except Exception as error:  # each tokenizer class fails in its own way
            raise LoadError(
                f"{folder} holds no tokenizer that transformers can read "
                f"({_reason(error)}); add its files or change option.model_id"
            ) from error
        self.size = len(self._library)
        self.unk_token_id = self._library.unk_token_id

    def encode(self, text: str) -> list[int]:
        return list(self._library(text).input_ids)

    def encode_target(self, text: str) -> list[int]:
        return list(self._library(text_target=text).input_ids)

    def encode_plain(self, text: str) -> list[int]:
        return list(self._library(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def token(self, token_id: int) -> str:
        return str(self._library.convert_ids_to_tokens(token_id))


def refuse_unsupported(c: Configuration) -> None:
    if c.dtype in ("int8", "int4"):
        raise LoadError(
            f"option.dtype={c.dtype} is not supported by backend transformers, allowed are auto, "
            "fp32, fp16 and bf16"
        )
    if c.pipeline_parallel_degree > 1:
        raise LoadError(
            f"option.pipeline_parallel_degree={c.pipeline_parallel_degree} is not supported by "
            "backend transformers, allowed is 1; set option.tensor_parallel_degree to the number "
            "of GPUs that the layers may be spread over"
        )
    if c.cpu_kernel != "auto":
        raise LoadError(
            f"option.cpu_kernel={c.cpu_kernel} is not supported by backend transformers, allowed "
            "is auto"
        )


def load_model(folder: Path, config: dict[str, Any], c: Configuration, on_gpu: bool) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    _refuse_other_models(folder, config, c.trust_remote_code)
    devices = _devices(c, on_gpu)
    files = checked_files(folder, config)
    adapter = find_adapter(c)
    arguments: dict[str, Any] = {
        _dtype_argument(): _torch_dtype(c.dtype, on_gpu),
        "trust_remote_code": c.trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below, in one line
    }
    if len(devices) == 1 and on_gpu and files.stored_bytes > _free_memory(devices):
        devices = list(range(torch.cuda.device_count()))
    if len(devices) > 1:
        arguments["device_map"] = "auto"
        arguments["max_memory"] = {i: int(_free_memory([i])) for i in devices}
    try:
        with _without_chatter():
            model, told = AutoModelForSeq2SeqLM.from_pretrained(folder, **arguments)
    except Exception as error:  # torch, safetensors, pickle: each has errors of its own
        raise LoadError(
            f"{folder} cannot be loaded by transformers ({_reason(error)}); complete its files or "
            "change option.model_id"
        ) from error
    refuse_what_transformers_passed_over(files, config, told)
    if len(devices) == 1 and on_gpu:
        model = model.to(f"cuda:{devices[0]}")
    refuse_numbers_that_are_none(model, files)
    if adapter is not None:
        merge_adapter(model, files, adapter, config)
    if (
        config["model_type"] == "umt5"
    ):  # transformers 5 scales its logits, whatever config.json says
        model.config.tie_word_embeddings = T5Architecture.from_config(config).scale_logits
    return model.eval()


def _refuse_other_models(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    import transformers
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config["model_type"] in known or (trust_remote_code and "auto_map" in config):
        return
    raise LoadError(
        f"{folder} is of model type {config['model_type']}, which is no sequence-to-sequence model "
        f"of transformers {transformers.__version__}; change option.model_id"
    )


def token_rules(model: Any, tokenizer: Tokenizer) -> Any:
    """A GenerationConfig of the tokens that must or must not be chosen, and nothing else."""
    from transformers import GenerationConfig

    own = model.generation_config
    rules = {name: getattr(own, name, None) for name in _KEPT_OF_GENERATION_CONFIG}
    # ids that stand for no token: T5's vocabulary is padded from 32100 to 32128
    padding = range(tokenizer.size, model.config.vocab_size)
    suppressed = [*(rules["suppress_tokens"] or ()), *padding]
    return GenerationConfig(
        **{**rules, "suppress_tokens": suppressed or None, "eos_token_id": tokenizer.eos_token_id}
    )


def _reason(error: Exception) -> str:
    """The beginning of what a library says: some list every class they know."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _dtype_argument() -> str:
    """What from_pretrained calls the dtype: since 4.56 ``dtype``."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """No progress bar in a server's log, and no advice on tied weights that is wrong for T5."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        library.enable_progress_bar()


def _devices(c: Configuration, on_gpu: bool) -> list[int]:
    """GPUs to use; one entry stands for the CPU, too."""
    import torch

    if not on_gpu:
        if c.tensor_parallel_degree not in (1, "max"):
            raise LoadError(
                f"option.tensor_parallel_degree={c.tensor_parallel_degree} needs as many GPUs, "
                "there is none; allowed here is 1"
            )
        return [0]
    count = torch.cuda.device_count()
    if c.tensor_parallel_degree == "max":
        return list(range(count))
    degree = int(c.tensor_parallel_degree)
    if degree > count:
        raise LoadError(
            f"option.tensor_parallel_degree={degree} needs as many GPUs, there are {count}"
        )
    return list(range(degree)) if degree > 1 else [max(c.device_id or 0, 0)]


def _free_memory(devices: list[int]) -> float:
    """Bytes of these GPUs that weights may take."""
    import torch

    return _WEIGHTS_SHARE * sum(torch.cuda.mem_get_info(i)[0] for i in devices)


def _torch_dtype(dtype: str, on_gpu: bool) -> torch.dtype:
    import torch

    if dtype == "fp16" and not on_gpu:
        raise LoadError("option.dtype=fp16 needs a GPU; allowed on a CPU are fp32 and bf16")
    if dtype == "auto":
        if not on_gpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def load_any_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Tokenizer:
    try:
        return load_tokenizer(folder, int(config.get("vocab_size", 0)))
    except LoadError:
        if config["model_type"] in T5_FAMILY:
            raise
        return TransformersTokenizer(folder, trust_remote_code)
