"""A double of the `fastertransformer` wheel, for tests: the real one needs GPUs and its image.

It has the wheel's signatures and refuses what the wheel refuses, and it computes: transformers is
behind it, one row at a time, with FasterTransformer's own order of temperature, penalties and
filters. Under MPI all ranks must make the same calls; one that is missing blocks the others, as
NCCL does.

Environment: FT_DOUBLE_FORM=0.21 is the wheel without Triton; FT_DOUBLE_LOG=file takes a line of
JSON a call; FT_DOUBLE_FAIL=RANK:load or RANK:call makes a rank fail; FT_DOUBLE_GATE=path holds each
call while that file is there, and each rank that waits writes its process id to path.RANK.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._model import Network

_MODEL_TYPES = ("t5", "gpt2", "gptj", "opt", "gpt_neox", "bloom")
_INIT_OPTIONS = {"lib_path", "num_convert_process", "is_peft"}
_DEFAULTS: dict[str, Any] = {
    "inputs_embeds": None,
    "beam_width": 1,
    "max_seq_len": 200,
    "top_k": 1,
    "top_p": 0.0,
    "beam_search_diversity_rate": 0.0,
    "temperature": 1.0,
    "len_penalty": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": None,
    "min_length": 0,
    "random_seed": 0,
    "is_return_output_log_probs": False,
    "is_return_cum_log_probs": False,
    "is_return_cross_attentions": False,
    "bad_words_list": None,
    "stop_words_list": None,
}
_TRITON_INPUTS = {
    "runtime_top_k",
    "runtime_top_p",
    "beam_search_diversity_rate",
    "temperature",
    "len_penalty",
    "repetition_penalty",
    "presence_penalty",
    "min_length",
    "random_seed",
    "beam_width",
}


class T5Model:
    """The wheel's own object: token ids in, token ids out."""

    def __init__(self, model: str, tensor: int, pipeline: int, dtype: str) -> None:
        for degree in (tensor, pipeline):
            if type(degree) is not int:
                raise TypeError(f"unsupported operand for *: {type(degree).__name__} degree")
        if dtype not in ("fp32", "fp16", "bf16", "int8"):
            raise NotImplementedError(f"Not implemented for {dtype}!")
        if dtype == "int8":
            raise NotImplementedError("T5 model does not support int8 mode!")
        self.ranks = _Ranks()
        self.degree = tensor * pipeline
        self.model, self.tokenizer = model, None

    def initialize(self) -> None:
        if self.ranks.size > 1:
            assert self.ranks.size == self.degree, "world size must be tensor x pipeline"
        else:
            assert self.degree == 1, "[FATAL] MPI is required for tensor_para_size > 1."
        self.ranks.begin("load")
        self.ranks.agree("init", self.model)
        self.network = Network(self.model)

    def generate(self, input_tokens: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """ids [rows, beam_width, max_seq_len] and lengths [rows, beam_width]."""
        unknown = set(kwargs) - set(_DEFAULTS)
        if unknown:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
        p = {**_DEFAULTS, **kwargs}
        assert p["repetition_penalty"] is None or p["presence_penalty"] is None, (
            "Found ambiguous parameters repetition_penalty and presence_penalty"
        )
        assert -(2**63) <= p["random_seed"] < 2**63, "int64_t"
        ids, mask = input_tokens.input_ids.tolist(), input_tokens.attention_mask.tolist()
        prompts = [[i for i, m in zip(row, kept) if m] for row, kept in zip(ids, mask)]
        self.ranks.begin("call")
        self.ranks.agree("generate", prompts, _readable(p))
        beams, steps = p["beam_width"], p["max_seq_len"]
        out = np.full((len(prompts), beams, steps), self.network.eos, dtype=np.int32)
        lengths = np.zeros((len(prompts), beams), dtype=np.int32)
        for row, prompt in enumerate(prompts):
            for beam, found in enumerate(self.network.generate(prompt, row, p)):
                out[row, beam, : len(found)] = found
                lengths[row, beam] = len(found)
        return out, lengths

    def pipeline_generate(self, inputs: list[str], **kwargs: Any) -> list[str]:
        tokens = self.network.tokenizer(inputs, return_tensors="pt", padding=True)
        ids, lengths = self.generate(tokens, **kwargs)
        return [self.network.text(row[0][: n[0]]) for row, n in zip(ids, lengths)]


class TritonModel:
    """Triton's object: texts in, texts out; it needs no MPI for several GPUs."""

    def __init__(self, model: T5Model, do_streaming: bool) -> None:
        self._model, self._do_streaming = model, do_streaming

    def initialize(self) -> None:
        assert self._model.ranks.size == 1, "Triton starts its own processes"
        self._model.ranks.begin("load")
        self._model.ranks.agree("init", self._model.model)
        self._network = Network(self._model.model)

    def pipeline_generate(
        self, inputs: list[str], output_length: list[int], **params: Any
    ) -> list[str]:
        assert not self._do_streaming, "decoupled model: use stream_generate"
        return ["".join(pieces) for pieces in zip(*self._pieces(inputs, output_length, params))]

    def stream_generate(
        self, inputs: list[str], output_length: list[int], **params: Any
    ) -> Iterator[list[str]]:
        assert self._do_streaming, "not a decoupled model"
        assert params.get("beam_width", 1) == 1
        return self._pieces(inputs, output_length, params)

    def _pieces(
        self, inputs: list[str], output_length: list[int], params: dict[str, Any]
    ) -> Iterator[list[str]]:
        assert set(params) <= _TRITON_INPUTS, f"unknown input: {set(params) - _TRITON_INPUTS}"
        assert len(inputs) == len(output_length)
        assert None not in params.values()
        assert 0 <= params.get("random_seed", 0) < 2**64, "uint64"
        own = {name.removeprefix("runtime_"): v for name, v in params.items()}
        p = {**_DEFAULTS, "repetition_penalty": None, **own}
        self._model.ranks.begin("call")
        self._model.ranks.agree("triton", inputs, output_length, params)
        texts = []
        for text, steps in zip(inputs, output_length):
            prompt = self._network.tokenizer(text).input_ids
            found = self._network.generate(prompt, 0, {**p, "max_seq_len": steps})[0]
            texts.append([self._network.text(found[: n + 1]) for n in range(len(found))])
        for step in range(max(map(len, texts), default=0)):
            yield [_new_text(of_row, step) for of_row in texts]


def _new_text(texts: list[str], step: int) -> str:
    """What a step adds, without the half of a character that a token may end in."""
    if step >= len(texts):
        return ""
    known = 0 if step == 0 else len(texts[step - 1].rstrip("\ufffd"))
    now = texts[step] if step == len(texts) - 1 else texts[step].rstrip("\ufffd")
    return now[known:]


class _Ranks:
    """The processes of the job; alone without mpirun."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
        self.size = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))
        if self.size > 1:
            import torch.distributed as dist

            job = os.environ["PMIX_NAMESPACE"].replace("/", "_")
            place = Path(tempfile.gettempdir(), f"fastertransformer-double-{job}")
            dist.init_process_group(
                "gloo", init_method=f"file://{place}", rank=self.rank, world_size=self.size
            )

    def begin(self, what: str) -> None:
        if os.environ.get("FT_DOUBLE_FAIL") == f"{self.rank}:{what}":
            raise RuntimeError(f"CUDA error: an illegal memory access in {what}")
        gate = os.environ.get("FT_DOUBLE_GATE")
        if gate and what == "call" and Path(gate).exists():
            Path(f"{gate}.{self.rank}.new").write_text(str(os.getpid()))
            Path(f"{gate}.{self.rank}.new").rename(f"{gate}.{self.rank}")
            while Path(gate).exists():
                time.sleep(0.02)

    def agree(self, name: str, *arguments: Any) -> None:
        """Every rank makes this call, or none returns."""
        call = json.dumps([name, *arguments])
        log = os.environ.get("FT_DOUBLE_LOG")
        if log:
            with open(log, "a") as file:
                file.write(json.dumps({"rank": self.rank, "call": [name, *arguments]}) + "\n")
        if self.size == 1:
            return
        import torch.distributed as dist

        calls: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(calls, call)
        except RuntimeError:  # a rank is gone: NCCL would wait for it for ever
            while True:
                time.sleep(3600)
        assert calls == [call] * self.size, f"the ranks made different calls: {calls}"


def _readable(p: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in p.items() if v is not None}


def _load(model: str, tensor: int, pipeline: int, dtype: str, options: dict[str, Any]) -> T5Model:
    from transformers import AutoConfig

    unknown = set(options) - _INIT_OPTIONS
    if unknown:
        raise TypeError(f"__init__() got an unexpected keyword argument {min(unknown)!r}")
    model_type = AutoConfig.from_pretrained(model).model_type
    if model_type not in _MODEL_TYPES:
        raise ValueError(f"{model_type} type not supported for model {model}")
    assert model_type == "t5", "the double has T5 only"
    return T5Model(model, tensor, pipeline, dtype)


def _init_inference_021(
    model: str,
    tensor_parallel_degree: int,
    pipeline_parallel_degree: int,
    dtype: str = "fp32",
    **kwargs: Any,
) -> T5Model:
    loaded = _load(model, tensor_parallel_degree, pipeline_parallel_degree, dtype, kwargs)
    loaded.initialize()
    return loaded


def _init_inference_023(
    model: str,
    tensor_parallel_degree: int,
    pipeline_parallel_degree: int,
    dtype: str = "fp32",
    use_triton: bool | None = None,
    do_streaming: bool = False,
    **kwargs: Any,
) -> T5Model | TritonModel:
    loaded: Any = _load(model, tensor_parallel_degree, pipeline_parallel_degree, dtype, kwargs)
    if use_triton:
        loaded = TritonModel(loaded, do_streaming)
    loaded.initialize()
    return loaded


init_inference = (
    _init_inference_021 if os.environ.get("FT_DOUBLE_FORM") == "0.21" else _init_inference_023
)
