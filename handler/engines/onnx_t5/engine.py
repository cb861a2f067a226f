"""The step engine on ONNX Runtime: buffers allocated once, bound once for each number of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.checkpoints.architecture import T5Architecture, relative_position_bucket
from handler.checkpoints.read import Array
from handler.engines.onnx_t5 import build
from handler.engines.onnx_t5.choose import Forms
from handler.engines.onnx_t5.layers import padded_head_size
from handler.engines.onnx_t5.sessions import Binding, open_session
from handler.engines.protocol import Sampler
from handler.errors import LoadError
from handler.machine import available_memory, reserved_memory
from handler.sampling import HostSampler
from handler.tokenizer import Tokenizer


@dataclass(frozen=True)
class EncodedPrompt:
    """What the decoder needs of a prompt: for each layer its keys and values, [2, heads, s, head].

    Not changed by decoding: several rows may use one, at the same time or later.
    """

    keys_values: tuple[Array, ...]

    @property
    def length(self) -> int:
        return int(self.keys_values[0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.keys_values)


class OnnxT5StepEngine:
    """See StepEngine. ``folder`` holds what GraphBuilder wrote for this architecture."""

    # Prompts are encoded one by one: no padding, and the same bits whatever else waits.
    encode_tokens = 1
    sampler: Sampler = HostSampler()
    runs_ahead = False

    def __init__(
        self,
        folder: Path,
        architecture: T5Architecture,
        forms: Forms,
        tokenizer: Tokenizer,
        *,
        max_rows: int,
        max_input_tokens: int,
        max_output_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder_start_token_id = architecture.decoder_start_token_id
        self.max_rows = max_rows
        self.quality_warning = None
        self.max_input_tokens = max_input_tokens
        self.max_output_tokens = max_output_tokens
        self._architecture = architecture
        _check_fit(architecture, max_rows, max_input_tokens, max_output_tokens)
        self._encoder = _Encoder(folder, architecture, max_input_tokens)
        self._embedding = self._encoder.embedding
        sessions = {
            form: open_session(folder / f"{build.decoder_name(form)}.onnx")
            for form in dict(forms.decoder)
        }
        self._decoders = [(sessions[form], most) for form, most in forms.decoder]
        self._rows = _Rows(architecture, max_rows, max_input_tokens, max_output_tokens)
        self._bias = _DecoderBias(folder, architecture, max_rows, max_output_tokens)
        vocabulary = self._decoders[0][0].get_outputs()[0].shape[-1]
        self._logits = np.zeros((max_rows, vocabulary), np.float32)
        self._x = np.zeros((max_rows, 1, architecture.d_model), np.float32)
        self._bindings: dict[int, Binding] = {}

    def encode(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[EncodedPrompt] | None]:
        """Encode, yielding None after each part of the work and the prompts at the end."""
        encoded: list[EncodedPrompt] = []
        for prompt in prompts:
            for part in self._encoder.encode(prompt):
                if part is None:
                    yield None
                else:
                    encoded.append(part)
        yield encoded

    def attach(self, handle: EncodedPrompt, row: int) -> None:
        """Let ``row`` decode against this prompt, from its beginning."""
        self._rows.attach(handle, row)

    def decode(
        self, n: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Array:
        """Tokens [n, q] of rows 0..n-1, the first at positions [n] -> logits [n, q, vocabulary].

        GroupQueryAttention takes one token a row where several rows have a past, so q tokens are q
        steps. The result is good until the next call.
        """
        steps = tokens.shape[1]
        if steps == 1:
            return self._step(n, tokens[:, 0], positions)[:, None]
        return np.stack(
            [self._step(n, tokens[:, k], positions + k).copy() for k in range(steps)], axis=1
        )

    def _step(
        self, n: int, tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> Array:
        """Tokens [n] at positions [n] -> logits [n, vocabulary]"""
        rows = self._rows
        self._x[:n, 0] = self._embedding[tokens]
        rows.past[:n] = positions
        rows.past_longest[0] = int(positions.max()) + 1
        rows.cross_longest[0] = int(rows.cross_past[:n].max()) + 1
        binding = self._bindings.get(n)
        if binding is None:
            binding = self._bindings[n] = self._bind(n)
        for name, bias in self._bias.of(positions):
            binding.input(name, bias)
        binding.run()
        return self._logits[:n]

    def move(self, src: int, dst: int) -> None:
        """Row ``dst`` becomes what row ``src`` is."""
        self._rows.move(src, dst)

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        """Each of ``rows`` goes on from the tokens of its parent, a row on the same prompt."""
        self._rows.reorder(rows, parents)

    def wait(self) -> None:
        """Every call waits for its result by itself."""

    def close(self) -> None:
        self._bindings.clear()
        del self._decoders, self._encoder, self._rows

    def _bind(self, n: int) -> Binding:
        session = next(session for session, most in self._decoders if n <= most)
        binding = Binding(session)
        binding.input("x", self._x[:n])
        binding.output("logits", self._logits[:n, None])
        for name, array in self._rows.inputs(n):
            binding.input(name, array)
        for name, array in self._rows.caches(n):
            binding.input(name, array)
            binding.output(f"{name}_out", array)
        return binding


class _Encoder:
    def __init__(self, folder: Path, a: T5Architecture, longest: int) -> None:
        self.embedding: Array = np.load(folder / build.EMBEDDING, mmap_mode="r")
        self._architecture = a
        distance = np.arange(1 - longest, longest)
        self._bias = _bias_by_distance(folder / build.ENCODER_BIAS, a, distance, True)
        self._longest = longest
        self._groups = [
            (open_session(folder / f"{name}.onnx"), build.bias_names(a, group))
            for name, group in build.encoder_groups(a)
        ]
        self._cross = [
            (open_session(folder / f"{name}.onnx"), [f"kv{i}" for i in group])
            for name, group in build.cross_groups(a)
        ]

    def encode(self, prompt: Sequence[int]) -> Iterator[EncodedPrompt | None]:
        x = self.embedding[np.asarray(prompt)][None]
        biases = self._biases(len(prompt))
        for session, names in self._groups:
            inputs = {name: biases[name] for name in names}
            (x,) = session.run(["y"], {"x": x, **inputs})
            yield None
        keys_values: list[Array] = []
        for session, names in self._cross:
            keys_values += session.run(names, {"x": x})
            yield None
        yield EncodedPrompt(tuple(keys_values))

    def _biases(self, s: int) -> dict[str, Array]:
        """Name of a graph's input -> [1, heads, s, s]"""
        # row i of the window that begins at distance -i holds the biases of its keys 0..s-1
        first = self._longest - 1
        window = self._bias[:, :, first - (s - 1) : first + s]
        square = np.lib.stride_tricks.sliding_window_view(window, s, axis=-1)[:, :, ::-1]
        names = build.bias_names(self._architecture, range(len(self._bias)))
        return {n: np.ascontiguousarray(square[i : i + 1]) for i, n in enumerate(names)}


