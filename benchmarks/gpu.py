"""Decoding on a GPU: ours beside transformers and CTranslate2, in one run, on random weights.

Needs one GPU, torch, transformers and Triton; CTranslate2 where it is installed. Nothing is read
from disk but a vocabulary: weights are made on the device, in the shapes of FLAN-T5.

ms a step: a whole greedy generation of B texts (64 tokens in, 128 out: encoder, scheduler, sampling
and all) divided by the tokens out; median of the runs. decode ms: one decoding step of the engine
alone, as one follows another. of limit: the time that reading the decoder's weights (the head's
among them) once takes at the bandwidth that is measured here, divided by decode ms. requests/s: 128
clients at once, 16 to 512 tokens in, 4 to 128 out; transformers in batches of 32 as they come, that
end with their longest. x ours: how many times as fast ours is.

After that, the demo's texts in TP 2 on this one device beside those in TP 1: see gpu_ranks.py.

Of transformers the fastest way that works is compared: with its default cache, with a static one,
and with that and torch.compile; each is listed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_peers import PEERS, MakePeer, Peer
from gpu_ranks import compare_ranks
from machine import describe, print_description
from plot import write_bars
from random_model import FIRST_WORD, SHAPES, TOKENS, checkpoint, config_of
from report import print_table, ratio, write_json
from torch import Tensor

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.tensors import EMBEDDINGS, HEAD, tensors_of_the_stacks
from handler.config import Configuration
from handler.engines.torch_t5.engine import TorchT5StepEngine
from handler.engines.torch_t5.loading import load_model
from handler.engines.torch_t5.part import LoadedPart
from handler.generation import GenerationRequest
from handler.inference import Model
from handler.machine import usable_cpus
from handler.parameters import GenerationParameters
from handler.scheduler import Scheduler
from handler.tokenizer import load_tokenizer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENS_IN, _TOKENS_OUT = 64, 128
_CLIENTS, _REQUESTS, _STATIC_BATCH = 128, 512, 32
_EOS = 1


class RandomParts:
    """See Parts: numbers in place of a checkpoint, of a size that keeps activations in range."""

    is_tied = False

    def __init__(self, a: T5Architecture, dtype: torch.dtype, device: torch.device) -> None:
        table = (a.vocab_size, a.d_model)
        self._shapes = {EMBEDDINGS[0]: table, HEAD: table, **dict(tensors_of_the_stacks(a))}
        self._dtype, self._device = dtype, device

    def part(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device)
        numbers = torch.randn(shape, dtype=self._dtype, device=self._device)
        return numbers if name in EMBEDDINGS else numbers * shape[-1] ** -0.5


def main() -> None:
    a = _arguments()
    device = torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing was measured (--device cpu tries the script)")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    machine = describe(usable_cpus())
    print_description(machine)
    bandwidth = _bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {bandwidth / 1e9:.0f} GB/s measured")
    measured = [_measure(shape, device, bandwidth, a) for shape in a.shapes]
    dtypes = [] if a.no_ranks else list(dict.fromkeys(["fp32", a.dtype]))
    ranks = [compare_ranks(device, dtype) for dtype in dtypes]
    figures = {"machine": machine, "device": name, "measured": measured, "ranks": ranks}
    write_json(a.json, figures)
    if a.plot:
        title = f"ms a step in {a.dtype}, {_TOKENS_IN} tokens in, {_TOKENS_OUT} out: {name}"
        write_bars(a.plot, title, _bars(measured, a.batch))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["base", "xl", "xxl"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=_REQUESTS, help="0: no clients")
    parser.add_argument("--no-ranks", action="store_true", help="leave TP 2 out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ms a step there, as SVG")
    return parser.parse_args()


def _bars(
    measured: Sequence[dict[str, Any]], batches: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Of each shape and batch: ms by engine, and the memory limit's."""
    return {
        f"{one['shape']}, B={batch}": {
            **{name: times[batch] for name, times in one["ms"].items()},
            "memory limit": one["limit_ms"],
        }
        for one in measured
        for batch in batches
    }


