"""One model on several ranks, which are real processes: the answers of one process, and what is
left of the ranks when the model is closed. See test_ranks_rows.py for what one such model does for
long, test_lost_ranks.py for how ranks are missed."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT
from mpi import processes_with
from oracle import Oracle
from random_checkpoints import VARIANTS

from handler.checkpoints.partition import partition
from handler.config import configuration_of
from handler.engines import Model, init_inference
from handler.engines.torch_ranks import loading
from handler.engines.torch_ranks.ranks import process_group, start_processes
from handler.engines.torch_t5 import part
from handler.errors import LoadError
from handler.generation import GenerationRequest, GenerationResult
from handler.parameters import parse_parameters

OracleOf = Callable[[str], Oracle]
PROMPTS = ["x", "Write 7 in words.", "Sort these words: cat, apple", "a b c " * 30]
LENGTH = 24


def ranks_of_this_process() -> list[psutil.Process]:
    return processes_with("torch_ranks.rank")


@contextmanager
def loaded(folder: Path, degree: int, **options: Any) -> Iterator[Model]:
    model = init_inference(str(folder), degree, backend="torch", **options)
    try:
        assert len(ranks_of_this_process()) == degree - 1
        yield model
    finally:
        model.close()
    assert not ranks_of_this_process()


def answers(model: Model, prompts: Sequence[str], **parameters: Any) -> list[GenerationResult]:
    parsed = parse_parameters({"max_new_tokens": LENGTH, **parameters})
    return model.generate([GenerationRequest(prompt, parsed) for prompt in prompts])


# Equal to transformers

# each start of several processes takes seconds: all others are in `make test-long`
_QUICK = {("odd", 3)}
CASES = [
    pytest.param(variant, degree, marks=() if (variant, degree) in _QUICK else pytest.mark.long)
    for variant, degree in itertools.product(VARIANTS, (1, 2, 3, 4))
    if VARIANTS[variant].get("num_heads", 4) % degree == 0
]


@pytest.mark.parametrize(("variant", "degree"), CASES)
def test_greedy_and_beams_are_the_oracles(oracle_of: OracleOf, variant: str, degree: int) -> None:
    oracle = oracle_of(variant)
    with loaded(oracle.folder, degree, max_rows=6) as model:
        for prompt, result in zip(PROMPTS, answers(model, PROMPTS)):
            assert result.token_ids == oracle.generate(prompt, max_new_tokens=LENGTH)
            expected = oracle.log_probs(prompt, result.token_ids)
            assert result.log_probs == pytest.approx(expected, abs=1e-4)
        (best,) = answers(model, PROMPTS[1:2], num_beams=3)
        beams = oracle.generate(PROMPTS[1], max_new_tokens=LENGTH, num_beams=3)
        assert best.token_ids == beams[: len(best.token_ids)]


# Split ahead of time


@pytest.mark.parametrize(
    ("variant", "degree", "dtype"),
    [
        ("t5-v1.0", 2, "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("odd", 3, "fp32"),
                ("flan-t5", 2, "fp16"),
                ("t5-v1.0", 4, "bf16"),
                ("umt5", 2, "bf16"),
                ("mt5", 4, "int8"),
            ]
        ),
    ],
)
def test_a_folder_with_a_file_for_each_rank(
    oracle_of: OracleOf, tmp_path: Path, variant: str, degree: int, dtype: str
) -> None:
    """It gives the answers of the checkpoint that it was made of."""
    source, folder = oracle_of(variant).folder, tmp_path / "partitioned"
    options: dict[str, Any] = {"dtype": dtype, "tensor_parallel_degree": degree}
    partition(configuration_of(str(source), **options), "native", folder)
    with loaded(folder, degree, dtype=dtype) as model:
        found = model.pipeline_generate(PROMPTS, max_new_tokens=LENGTH)
    # half precision rounds each rank's part of a sum; int8's scales are of the whole matrix
    like = degree if dtype in ("bf16", "fp16") else 1
    with loaded(source, like, dtype=dtype) as whole:
        assert found == whole.pipeline_generate(PROMPTS, max_new_tokens=LENGTH)


# Memory


@pytest.mark.long
@pytest.mark.parametrize("degree", [2, 4])
def test_all_ranks_together_take_little_more_than_the_model(
    tmp_path: Path, demo: Path, degree: int
) -> None:
    """Above what as many processes take that have only imported torch."""
    size = write_large_checkpoint(tmp_path, demo)
    limits = {"max_rows": 1, "max_input_tokens": 32, "max_output_tokens": 32, "dtype": "bf16"}
    script = (
        "import json, sys\nfrom handler.engines import init_inference\n"
        "model = init_inference(sys.argv[1], int(sys.argv[2]), **json.loads(sys.argv[3]))\n"
        "print('ready', flush=True)\nsys.stdin.read()\nmodel.close()"
    )
    imports = (
        "import sys, torch\nfrom handler.machine import return_freed_memory\n"
        "return_freed_memory()\nprint('ready', flush=True)\nsys.stdin.read()"
    )
    bare = held_by(imports, processes=degree)
    held = held_by(script, str(tmp_path), str(degree), json.dumps(limits))
    assert len(held) == degree
    ratio = (sum(held) - sum(bare)) / size
    print(f"{degree} ranks: {ratio:.2f} x the model")
    assert 0.9 < ratio < 1.2


def write_large_checkpoint(folder: Path, demo: Path) -> int:
    """Bytes of its weights: 272 million parameters in bf16, all zero."""
    config = transformers.T5Config(
        d_model=1024,
        d_kv=64,
        num_heads=16,
        d_ff=2816,
        num_layers=8,
        num_decoder_layers=8,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    model = model.to(torch.bfloat16)
    size = sum(tensor.nbytes for tensor in model.parameters())
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for tensor in model.parameters():
        tensor.data.zero_()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return size


def held_by(script: str, *arguments: str, processes: int = 1) -> list[int]:
    """Bytes that processes and what they started hold when all are ready."""
    command = [sys.executable, "-c", script, *arguments]
    with ExitStack() as stack:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, **pipes))
            for _ in range(processes)
        ]
        for one in started:
            assert one.stdout.readline() == "ready\n"
        roots = [psutil.Process(one.pid) for one in started]
        all_of_them = [p for root in roots for p in (root, *root.children(recursive=True))]
        return [anonymous_memory(p.pid) for p in all_of_them]


def anonymous_memory(pid: int) -> int:
    """Bytes that are no file's: libraries are shared with whatever else runs."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("Pss_Anon:")]
    return int(kilobytes) << 10


