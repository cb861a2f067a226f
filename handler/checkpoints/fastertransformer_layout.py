"""The checkpoint that the fastertransformer wheel reads: ``<N>-gpu/`` of raw arrays and config.ini.

The wheel converts a checkpoint itself at every first load, in minutes and with all of it in memory;
where it finds this folder, with a ``verify`` that it agrees with, it does not. Source: NVIDIA's
huggingface_t5_ckpt_convert.py (FasterTransformer 5.3) and the wheel's own names.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.read import Array, Weights
from handler.checkpoints.splits import Split, Tensor, chunks, to_fp16
from handler.errors import LoadError

DTYPES = ("fp32", "fp16", "bf16")

# transformers' activation -> FasterTransformer's, whose gelu is the tanh one
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "silu": "silu"}
# FasterTransformer's own: config.ini cannot tell another.
_MAX_DISTANCE, _EPSILON = 128, 1e-6
# Sizes of a head that its masked attention has a kernel for (decoder_masked_multihead_attention.cu)
_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 256)
# config.ini has it by a longer name.
_RENAMED = "relative_attention_num_buckets"


def check(a: T5Architecture, dtype: str) -> None:
    """Raises LoadError where FasterTransformer could not compute this model."""
    if a.model_type != "t5":
        raise LoadError(
            f"config.json: model_type {a.model_type} is not served by FasterTransformer, only t5 "
            "is; partition with --format native"
        )
    if dtype not in DTYPES:
        raise LoadError(
            f"dtype={dtype} is not served by FasterTransformer for T5, allowed: {', '.join(DTYPES)}"
        )
    reason = other_network(a)
    if reason is not None:
        raise LoadError(f"{reason}; partition with --format native")


def other_network(a: T5Architecture) -> str | None:
    """What in config.json FasterTransformer's T5 cannot compute, or would pass over; or None."""
    for key, value, served in (
        ("relative_attention_max_distance", a.max_distance, (_MAX_DISTANCE,)),
        ("layer_norm_epsilon", a.epsilon, (_EPSILON,)),
        ("feed_forward_proj", a.activation, tuple(_ACTIVATIONS)),
        ("d_kv", a.d_kv, _HEAD_SIZES),
    ):
        if value not in served:
            return (
                f"config.json: {key} is {value}, FasterTransformer computes with "
                f"{', '.join(map(str, served))} only"
            )
    return None


def check_stages(a: T5Architecture, pipeline_parallel: int) -> None:
    """Raises LoadError where the pipeline's stages would not have equally many layers."""
    for key, layers in (
        ("num_layers", a.num_layers),
        ("num_decoder_layers", a.num_decoder_layers),
    ):
        if layers % pipeline_parallel:
            raise LoadError(
                f"pipeline_parallel_degree={pipeline_parallel}: config.json's {key} {layers} is "
                f"not divisible by {pipeline_parallel}; choose a degree that divides it"
            )


def folder_name(tensor_parallel: int, pipeline_parallel: int) -> str:
    return f"{tensor_parallel * pipeline_parallel}-gpu"


def write(
    folder: Path,
    tensors: Sequence[Tensor],
    a: T5Architecture,
    config: Mapping[str, Any],
    weights: Weights,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    dtype: str,
    model_path: str,
) -> Iterator[str]:
    """Write the folder's content, yielding each tensor's name when it is done.

    model_path: what the wheel will be told as ``model`` where it loads this. Every pipeline stage
    reads its own layers of the same files.
    """
    stored = "fp16" if dtype == "fp16" else "fp32"  # the wheel makes bf16 of fp32
    writer = _Writer(folder, weights, tensor_parallel, stored)
    for tensor in tensors:
        writer.write(tensor)
        yield tensor.name
    ini = _config_ini(a, config, stored, model_path)
    with (folder / "config.ini").open("w", encoding="ascii") as stream:
        ini.write(stream)
    verify = f"{model_path}-{stored}-{tensor_parallel}-{pipeline_parallel}"
    # last, and without a newline: the wheel compares the line as it is
    (folder / "verify").write_text(verify, encoding="utf-8")


