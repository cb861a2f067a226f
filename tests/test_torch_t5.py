"""The engine in PyTorch: its number formats, what it refuses, and what fits into memory.

What every engine of single steps must do is in test_step_engines.py; kernels and ranks have files
of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from random_checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from step_engines import assert_equal, encoded, open_engine, random_ids, start, stepped

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.find import model_config
from handler.checkpoints.partition import partition
from handler.config import configuration_of
from handler.engines import init_inference
from handler.engines.protocol import StepEngine
from handler.engines.torch_t5 import part as part_module
from handler.engines.torch_t5.kv_cache import EncodedPrompt, RowCache
from handler.engines.torch_t5.part import load_part
from handler.errors import LoadError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import parse_parameters

PROMPTS = ["Count from 3 to 9.", "x", "What is the plural of mouse?", "a b c d e f g"]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def checkpoint(tmp_path: Path, demo: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", "flan-t5", demo)


@pytest.fixture(scope="module")
def engine(oracle_of: Callable[[str], Oracle]) -> StepEngine:
    return open_engine("torch", oracle_of("flan-t5").folder)


def answers(checkpoint: Path, **options: Any) -> list[GenerationResult]:
    """Load, answer, close."""
    model = init_inference(str(checkpoint), backend="torch", threads=1, **options)
    parameters = parse_parameters({"max_new_tokens": 16})
    results = model.generate([GenerationRequest(prompt, parameters) for prompt in PROMPTS])
    model.close()
    return results


# Number formats


def _with_loud_feed_forwards(folder: Path) -> None:
    """What wo reads is beyond 65504, as in T5 1.1's large models; what it makes is not."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        for end, power in (("wi_0.weight", 3), ("wi_1.weight", 13), ("wo.weight", -15)):
            if name.endswith(end):
                tensor *= 2.0**power
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_fp16_where_what_wo_reads_leaves_its_range(checkpoint: Path) -> None:
    _with_loud_feed_forwards(checkpoint)
    plain = Oracle(checkpoint, torch.float16)
    read: list[torch.Tensor] = []
    for module in plain.model.modules():
        if hasattr(module, "wo"):
            module.wo.register_forward_hook(
                lambda _, inputs, __: read.append(inputs[0].abs().max())
            )
    exact = answers(checkpoint, dtype="fp32")
    plain.logits(PROMPTS[0], exact[0].token_ids)
    assert max(read) == torch.inf, "plain fp16 would do"
    for half, full in zip(answers(checkpoint, dtype="fp16"), exact):
        assert half.token_ids == full.token_ids
        assert half.log_probs == pytest.approx(full.log_probs, abs=0.03)


@pytest.mark.parametrize("dtype", ["fp32", *HALVES, "int8"])
@pytest.mark.parametrize("variant", ["flan-t5", "t5-v1.0", "umt5"])
def test_a_partitioned_folder_answers_as_its_checkpoint(
    tmp_path: Path, demo: Path, variant: str, dtype: str
) -> None:
    source = write_checkpoint(tmp_path / "source", variant, demo)
    if dtype in HALVES:  # of which a partitioned folder has norms and biases, too
        weights = load_torch_file(source / "model.safetensors")
        rounded = {name: tensor.to(HALVES[dtype]).float() for name, tensor in weights.items()}
        save_torch_file(rounded, source / "model.safetensors", metadata={"format": "pt"})
    partition(configuration_of(str(source), dtype=dtype), "native", tmp_path / "out")
    assert answers(tmp_path / "out") == answers(source, dtype=dtype)


def test_a_tied_head_is_one_table_with_the_embedding(oracle_of: Callable[[str], Oracle]) -> None:
    c = configuration_of(str(oracle_of("t5-v1.0").folder), threads=1)
    model = load_part(oracle_of("t5-v1.0").folder, c).model
    assert model.lm_head.weight is model.embedding.weight


# What is refused


