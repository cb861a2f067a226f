"""The layers of T5 as ONNX nodes: norms, attention, feed-forward. Shapes are in the comments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.native_layout import NativeWeights
from handler.checkpoints.quantized import Weight, joined_rows, over_columns, over_rows
from handler.checkpoints.read import Weights
from handler.engines.onnx_t5.graph import CONTRIB, GraphWriter
from handler.engines.onnx_t5.linear import LinearForm

# GroupQueryAttention wants head sizes of a multiple of 8; the heads are padded with zeros.
_HEAD_MULTIPLE = 8


def padded_head_size(architecture: T5Architecture) -> int:
    return -(-architecture.d_kv // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


@dataclass(frozen=True)
class Layers:
    """Makes the layers of one graph, with weights from a checkpoint in one form."""

    graph: GraphWriter
    architecture: T5Architecture
    weights: Weights
    form: LinearForm

    def linear(self, x: str, weight: Weight, name: str) -> str:
        return self.form(self.graph, x, weight, name)

    def matrix(self, name: str, shape: tuple[int, int]) -> Weight:
        """[out, in], quantized where it is stored so."""
        if isinstance(self.weights, NativeWeights):
            return self.weights.linear(name, shape)
        return self.weights.get(name, shape)

    def norm(self, x: str, place: str, scale: float = 1.0) -> str:
        return self.graph.node(
            "SimplifiedLayerNormalization",
            [x, self._gamma(place, scale)],
            axis=-1,
            epsilon=self.architecture.epsilon,
        )

    def add_and_norm(
        self, x: str, residual: str, place: str, scale: float = 1.0
    ) -> tuple[str, str]:
        """(norm(x + residual), x + residual)"""
        normed, _, _, total = self.graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, residual, self._gamma(place, scale)],
            [self.graph.fresh("normed"), "", "", self.graph.fresh("residual")],
            domain=CONTRIB,
            epsilon=self.architecture.epsilon,
        )
        return normed, total

    def feed_forward(self, x: str, place: str) -> str:
        """x [1 or n, tokens, d_model] -> the same"""
        a = self.architecture
        names = ("wi_0", "wi_1") if a.gated else ("wi",)
        wi = [self.matrix(f"{place}.{name}.weight", (a.d_ff, a.d_model)) for name in names]
        hidden = self.linear(x, joined_rows(wi), f"{place}.wi")
        if a.gated:
            gate, up = self.graph.nodes("Split", [hidden], 2, axis=-1, num_outputs=2)
            hidden = self.graph.node("Mul", [self._activated(gate), up])
        else:
            hidden = self._activated(hidden)
        wo = self.matrix(f"{place}.wo.weight", (a.d_model, a.d_ff))
        return self.linear(hidden, wo, f"{place}.wo")

    def joined(self, x: str, place: str, names: str) -> str:
        """One product for several of q, k, v: [..., len(names) * heads * padded head size]."""
        return self.linear(
            x,
            joined_rows([self._heads(f"{place}.{name}.weight") for name in names]),
            f"{place}.{names}",
        )

    def attention_output(self, x: str, place: str) -> str:
        a = self.architecture
        o = self.matrix(f"{place}.o.weight", (a.d_model, a.num_heads * a.d_kv))
        return self.linear(x, over_columns(o, self._padded), f"{place}.o")

    def _heads(self, name: str) -> Weight:
        a = self.architecture
        return over_rows(self.matrix(name, (a.num_heads * a.d_kv, a.d_model)), self._padded)

    def _padded(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[heads * d_kv, ...] -> [heads * padded head size, ...]"""
        a, size = self.architecture, padded_head_size(self.architecture)
        if size == a.d_kv:
            return array
        heads = array.reshape(a.num_heads, a.d_kv, -1)
        padding = ((0, 0), (0, size - a.d_kv), (0, 0))
        return np.pad(heads, padding).reshape(a.num_heads * size, *array.shape[1:])

    def _gamma(self, place: str, scale: float) -> str:
        name = f"{place}.weight"
        gamma = self.weights.get(name, (self.architecture.d_model,))
        return self.graph.weight(name, (gamma * np.float32(scale)).astype(np.float32))

    def _activated(self, x: str) -> str:
        graph = self.graph
        if self.architecture.activation == "relu":
            return graph.node("Relu", [x])
        if self.architecture.activation == "gelu_new":
            return graph.node("FastGelu", [x], domain=CONTRIB)
        if self.architecture.activation == "silu":
            return graph.node("QuickGelu", [x], domain=CONTRIB, alpha=1.0)
        return graph.node("Gelu", [x], domain=CONTRIB)