def _measure(
    shape: str, device: torch.device, bandwidth: float, a: argparse.Namespace
) -> dict[str, Any]:
    architecture = T5Architecture.from_config(config_of(shape))
    dtype = _DTYPES[a.dtype]
    ours, engine = _ours(architecture, dtype, device)
    limit = 1e3 * _decoder_bytes(architecture, dtype) / bandwidth
    decode = {batch: _decode_ms(engine, batch, device, a.runs) for batch in a.batch}
    times = {"ours": {b: _generation_ms(lambda n: _run_ours(ours, n), b, a.runs) for b in a.batch}}
    rates = {"ours": _clients(ours, a.requests)} if a.requests else {}
    ours.close()
    for name in a.peers:
        _free(device)
        try:
            times[name], rate = _measure_peer(PEERS[name], config_of(shape), dtype, device, a)
        except Exception as error:  # of compilers, of versions that cannot do it: it is listed
            print(f"{shape}: {name} was not measured: {type(error).__name__}: {error}"[:300])
        else:
            rates.update({name: rate} if rate else {})
    _print(shape, times, rates, decode, limit, a)
    return {"shape": shape, "ms": times, "rates": rates, "decode_ms": decode, "limit_ms": limit}


def _measure_peer(
    make: MakePeer,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    a: argparse.Namespace,
) -> tuple[dict[int, float], float | None]:
    """ms a step by batch, requests a second where it serves"""
    peer = make(config, dtype, device)
    times = {
        batch: _generation_ms(lambda n: peer.generate(_ids(n), _TOKENS_OUT), batch, a.runs)
        for batch in a.batch
    }
    return times, _static_batches(peer, a.requests) if a.requests and peer.serves else None


def _ours(
    a: T5Architecture, dtype: torch.dtype, device: torch.device
) -> tuple[Model, TorchT5StepEngine]:
    c = Configuration()
    tokenizer = load_tokenizer(checkpoint("tiny"), a.vocab_size)
    model = load_model(a, RandomParts(a, dtype, device), dtype, device)
    part = LoadedPart(model, a, a, tokenizer, device, max(_STATIC_BATCH * 2, 1), c)
    engine = part.engine(part.rows)
    scheduler = Scheduler(engine, max_queue=10_000)
    limits = {"max_input_tokens": c.max_input_tokens, "max_output_tokens": c.max_output_tokens}
    return Model(scheduler, backend="torch", **limits), engine


def _decoder_bytes(a: T5Architecture, dtype: torch.dtype) -> int:
    """Of the weights that a step reads: not the keys' and values' of cross-attention, which were
    used once, when the prompt was encoded."""
    names = (
        (name, shape)
        for name, shape in tensors_of_the_stacks(a)
        if name.startswith("decoder") and ".EncDecAttention.k." not in name
    )
    read = sum(int(np.prod(s)) for name, s in names if ".EncDecAttention.v." not in name)
    return (read + a.vocab_size * a.d_model) * dtype.itemsize


