"""Time a running server under load, in three arrangements side by side.

  in flight     the server as shipped: a prompt joins the running batch at any step
  static        the same engine, in batches that run to the end of their longest text
  transformers  the same server with backend=transformers

Clients send one request after the other to /invocations on this machine; all arrangements get the
same requests: inputs of 16 to 512 tokens, outputs of 4 to 128 (powers of two, so that there are
requests that ask for equally many), both log-uniform; the end of a text is ignored. The
arrangements take turns; the next one begins when the others' threads are at rest.

requests/s, tokens/s and latency are seen by the clients. "gap" is the time from one token of a text
to its next, "first" that from accepting a request to its first token; both are noted in the server
where a token is known: before HTTP, over which answers are sent whole. Times are in ms, of all
rounds together; rates are medians of the rounds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from arrangements import BACKENDS, Moments, Server
from machine import OtherLoad, cpu_seconds, describe, print_description, settle, warn_of_load
from random_model import SHAPES, checkpoint
from report import print_table, ratio, write_json

from handler.checkpoints.find import model_config
from handler.cli.common import DEMO
from handler.config import MAX_ROWS_ON_CPU
from handler.machine import usable_cpus
from handler.tokenizer import load_tokenizer

_INPUT, _OUTPUTS = (16, 512), (4, 8, 16, 32, 64, 128)
_FIRST_WORD = 3  # the tokens below are <pad>, </s>, <unk>
_REQUEST_SECONDS = 600
_RATES = ("requests/s", "tokens/s")
_TIMES = ("latency", "gap", "first")


@dataclass
class Round:
    """What clients saw of one arrangement in one round."""

    start: float = field(default_factory=time.perf_counter)
    end: float = 0.0
    latencies: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def rates(self) -> dict[str, float]:
        seconds = self.end - self.start
        return dict(zip(_RATES, (len(self.latencies) / seconds, self.tokens / seconds)))


class Clients:
    """Send bodies, each client one after the other, until all are sent or time is up."""

    def __init__(self, port: int, bodies: Sequence[bytes], seconds: float) -> None:
        self._port = port
        self._left = iter(bodies)
        self._lock = threading.Lock()
        self._failures: list[str] = []
        self._seen = Round()
        self._deadline = self._seen.start + seconds

    def run(self, count: int) -> Round:
        threads = [threading.Thread(target=self._client) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._seen.end = time.perf_counter()
        if self._failures:
            sys.exit(f"a request failed: {self._failures[0]}")
        return self._seen

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_REQUEST_SECONDS)
        try:
            for body in self._bodies():
                self._send(connection, body)
        except (OSError, http.client.HTTPException) as error:
            self._failures.append(repr(error))
        finally:
            connection.close()

    def _bodies(self) -> Iterator[bytes]:
        while not self._failures and time.perf_counter() < self._deadline:
            with self._lock:
                body = next(self._left, None)
            if body is None:
                return
            yield body

    def _send(self, connection: http.client.HTTPConnection, body: bytes) -> None:
        start = time.perf_counter()
        connection.request("POST", "/invocations", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        seconds = time.perf_counter() - start
        if reply.status != 200:
            self._failures.append(content.decode(errors="replace"))
            return
        with self._lock:
            self._seen.latencies.append(seconds)
            self._seen.tokens += json.loads(body)["parameters"]["max_new_tokens"]


def main() -> None:
    a = _arguments()
    model = a.model or (checkpoint(a.shape) if a.shape else DEMO)
    machine = describe(a.threads)
    print_description(machine)
    print(
        f"{os.path.relpath(model)}, our dtype {a.dtype}, {a.clients} clients, {a.rounds} rounds of "
        f"at most {a.requests} requests or {a.seconds:g} s (seed {a.seed})"
    )
    figures, others = _measure(model, a)
    _print(figures)
    for name, measured_of in figures.items():
        if measured_of["requests"] < a.rounds * a.requests:
            print(f"{name}: time was up after {measured_of['requests']:.0f} requests")
    warn_of_load(others)
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    measured = {"machine": machine, "setting": setting, "other_load": others, "measured": figures}
    write_json(a.json, measured)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    what.add_argument("--model", type=Path, help="a checkpoint folder (default: the demo)")
    parser.add_argument("--dtype", default="fp32", help="of our engine (default: fp32)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each arrangement")
    parser.add_argument("--seconds", type=float, default=120, help="a round sends no more then")
    parser.add_argument("--max-rows", type=int, default=MAX_ROWS_ON_CPU)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--arrangements", nargs="+", choices=BACKENDS, default=list(BACKENDS), metavar="NAME"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def _measure(model: Path, a: argparse.Namespace) -> tuple[dict[str, dict[str, float]], float]:
    """(arrangement -> figures, share of the CPUs that other processes took)"""
    random = np.random.default_rng(a.seed)
    warm_up = _bodies(model, a.clients, random)
    requests = [_bodies(model, a.requests, random) for _ in range(a.rounds)]
    rounds: dict[str, list[Round]] = {name: [] for name in a.arrangements}
    with ExitStack() as running:
        servers = []
        for name in a.arrangements:
            servers.append(Server(name, model, _options(name, a)))
            running.callback(servers[-1].close)
        for server in servers:
            Clients(server.port, warm_up, a.seconds).run(a.clients)
        load, before = OtherLoad(), _own_seconds(servers)
        for bodies in requests:
            for server in servers:
                settle([other.pid for other in servers])
                seen = Clients(server.port, bodies, a.seconds).run(a.clients)
                rounds[server.arrangement].append(seen)
        others = load.share(_own_seconds(servers) - before)
        return {s.arrangement: _figures(rounds[s.arrangement], s.stop()) for s in servers}, others


def _options(arrangement: str, a: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": "fp32" if BACKENDS[arrangement] == "transformers" else a.dtype,
        "threads": a.threads,
        "max_rows": a.max_rows,
        "request_timeout": _REQUEST_SECONDS,
    }


def _bodies(model: Path, count: int, random: np.random.Generator) -> list[bytes]:
    """Requests of log-uniform lengths, their words drawn from the vocabulary."""
    tokenizer = load_tokenizer(model, int(model_config(model)["vocab_size"]))
    bodies = []
    for _ in range(count):
        length = round(float(np.exp(random.uniform(*np.log(_INPUT)))))
        ids = random.integers(_FIRST_WORD, tokenizer.size, length - 1).tolist()
        body = {
            "inputs": tokenizer.decode(ids),
            "parameters": {
                "max_new_tokens": int(random.choice(_OUTPUTS)),
                "ignore_eos_token": True,
            },
        }
        bodies.append(json.dumps(body).encode())
    return bodies


def _own_seconds(servers: Sequence[Server]) -> float:
    return sum(cpu_seconds(pid) for pid in (os.getpid(), *(s.pid for s in servers)))


def _figures(rounds: Sequence[Round], texts: Sequence[Moments]) -> dict[str, float]:
    counted = [
        moments for moments in texts if any(seen.start <= moments[0] <= seen.end for seen in rounds)
    ]
    times: dict[str, list[float]] = {
        "latency": [seconds for seen in rounds for seconds in seen.latencies],
        "gap": [gap for moments in counted for gap in np.diff(moments[1:])],
        "first": [moments[1] - moments[0] for moments in counted],
    }
    return {
        "requests": len(times["latency"]),
        **{name: float(np.median([seen.rates[name] for seen in rounds])) for name in _RATES},
        **{
            f"{name} P{part}": float(np.percentile(times[name], part)) * 1e3
            for name in _TIMES
            for part in (50, 99)
        },
    }


def _print(figures: dict[str, dict[str, float]]) -> None:
    columns = [name for name in next(iter(figures.values())) if name != "requests"]
    print()
    print_table(
        ["", *columns],
        [[name, *(_number(f[column]) for column in columns)] for name, f in figures.items()],
    )
    ours = figures.get("in flight")
    if ours is None or len(figures) == 1:
        return
    print("\nin flight is better than the other (rates: times as high, times: times as short)")
    print_table(
        ["", *columns],
        [
            [name, *(ratio(_gain(ours, other, column)) for column in columns)]
            for name, other in figures.items()
            if other is not ours
        ],
    )


def _gain(ours: dict[str, float], other: dict[str, float], column: str) -> float:
    if column in _RATES:
        return ours[column] / other[column]
    return other[column] / ours[column]


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
