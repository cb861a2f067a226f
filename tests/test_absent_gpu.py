"""The torch engine on a GPU that is not there: torch follows where each tensor lies and what shape
it has, without computing anything. So it fails as on a GPU where tensors of two devices meet or the
host would have to know a number. The kernels are in test_torch_t5_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from random_checkpoints import write_checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from handler.config import configuration_of
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.part import load_part
from handler.parameters import GenerationParameters
from handler.sampling import RowSampling

GPU = torch.device("cuda", 0)
EOS = 1
PROMPTS = [[5, 6, 1], [7, 8, 9, 1], [4, 1]]


class Copies(TorchDispatchMode):
    """Notes what is copied between the GPU and the host, and whether the host waits for it: to the
    GPU it does, too, where the driver first copies what is not pinned."""

    pinned: list[torch.Tensor] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.to_host: list[bool] = []
        self.to_gpu: list[bool] = []

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        if call in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source = args[1] if call is torch.ops.aten.copy_.default else args[0]
            if result.device != source.device:
                given = args[2] if len(args) > 2 else False
                waits = not (kwargs or {}).get("non_blocking", given)
                if result.device.type == "cpu":
                    self.to_host.append(waits)
                else:
                    self.to_gpu.append(waits or not any(source is one for one in self.pinned))
        return result


class Event:
    recorded = 0

    def record(self) -> None:
        Event.recorded += 1


class Stream:
    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine asks of it."""
    empty = torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*size, **options)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        Copies.pinned.append(tensor.clone())
        return Copies.pinned[-1]

    monkeypatch.setattr(Copies, "pinned", [])
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)


@pytest.fixture(
    params=[
        "flan-t5 fp32 1",
        pytest.param("t5-v1.0 bf16 1", marks=pytest.mark.long),
        pytest.param("umt5 fp16 1", marks=pytest.mark.long),
        "flan-t5 int8 1",
        "mt5 bf16 2",  # one of two ranks, whose results come from nowhere
    ]
)
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, demo: Path
) -> Iterator[TorchT5StepEngine]:
    variant, dtype, degree = request.param.split()
    folder = write_checkpoint(tmp_path / "model", variant, demo)
    c = configuration_of(str(folder), dtype=dtype, max_rows=4)
    part = load_part(folder, c, 0, int(degree))
    limits = {"max_rows": 4, "max_input_tokens": 50, "max_output_tokens": 20}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = part.model.to(GPU)
        if degree != "1":
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(degree))
            assert dist.group.WORLD is not None
            part.join(dist.group.WORLD)
        yield TorchT5StepEngine(model, part.architecture, part.tokenizer, GPU, **limits)
    if dist.is_initialized():
        dist.destroy_process_group()


def sampling(**parameters: Any) -> RowSampling:
    p = GenerationParameters(**parameters)
    return RowSampling(p, bad_words=[[5], [6, 7]] if p.samples else [], log_probs=not p.samples)


def test_a_service_on_it(engine: TorchT5StepEngine) -> None:
    assert engine.runs_ahead
    *_, handles = engine.encode(PROMPTS)
    assert handles is not None
    for row, handle in enumerate(handles):
        assert handle.keys_values.device == GPU
        engine.attach(handle, row)
    everything = {"top_k": 5, "top_p": 0.9, "typical_p": 0.8, "repetition_penalty": 1.2}
    lengths = {"no_repeat_ngram_size": 2, "min_new_tokens": 3}
    rows = [sampling(), sampling(do_sample=True, **everything, **lengths), sampling()]
    logits = engine.decode(3, np.zeros((3, 1), np.int64), np.zeros(3, np.int64))[:, 0]
    with Copies() as copies:
        for step in range(1, 4):  # as the scheduler has them, in this order
            engine.sampler.choose(logits, rows, [step] * 3, EOS, logits.shape[-1] - 2)
            logits = engine.decode(3, np.array([[-2], [-1], [-3]]), np.full(3, step))[:, 0]
    assert (logits.device, logits.shape[0]) == (GPU, 3)
    assert copies.to_host == [False] * 3
    assert copies.to_gpu
    assert not any(copies.to_gpu)
    assert Event.recorded >= 3
    engine.move(2, 0)
    engine.reorder([0, 1], [1, 0])
    engine.sampler.choose(logits[[0, 2]], rows[::2], [4, 4], EOS, 30)
    engine.decode(2, np.array([[5, 6], [7, 8]]), np.full(2, 5))
    with Copies() as copies:
        logits.cpu()
        logits[[0, 2]]
    assert copies.to_host == copies.to_gpu == [True]