def _bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy on the device, read and written."""
    size = (1 << 31) if device.type == "cuda" else (1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(_timed(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * size / seconds


def _decode_ms(engine: TorchT5StepEngine, batch: int, device: torch.device, runs: int) -> float:
    *_, handles = engine.encode(_ids(batch))
    assert handles is not None
    for row, handle in enumerate(handles):
        engine.attach(handle, row)
    tokens = np.full((batch, 1), FIRST_WORD)

    def steps() -> None:
        """As in service, where the next one is begun before one is done."""
        for k in range(_TOKENS_OUT):
            engine.decode(batch, tokens, np.full(batch, k))

    seconds = [_timed(steps, device) for _ in range(runs + 1)][1:]
    return 1e3 * statistics.median(seconds) / _TOKENS_OUT


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, the device's work included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _generation_ms(generate: Callable[[int], Any], batch: int, runs: int) -> float:
    seconds = []
    for run in range(runs + 2):  # two to warm up: the second may still compile
        start = time.perf_counter()
        generate(batch)
        if run > 1:
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds) / _TOKENS_OUT


def _run_ours(model: Model, batch: int) -> None:
    parameters = GenerationParameters(max_new_tokens=_TOKENS_OUT, ignore_eos_token=True)
    texts = [model.tokenizer.decode(ids) for ids in _ids(batch)]
    results = model.generate([GenerationRequest(text, parameters) for text in texts])
    assert all(len(result.token_ids) == _TOKENS_OUT for result in results)


def _ids(batch: int, tokens: int = _TOKENS_IN) -> list[list[int]]:
    ids = np.random.default_rng(batch).integers(FIRST_WORD, TOKENS, (batch, tokens))
    ids[:, -1] = _EOS
    return ids.tolist()  # type: ignore[no-any-return]


def _lengths(count: int) -> list[tuple[int, int]]:
    """(tokens in, tokens out) of so many requests, both log-uniform."""
    random = np.random.default_rng(0)
    tokens_in = np.exp(random.uniform(np.log(16), np.log(512), count)).astype(int)
    tokens_out = np.exp(random.uniform(np.log(4), np.log(128), count)).astype(int)
    return list(zip(tokens_in.tolist(), tokens_out.tolist()))


def _clients(model: Model, count: int) -> float:
    """Requests a second: each client sends its next request when it has an answer."""
    requests = []
    for i, (tokens_in, tokens_out) in enumerate(_lengths(count)):
        ids = np.random.default_rng(i).integers(FIRST_WORD, TOKENS, tokens_in - 1)
        text = model.tokenizer.decode(ids.tolist())
        parameters = GenerationParameters(max_new_tokens=tokens_out, ignore_eos_token=True)
        requests.append(GenerationRequest(text, parameters))
    start, running, done = time.perf_counter(), set(), 0
    left = iter(requests)
    while done < count:
        while len(running) < _CLIENTS and (request := next(left, None)) is not None:
            running.update(model.submit([request]))
            model.run_submitted()
        ended = {future for future in running if future.done()}
        for future in ended:
            future.result()
        done, running = done + len(ended), running - ended
        time.sleep(0.0005)
    return count / (time.perf_counter() - start)


def _static_batches(peer: Peer, count: int) -> float:
    lengths = _lengths(count)
    batches = [lengths[i : i + _STATIC_BATCH] for i in range(0, count, _STATIC_BATCH)]

    def run(batch: Sequence[tuple[int, int]]) -> None:
        peer.generate([_ids(1, tokens_in)[0] for tokens_in, _ in batch], max(o for _, o in batch))

    run(batches[0])
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    return count / (time.perf_counter() - start)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _print(
    shape: str,
    times: dict[str, dict[int, float]],
    rates: dict[str, float],
    decode: dict[int, float],
    limit: float,
    a: argparse.Namespace,
) -> None:
    print(f"\n{shape} in {a.dtype}: {_TOKENS_IN} tokens in, {_TOKENS_OUT} out, {a.runs} runs")
    head = ["", *(f"ms a step, B={b}" for b in a.batch), *(f"x ours, B={b}" for b in a.batch)]
    rows = []
    for name, of_batch in times.items():
        slower = [ratio(of_batch[b] / times["ours"][b]) for b in a.batch]
        rows.append([name, *(f"{of_batch[b]:.2f}" for b in a.batch), *slower])
    print_table(head, rows)
    alone = ", ".join(f"B={b} {ms:.2f} ms" for b, ms in decode.items())
    print(f"decode alone: {alone}; memory limit {limit:.2f} ms: {limit / decode[a.batch[0]]:.0%}")
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} requests/s, ours {ratio(rates['ours'] / rate)}")


if __name__ == "__main__":
    main()