# Ending

LEAVING_TOGETHER = """
import torch.distributed as dist
leave = dist.destroy_process_group
dist.destroy_process_group = lambda: (dist.barrier(), leave())
"""


def test_all_ranks_leave_before_any_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, demo: Path, tmp_path: Path
) -> None:
    """In NCCL none leaves without the others; here that is a barrier's doing."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any) -> list[subprocess.Popen[bytes]]:
        started.extend(start_processes(*arguments))
        return started

    monkeypatch.setattr(loading, "start_processes", start)
    monkeypatch.setattr(dist, "destroy_process_group", dist.destroy_process_group)
    exec(LEAVING_TOGETHER, {})
    (tmp_path / "sitecustomize.py").write_text(LEAVING_TOGETHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with loaded(demo, 2) as model:
        model.pipeline_generate(PROMPTS[:1], max_new_tokens=1)
    assert [process.returncode for process in started] == [0]  # not killed


# Starting and ending


@pytest.mark.parametrize(("gpus", "backend"), [(1, "gloo"), (2, "nccl")])
def test_ranks_meet_by_nccl_where_each_has_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str
) -> None:
    """It refuses two on one. Only the choice: there is no GPU to do it with."""

    def meet(backend: str, **how: Any) -> None:
        raise InterruptedError(backend, how["device_id"])

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "init_process_group", meet)
    device = torch.device("cuda", 0)
    with pytest.raises(InterruptedError) as met:
        process_group(dist.HashStore(), 1, 2, device)
    assert met.value.args == (backend, device if backend == "nccl" else None)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, demo: Path) -> None:
    monkeypatch.setattr(part, "gpu_is_there", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    c = configuration_of(str(demo), tensor_parallel_degree=2)
    with pytest.raises(LoadError, match=r"degree=2 needs as many GPUs .* there are 1 in all"):
        part.load_part(demo, c, 1, 2)


def test_a_degree_that_does_not_divide(demo: Path) -> None:
    before = ranks_of_this_process()
    with pytest.raises(LoadError, match=r"option.tensor_parallel_degree=3 does not divide .* 1, 2"):
        init_inference(str(demo), 3)
    assert ranks_of_this_process() == before


def test_layers_are_not_shared_out(demo: Path) -> None:
    with pytest.raises(LoadError, match=r"pipeline_parallel_degree=2 .* set option.tensor_parall"):
        init_inference(str(demo), 2, 2)