class _Writer:
    """Files of one tensor each: ``<name>.bin``, or ``<name>.<rank>.bin`` of what is split."""

    def __init__(self, folder: Path, weights: Weights, degree: int, stored: str) -> None:
        self._folder, self._weights = folder, weights
        self._degree, self._stored = degree, stored

    def write(self, tensor: Tensor) -> None:
        if tensor.name.startswith("decoder.") and ".SelfAttention." in tensor.name:
            place, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
            if kind in "qkv":
                if kind == "q":
                    self._fused(place, tensor)
                return
        array = self._read(tensor)
        if tensor.split is Split.VOCABULARY:  # lm_head: [vocabulary, d_model], not transposed
            self._file(f"{tensor.name}.bin", array)
        elif tensor.split is Split.WHOLE:
            # the embedding [vocabulary, d_model] both ways; norms [d_model]
            self._file(f"{tensor.name}.bin", array.T)
            if array.ndim == 2:
                self._file(f"{tensor.name}_T.bin", array)
        else:
            # rows [out / N, in] -> [in, out / N]; columns [out, in / N] -> [in / N, out];
            # heads [buckets, heads / N] -> [heads / N, buckets]
            name = tensor.name.replace(".wi_0.", ".wi.").replace(".wi_1.", ".wi2.")
            for rank in range(self._degree):
                self._file(f"{name}.{rank}.bin", array[tensor.part(rank, self._degree)].T)

    def _fused(self, place: str, q: Tensor) -> None:
        """q, k, v [inner, d_model] of a decoder's self-attention -> [d_model, 3, inner / N]"""
        qkv = [self._weights.get(f"{place}.{name}.weight", q.shape) for name in "qkv"]
        for rank in range(self._degree):
            parts = [array[q.part(rank, self._degree)].T for array in qkv]
            with (self._folder / f"{place}.qkv.weight.{rank}.bin").open("wb") as stream:
                for rows in chunks(parts[0].shape):
                    stacked = np.stack([part[rows] for part in parts], axis=1)
                    stream.write(self._converted(stacked, f"{place}.qkv").data)

    def _read(self, tensor: Tensor) -> Array:
        return self._weights.get(tensor.source, tensor.shape)

    def _file(self, name: str, array: Array) -> None:
        with (self._folder / name).open("wb") as stream:
            for rows in chunks(array.shape):
                stream.write(self._converted(array[rows], name).data)

    def _converted(self, array: Array, name: str) -> npt.NDArray[Any]:
        if self._stored == "fp16":
            return np.ascontiguousarray(to_fp16(array, name))
        return np.ascontiguousarray(array, "<f4")


def _config_ini(
    a: T5Architecture, config: Mapping[str, Any], stored: str, model_path: str
) -> configparser.ConfigParser:
    """Each stack's configuration as text, as the converter writes transformers' own.

    config: of config.json, for whatever else it tells. What the loaders read is written from the
    architecture, whether config.json has it or leaves it to a default.
    """
    gated = "gated-" if a.gated else ""
    known: dict[str, Any] = {
        "_name_or_path": model_path,
        "model_type": a.model_type,
        "vocab_size": a.vocab_size,
        "d_model": a.d_model,
        "d_kv": a.d_kv,
        "d_ff": a.d_ff,
        "num_decoder_layers": a.num_decoder_layers,
        "num_heads": a.num_heads,
        "feed_forward_proj": gated + _ACTIVATIONS[a.activation],
        "dense_act_fn": a.activation,
        "is_gated_act": a.gated,
        f"{_RENAMED}_or_max_pos_seq_len": a.num_buckets,
        "relative_attention_max_distance": a.max_distance,
        "layer_norm_epsilon": a.epsilon,
        "pad_token_id": config.get("pad_token_id", 0),
        "eos_token_id": config.get("eos_token_id", 1),
        "decoder_start_token_id": a.decoder_start_token_id,
        # what the flag meant when the checkpoint was trained: the loader scales the output by it
        "tie_word_embeddings": a.scale_logits,
        "weight_data_type": stored,
    }
    ini = configparser.ConfigParser(interpolation=None)
    for section, layers in (("encoder", a.num_layers), ("decoder", a.num_decoder_layers)):
        own = {
            "num_layers": layers,
            "is_decoder": section == "decoder",
            "is_encoder_decoder": False,
        }
        numbers = {k: v for k, v in config.items() if isinstance(v, (bool, int, float))}
        numbers.pop(_RENAMED, None)
        ini[section] = {k: str(v) for k, v in {**numbers, **known, **own}.items()}
    ini["structure"] = {
        "t5_with_bias": "false",
        "use_gated_activation": "1" if a.gated else "false",
        "position_embedding_type": "relative",
    }
    return ini
