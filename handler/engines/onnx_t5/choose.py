"""Which form of weights is the fastest on this CPU, and right on it."""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.read import Array
from handler.engines.onnx_t5.cache import writing_to
from handler.engines.onnx_t5.graph import GraphWriter
from handler.engines.onnx_t5.linear import FORMS
from handler.engines.onnx_t5.sessions import open_session, threads_in_use
from handler.errors import LoadError

logger = logging.getLogger(__name__)

_LIMITED = "int8_rows_63"
_INT8_FORMS = ("int8_blocks", "int8_rows", _LIMITED)
# Rows of a decoding step, and tokens of a prompt, at which the forms are compared.
_DECODER_ROWS, _ENCODER_TOKENS = (1, 2, 4, 8, 16), (32, 128)
_REPEATS = 7
_CPU_FEATURES = frozenset({"avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"})
# Beyond rounding to 8 bits (which ones survive exactly), only saturation gives such an error.
_LARGEST_ERROR = 0.05


@dataclass(frozen=True)
class Forms:
    """The form of the encoder's weights, and the decoder's by the number of rows.

    decoder: ((form, most rows), ...) in ascending order; one entry unless cpu_kernel=per_batch.
    """

    encoder: str
    decoder: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        several = len(self.decoder) > 1
        decoder = (form + f" to {rows} rows" * several for form, rows in self.decoder)
        return f"encoder {self.encoder}, decoder {', '.join(decoder)}"

    @staticmethod
    def single(encoder: str, decoder: str, max_rows: int) -> Forms:
        return Forms(encoder, ((decoder, max_rows),))


def choose_forms(
    architecture: T5Architecture,
    dtype: str,
    *,
    per_batch: bool,
    max_rows: int,
    cache: Path,
    shipped: Path | None = None,
    quantized: bool = False,
) -> Forms:
    """The forms for this dtype (fp32 or int8) here, by a short measurement that is kept.

    cache: a folder for measurements, one file for each CPU model; shipped: another place where
    they may be already; quantized: the weights have all 8 bits and are not to be rounded again.
    Raises LoadError where no form is right.
    """
    if dtype == "fp32":
        return Forms.single("fp32", "fp32", max_rows)
    times = _cached_times(architecture, cache, shipped or cache)
    if quantized:
        times.pop(_LIMITED, None)
    if not times:
        raise LoadError(
            "no int8 kernel computes right on this CPU; partition with --dtype fp32, or set "
            "option.model_id to the original checkpoint"
        )
    encoder = _fastest(times, _ENCODER_TOKENS)
    if per_batch:
        return Forms(encoder, _by_rows(times, max_rows))
    return Forms.single(encoder, _fastest(times, _DECODER_ROWS), max_rows)


Times = dict[str, dict[str, float]]
"""form -> rows (as text: JSON's keys) -> seconds of one layer's products"""


def _fastest(times: Times, rows: Sequence[int]) -> str:
    """The form whose slowdown against the best one, summed over row counts, is the least."""

    def slowdown(form: str) -> float:
        return sum(times[form][str(n)] / min(t[str(n)] for t in times.values()) for n in rows)

    return min(times, key=slowdown)


def _by_rows(times: Times, max_rows: int) -> tuple[tuple[str, int], ...]:
    """The faster form for each measured number of rows, equal neighbours joined."""
    best = [_fastest(times, [n]) for n in _DECODER_ROWS]
    chosen: list[tuple[str, int]] = []
    for form, rows in zip(best, [*_DECODER_ROWS[:-1], max(max_rows, _DECODER_ROWS[-1])]):
        if chosen and chosen[-1][0] == form:
            chosen.pop()
        chosen.append((form, rows))
    return tuple(chosen)


def _cached_times(architecture: T5Architecture, cache: Path, shipped: Path) -> Times:
    a = architecture
    key = f"{a.d_model}/{a.num_heads * a.d_kv}/{a.d_ff}/{a.gated}/{threads_in_use()}"
    name = f"kernels-{_cpu_model()}-ort{onnxruntime.__version__}.json"
    known = _known_times(cache / name)
    times = known.get(key) or _known_times(shipped / name).get(key) or {}
    if not times:
        with writing_to(cache):
            right = [form for form in _INT8_FORMS if _is_right(form, cache)]
            times = {form: _measure(a, form, cache) for form in right}
        if "int8_rows" in times:  # where it does not saturate its limited form is only less exact
            times.pop(_LIMITED, None)
        logger.info("measured int8 kernels, seconds by rows: %s", times)
        try:
            (cache / name).write_text(json.dumps({**known, key: times}))
        except OSError:  # measured again at the next start
            pass
    return times


def _known_times(file: Path) -> dict[str, Times]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        return {}


def _cpu_model() -> str:
    """The CPU, and what of it the kernels depend on: machines of one model may hide features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        pairs = (line.partition(":") for line in lines)
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        names = [fields[k] for k in ("vendor_id", "cpu family", "model", "stepping")]
        names += sorted(_CPU_FEATURES & set(fields["flags"].split()))
    except (OSError, KeyError):  # not Linux on x86
        names = [platform.machine(), platform.processor()]
    return "".join(c if c.isalnum() else "-" for c in "-".join(names))


def _is_right(form: str, cache: Path) -> bool:
    """Whether ones times ones is right: u8 x s8 kernels without VNNI saturate in 16 bits."""
    width = 256
    ones = _ones((8, width))
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        path = _write(Path(folder) / "ones.onnx", form, {"x": (8, width)}, _ones)
        session = open_session(path)
    product = session.run(None, {"x": ones})[0]
    return bool(np.abs(product / width - 1).max() < _LARGEST_ERROR)


def _ones(shape: tuple[int, int]) -> Array:
    return np.ones(shape, np.float32)


def _measure(a: T5Architecture, form: str, cache: Path) -> dict[str, float]:
    """Seconds of one decoder layer's products, by rows."""
    inner, wide = a.num_heads * a.d_kv, a.d_ff * (2 if a.gated else 1)
    shapes = {
        "qkv": (3 * inner, a.d_model),
        "o": (a.d_model, inner),
        "cross_q": (inner, a.d_model),
        "cross_o": (a.d_model, inner),
        "wi": (wide, a.d_model),
        "wo": (a.d_model, a.d_ff),
    }
    random = np.random.default_rng(0)

    def normal(shape: tuple[int, int]) -> Array:
        return random.standard_normal(shape, np.float32)

    rows = max(_DECODER_ROWS + _ENCODER_TOKENS)
    inputs = {name: normal((rows, shape[1])) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        session = open_session(_write(Path(folder) / "measure.onnx", form, shapes, normal))
    return {
        str(n): _seconds(session, {name: x[:n] for name, x in inputs.items()})
        for n in (*_DECODER_ROWS, *_ENCODER_TOKENS)
    }


def _seconds(session: onnxruntime.InferenceSession, inputs: dict[str, Array]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    return min(times)


def _write(
    path: Path,
    form: str,
    shapes: Mapping[str, tuple[int, int]],
    weight: Callable[[tuple[int, int]], Array],
) -> Path:
    """A graph of one product for each of the shapes [out, in]."""
    with GraphWriter(path) as graph:
        for name, shape in shapes.items():
            given = graph.input(name, np.float32, ["n", shape[1]])
            product = FORMS[form](graph, given, weight(shape), f"{name}.weight")
            graph.node("Identity", [product], graph.output(f"{name}.y", np.float32, ["n", "m"]))
    return path
