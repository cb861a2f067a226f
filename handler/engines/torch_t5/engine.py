"""The step engine on PyTorch: one process's rows, whether it holds the model or one rank's part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from handler.checkpoints.architecture import T5Architecture, relative_position_bucket
from handler.engines.protocol import Sampler
from handler.engines.torch_t5.cuda_graphs import Capture, CudaGraphs
from handler.engines.torch_t5.inputs import StepInputs, on_device
from handler.engines.torch_t5.kv_cache import EncodedPrompt, RowCache, StepMemory
from handler.engines.torch_t5.model import T5
from handler.engines.torch_t5.sampling import DeviceSampler
from handler.sampling import HostSampler
from handler.tokenizer import Tokenizer

# Tokens of prompts that are encoded together: on a CPU as many keep it busy, a GPU wants more.
_ENCODE_TOKENS_CPU, _ENCODE_TOKENS_GPU = 256, 4096
_ALIGNED = 16  # numbers


class TorchT5StepEngine:
    """See StepEngine. ``a``: the architecture of this process's part of the model.

    Everything is computed on ``device``, where ``model`` is. On a GPU the last bits of logits may
    differ with the number of rows, as matrix products there do.
    """

    def __init__(
        self,
        model: T5,
        a: T5Architecture,
        tokenizer: Tokenizer,
        device: torch.device,
        *,
        max_rows: int,
        max_input_tokens: int,
        max_output_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder_start_token_id = a.decoder_start_token_id
        self.quality_warning = None
        self.max_rows = max_rows
        self.max_input_tokens = max_input_tokens
        self.max_output_tokens = max_output_tokens
        on_gpu = device.type == "cuda"
        at_once = _ENCODE_TOKENS_GPU if on_gpu else _ENCODE_TOKENS_CPU
        self.encode_tokens = max(at_once, max_input_tokens)
        self._inputs = StepInputs(max_rows, device)
        self.runs_ahead = False
        self.sampler: Sampler = HostSampler()
        if on_gpu:
            self.run_ahead()
            # on Hopper it comes first, and makes a plan for every new length
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._model = model
        self._device = device
        dtype = model.dtype
        self._rows = RowCache(a, max_rows, max_input_tokens, max_output_tokens, dtype, device)
        encoder, decoder = model.encoder.relative_bias, model.decoder.relative_bias
        self._encoder_bias = _by_distance(encoder, a, max_input_tokens, True).to(dtype)
        self._decoder_bias = _by_distance(decoder, a, max_output_tokens, False).to(dtype)
        self._decoder_bias[..., max_output_tokens:] = -torch.inf  # keys ahead of the token
        self.has_kernels = False
        self._take_out_kernels: Callable[[], None] = _nothing
        self._graphs: CudaGraphs | None = None

    @property
    def chosen(self) -> Tensor:
        """Where the sampler leaves the tokens that negative ones stand for in ``decode``."""
        return self._inputs.chosen

    def run_ahead(self) -> None:
        """Choose tokens on the device from now on: a step can begin before the host knows them."""
        self.sampler = DeviceSampler(self.chosen)
        self.runs_ahead = True

    def use_kernels(self) -> None:
        """Decode with the kernels from now on. Where it raises, which may be anything that Triton
        and CUDA do, decoding goes on without them. Of several ranks see fast_steps.py."""
        from handler.engines.torch_t5.kernels import fuse

        self._use_device()
        take_out = fuse(self._model)
        try:
            self._step(1)
            self.wait()
        except BaseException:
            take_out()
            raise
        self.has_kernels, self._take_out_kernels = True, take_out

    def use_no_kernels(self) -> None:
        """Decode without them again."""
        self._take_out_kernels()
        self.has_kernels, self._take_out_kernels = False, _nothing

    def use_graphs(self, capture: Capture | None = None) -> None:
        """Run the kernels as CUDA graphs from now on. See use_kernels, which comes before."""
        self._use_device()
        self._graphs = CudaGraphs(self._step, self.max_rows, self._device, capture)

    def use_no_graphs(self) -> None:
        """Run the kernels one by one again."""
        self._graphs = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[EncodedPrompt] | None]:
        """Encode together, yielding None after each layer and the prompts at the end."""
        self._use_device()
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.tensor([i for prompt in prompts for i in prompt], device=self._device)
        encoded = None
        for encoded in self._model.encode(ids, lengths, self._encoder_biases(max(lengths))):
            if encoded is None:
                self.wait()
                yield None
        assert encoded is not None
        handles = [self._rows.empty_prompt(length) for length in lengths]
        for layer, keys_values in enumerate(self._model.cross_keys_values(encoded)):
            for handle, part in zip(handles, torch.split(keys_values, lengths, dim=2)):
                handle.keys_values[layer] = part
            self.wait()
            yield None
        yield handles

    def attach(self, handle: EncodedPrompt, row: int) -> None:
        """Let ``row`` decode against this prompt, from its beginning."""
        self._rows.attach(handle, row)

    def decode(
        self, n: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Any:
        """Tokens [n, q] of rows 0..n-1, the first at positions [n] -> logits [n, q, vocabulary]

        They stay on the device for a sampler that works there.
        """
        self._use_device()
        q = tokens.shape[1]
        used = self._rows.own_used
        for row, position in enumerate(positions.tolist()):
            used[row] = max(used[row], position + q)
        if q == 1:
            self._inputs.fill(tokens, positions)
        if q == 1 and self._graphs is not None:
            logits = self._graphs.run(n)
        elif q == 1 and self.has_kernels:
            logits = self._step(n)
        else:
            logits = self._plain_step(n, tokens, positions)
        return logits if isinstance(self.sampler, DeviceSampler) else logits.cpu().numpy()

    def _plain_step(
        self, n: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Tensor:
        """See decode."""
        q = tokens.shape[1]
        if q == 1:
            ids, at = self._inputs.of(n)
            places = at[:, None]
        else:
            ids = on_device(tokens, self._device)
            places = on_device(positions[:, None] + np.arange(q), self._device)
        longest = {"own": int(positions.max()) + q, "cross": max(self._rows.prompt_lengths[:n])}
        memory = StepMemory(self._rows, places, self._decoder_bias, **longest)
        return self._model.decode(ids, memory)

    def _step(self, n: int) -> Tensor:
        """Logits [n, 1, vocabulary] of what was filled in, by kernels that read nothing of the
        host: what a CUDA graph can hold."""
        from handler.engines.torch_t5.kernels import KernelMemory

        tokens, positions = self._inputs.of(n)
        memory = KernelMemory(self._rows, positions, self._decoder_bias)
        return self._model.decode(tokens, memory)

    def move(self, src: int, dst: int) -> None:
        """Row ``dst`` becomes what row ``src`` is."""
        self._rows.move(src, dst)

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Each of ``rows`` goes on from the tokens of its parent, a row on the same prompt."""
        self._rows.reorder(rows, parents)

    def wait(self) -> None:
        """Until the device is done: who decides what comes next goes by the time that passed."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def when_lost(self, action: Callable[[str], None]) -> None:
        """Never: one process is not lost to itself. See TensorParallelEngine."""

    def close(self) -> None:
        del self._model, self._rows
        self._graphs = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _encoder_biases(self, s: int) -> Iterator[Tensor]:
        """Of each layer [heads, s, s]; those of a layer's own table only when it is its turn."""
        places = torch.arange(s, device=self._device)
        # of rows whose beginnings are not aligned SDPA's kernel on CUDA makes a copy in every layer
        keys = torch.arange(-(-s // _ALIGNED) * _ALIGNED, device=self._device)
        distances = keys - places[:, None] + self.max_input_tokens - 1
        index = distances.clamp(max=self._encoder_bias.shape[-1] - 1)
        biases = (table[:, index][..., :s] for table in self._encoder_bias)
        return biases if len(self._encoder_bias) > 1 else repeat(next(biases))

    def _use_device(self) -> None:
        """Triton launches on the current device, which each thread has its own."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def _nothing() -> None:
    """There are no kernels to take out."""


def _by_distance(tables: Tensor, a: T5Architecture, longest: int, bidirectional: bool) -> Tensor:
    """[tables, buckets, heads] -> [tables, heads, 2 * longest - 1], from the farthest key before"""
    buckets = relative_position_bucket(
        np.arange(1 - longest, longest),
        bidirectional=bidirectional,
        num_buckets=a.num_buckets,
        max_distance=a.max_distance,
    )
    return tables[:, torch.from_numpy(buckets).to(tables.device)].transpose(1, 2).contiguous()