def refused(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(LoadError) as caught:
        init_inference(str(checkpoint), backend="torch", threads=1, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4"}, "option.dtype=int4 is not supported by backend torch, allowed are"),
        ({"pipeline_parallel_degree": 2}, "option.pipeline_parallel_degree=2 is not supported"),
        ({"cpu_kernel": "per_batch"}, "option.cpu_kernel=per_batch is not supported by backend"),
        ({"max_rows": 10**7}, "the keys and values of 10000000 rows take"),
    ],
    ids=str,
)
def test_options_that_it_does_not_have(
    checkpoint: Path, options: dict[str, Any], words: str
) -> None:
    assert words in refused(checkpoint, **options)


def test_an_older_torch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.3.1+cu121")
    assert refused(checkpoint) == (
        "backend torch needs torch 2.4 or newer, 2.3.1+cu121 is installed; "
        "set option.backend=transformers"
    )


def test_a_weight_beyond_fp16(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["shared.weight"][3, 3] = 1e5
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "tensor shared.weight holds 100000, fp16 ends at 65504" in refused(
        checkpoint, dtype="fp16"
    )


# Memory


def test_as_many_rows_as_fit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a number is asked for, which must fit."""
    a = T5Architecture.from_config(model_config(checkpoint))
    of_one = RowCache.nbytes(a, 1, 512, 512, 4)
    monkeypatch.setattr(part_module, "available_memory", lambda: 5 * of_one + 1)
    opened = open_engine("torch", checkpoint, max_rows=None, **LIMITS)
    assert opened.max_rows == 5
    opened.close()
    assert "the keys and values of 6 rows" in refused(checkpoint, max_rows=6, **LIMITS)
    for nothing in (0, of_one - 1):
        monkeypatch.setattr(part_module, "available_memory", lambda left=nothing: left)
        assert "the keys and values of 1 rows" in refused(checkpoint, **LIMITS)


LIMITS = {"max_input_tokens": 512, "max_output_tokens": 512}


def test_threads(checkpoint: Path) -> None:
    for threads in (2, 1):
        open_engine("torch", checkpoint, threads=threads).close()
        assert torch.get_num_threads() == threads


# Prompts and rows


def test_prompts_that_are_encoded_together_do_not_see_each_other(engine: StepEngine) -> None:
    prompts = [random_ids(length, seed=length).tolist() for length in (1, 30, 7, 200)]
    for together, prompt in zip(encoded(engine, prompts), prompts):
        (alone,) = encoded(engine, [prompt])
        assert together.length == len(prompt)
        assert_equal("torch", together.keys_values.numpy(), alone.keys_values.numpy())


def test_encoding_can_be_left_at_any_layer(engine: StepEngine) -> None:
    (expected,) = encoded(engine, [[5, 6, 7]])
    parts = 1 + sum(part is None for part in engine.encode([[5, 6, 7]]))
    assert parts == 2 + 2 + 1
    for left_at in range(parts):
        left = engine.encode([random_ids(40).tolist()])
        for _ in range(left_at):
            assert next(left) is None
        del left
        (found,) = encoded(engine, [[5, 6, 7]])
        assert torch.equal(found.keys_values, expected.keys_values)


def test_broken_numbers_of_a_row_stay_in_it(engine: StepEngine) -> None:
    """0 weighs a NaN as NaN: none may be left behind in a row that others take over."""
    short, long = encoded(engine, [[5, 6, 7], random_ids(60).tolist()])
    broken = EncodedPrompt(torch.full_like(long.keys_values, torch.nan))
    tokens = random_ids(2, 28)

    def decoded_after(first: EncodedPrompt, move: bool) -> np.ndarray:
        """Logits of row 1, and of row 0 that begins anew 20 tokens behind it, so that places ahead
        of its own are looked at."""
        start(engine, first, long)
        before = stepped(engine, tokens[:, :20])
        assert np.isnan(before[0]).all() == (first is broken)
        if move:
            engine.attach(short, 2)
            engine.move(2, 0)
        else:
            engine.attach(short, 0)
        steps = [
            engine.decode(2, tokens[:, [20 + k]], np.array([k, 20 + k])).copy() for k in range(8)
        ]
        return np.concatenate([before[1, None], *(step.swapaxes(0, 1) for step in steps)], axis=1)

    for move in (False, True):
        assert_equal("torch", decoded_after(broken, move), decoded_after(short, move))