class _Rows:
    """Keys and values of every row: its own tokens', and its prompt's for cross-attention."""

    def __init__(self, a: T5Architecture, rows: int, prompt: int, output: int) -> None:
        heads, size = a.num_heads, padded_head_size(a)
        layers = range(a.num_decoder_layers)
        self._own = [_reserved((2, rows, heads, output, size)) for _ in layers]
        self._cross = [_reserved((2, rows, heads, prompt, size)) for _ in layers]
        self._last = [np.zeros((2, rows, 1, heads * size), np.float32) for _ in layers]
        self.past = np.zeros(rows, np.int32)
        self.cross_past = np.zeros(rows, np.int32)
        self.past_longest = np.zeros(1, np.int32)
        self.cross_longest = np.zeros(1, np.int32)

    def inputs(self, n: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield "past", self.past[:n]
        yield "past_longest", self.past_longest
        yield "cross_past", self.cross_past[:n]
        yield "cross_past_longest", self.cross_longest
        for i, last in enumerate(self._last):
            yield f"last_ck{i}", last[0, :n]
            yield f"last_cv{i}", last[1, :n]

    def caches(self, n: int) -> Iterator[tuple[str, Array]]:
        for i, (own, cross) in enumerate(zip(self._own, self._cross)):
            yield f"k{i}", own[0, :n]
            yield f"v{i}", own[1, :n]
            yield f"ck{i}", cross[0, :n]
            yield f"cv{i}", cross[1, :n]

    def attach(self, handle: EncodedPrompt, row: int) -> None:
        length = handle.length
        for cross, last, kv in zip(self._cross, self._last, handle.keys_values):
            cross[:, row, :, :length] = kv
            last[:, row, 0] = kv[:, :, -1].reshape(2, -1)
        self.cross_past[row] = length - 1
        self.past[row] = 0

    def move(self, src: int, dst: int) -> None:
        own_length, cross_length = self.past[src] + 1, self.cross_past[src] + 1
        for own, cross, last in zip(self._own, self._cross, self._last):
            own[:, dst, :, :own_length] = own[:, src, :, :own_length]
            cross[:, dst, :, :cross_length] = cross[:, src, :, :cross_length]
            last[:, dst] = last[:, src]
        self.past[dst] = self.past[src]
        self.cross_past[dst] = self.cross_past[src]

    def reorder(self, rows: Sequence[int], parents: Sequence[int]) -> None:
        pairs = [(row, parent) for row, parent in zip(rows, parents) if row != parent]
        if not pairs:
            return
        rows, parents = map(list, zip(*pairs))
        length = int(self.past[parents].max()) + 1
        for own in self._own:
            own[:, rows, :, :length] = own[:, parents, :, :length]
        self.past[rows] = self.past[parents]


def _check_fit(a: T5Architecture, rows: int, prompt: int, output: int) -> None:
    size = a.num_heads * padded_head_size(a)
    needed = 2 * a.num_decoder_layers * rows * size * (prompt + output) * 4
    available = available_memory()
    if available is not None and needed > available:
        raise LoadError(
            f"the keys and values of {rows} rows take up to {needed / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB are free; lower option.max_rows, "
            "option.max_input_tokens or option.max_output_tokens"
        )


def _reserved(shape: tuple[int, ...]) -> Array:
    return np.frombuffer(reserved_memory(4 * math.prod(shape)), np.float32).reshape(shape)


class _DecoderBias:
    """The decoder's relative biases for one step, cut from one array that is made at load."""

    def __init__(self, folder: Path, a: T5Architecture, rows: int, output: int) -> None:
        # [tables, heads, output]: the bias at distance -(output - 1), ..., 0
        distance = np.arange(1 - output, 1)
        self._by_distance = _bias_by_distance(folder / build.DECODER_BIAS, a, distance, False)
        self._names = build.bias_names(a, range(len(self._by_distance)))
        self._heads, self._output = a.num_heads, output
        self._buffers = np.zeros((len(self._names), rows * a.num_heads * output), np.float32)

    def of(self, positions: npt.NDArray[np.int64]) -> Iterator[tuple[str, Array]]:
        """Name of an input -> [n, heads, 1, longest position + 1]"""
        places = positions.tolist()
        longest = max(places) + 1
        shape = (len(places), self._heads, 1, longest)
        for name, table, buffer in zip(self._names, self._by_distance, self._buffers):
            bias = buffer[: len(places) * self._heads * longest].reshape(shape)
            for row, position in enumerate(places):
                bias[row, :, 0, : position + 1] = table[:, self._output - 1 - position :]
            yield name, bias


def _bias_by_distance(
    file: Path, a: T5Architecture, distance: npt.NDArray[np.int64], bidirectional: bool
) -> Array:
    """[tables, heads, distances]"""
    buckets = relative_position_bucket(
        distance,
        bidirectional=bidirectional,
        num_buckets=a.num_buckets,
        max_distance=a.max_distance,
    )
    tables: Array = np.load(file)
    return np.ascontiguousarray(tables[:, buckets].transpose(0, 2, 1))
