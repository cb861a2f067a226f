"""The graphs of one model: encoder layers in groups, cross-attention keys and values, decoder.

s: tokens of the one prompt that an encoder graph reads; n: rows that decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from handler.checkpoints.architecture import T5Architecture
from handler.checkpoints.read import Array, Weights
from handler.checkpoints.tensors import check_tensors, embedding_name, head_name
from handler.engines.onnx_t5.choose import Forms
from handler.engines.onnx_t5.graph import CONTRIB, GraphWriter, Shape
from handler.engines.onnx_t5.layers import Layers, padded_head_size
from handler.engines.onnx_t5.linear import FORMS

# Counts up when graphs of an older version must not be used.
_LAYOUT = 3
# Weights of one encoder graph: rows that decode wait for at most one of them at a time.
_GROUP_WEIGHTS = 8_000_000

EMBEDDING = "embedding.npy"
ENCODER_BIAS, DECODER_BIAS = "encoder_bias.npy", "decoder_bias.npy"


@dataclass(frozen=True)
class GraphBuilder:
    """Writes the graphs and arrays of a model into a folder."""

    architecture: T5Architecture
    weights: Weights
    forms: Forms

    @property
    def settings(self) -> str:
        """All that decides about the graphs besides the weights."""
        forms = self.forms.encoder, *dict(self.forms.decoder)
        return repr((_LAYOUT, self.architecture, forms))

    def build(self, folder: Path) -> None:
        """Raises LoadError naming the tensor that is missing or wrong."""
        a = self.architecture
        check_tensors(self.weights, a)
        embedding = self.weights.get(embedding_name(self.weights), (a.vocab_size, a.d_model))
        np.save(folder / EMBEDDING, embedding)
        del embedding
        np.save(folder / ENCODER_BIAS, self._bias_tables("encoder"))
        np.save(folder / DECODER_BIAS, self._bias_tables("decoder"))
        for name, layers in encoder_groups(a):
            self._encoder_group(folder, name, layers)
        for name, layers in cross_groups(a):
            self._cross_group(folder, name, layers)
        for form in dict(self.forms.decoder):
            self._decoder(folder, form)

    def _layers(self, graph: GraphWriter, form: str) -> Layers:
        return Layers(graph, self.architecture, self.weights, FORMS[form])

    def _bias_tables(self, stack: str) -> Array:
        """[tables, buckets, heads]: one table, or one a layer."""
        a = self.architecture
        layers = a.num_layers if stack == "encoder" else a.num_decoder_layers
        count = layers if a.bias_in_every_layer else 1
        name = "{}.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
        tables = [
            self.weights.get(name.format(stack, i), (a.num_buckets, a.num_heads))
            for i in range(count)
        ]
        return np.stack(tables)

    def _encoder_group(self, folder: Path, name: str, group: range) -> None:
        """x [1, s, d_model], bias [1, heads, s, s] -> x"""
        a = self.architecture
        with GraphWriter(folder / f"{name}.onnx") as graph:
            layers = self._layers(graph, self.forms.encoder)
            x = graph.input("x", np.float32, [1, "s", a.d_model])
            biases = [
                graph.input(bias, np.float32, [1, a.num_heads, "s", "s"])
                for bias in bias_names(a, group)
            ]
            normed = layers.norm(x, f"encoder.block.{group[0]}.layer.0.layer_norm")
            for k, i in enumerate(group):
                place = f"encoder.block.{i}.layer"
                attended = self._self_attention(
                    layers, normed, f"{place}.0.SelfAttention", biases[k % len(biases)]
                )
                normed, x = layers.add_and_norm(x, attended, f"{place}.1.layer_norm")
                hidden = layers.feed_forward(normed, f"{place}.1.DenseReluDense")
                if i == group[-1]:
                    graph.node(
                        "Add", [x, hidden], graph.output("y", np.float32, [1, "s", a.d_model])
                    )
                else:
                    normed, x = layers.add_and_norm(
                        x, hidden, f"encoder.block.{i + 1}.layer.0.layer_norm"
                    )

    def _self_attention(self, layers: Layers, x: str, place: str, bias: str) -> str:
        heads = self.architecture.num_heads
        qkv = layers.joined(x, place, "qkv")
        q, k, v = layers.graph.nodes("Split", [qkv], 3, axis=-1, num_outputs=3)
        attended = layers.graph.node(
            "MultiHeadAttention",
            [q, k, v, "", "", bias],
            domain=CONTRIB,
            num_heads=heads,
            scale=1.0,
        )
        return layers.attention_output(attended, place)

    def _cross_group(self, folder: Path, name: str, group: range) -> None:
        """x [1, s, d_model] -> the group's cross-attention keys and values, [2, heads, s, head]"""
        a, size = self.architecture, padded_head_size(self.architecture)
        with GraphWriter(folder / f"{name}.onnx") as graph:
            layers = self._layers(graph, self.forms.encoder)
            x = graph.input("x", np.float32, [1, "s", a.d_model])
            encoded = layers.norm(x, "encoder.final_layer_norm")
            shape = graph.constant([-1, 2, a.num_heads, size], np.int64)
            for i in group:
                kv = layers.joined(encoded, f"decoder.block.{i}.layer.1.EncDecAttention", "kv")
                graph.node(
                    "Transpose",
                    [graph.node("Reshape", [kv, shape])],
                    graph.output(f"kv{i}", np.float32, [2, a.num_heads, "s", size]),
                    perm=[1, 2, 0, 3],
                )

    def _decoder(self, folder: Path, form: str) -> None:
        """One step: x [n, 1, d_model] -> logits [n, 1, vocabulary]; keys/values grow in place.

        Both attentions are GroupQueryAttention, which reads each row's true length. It always
        appends a key and a value; to cross-attention it is given the prompt's last ones again.
        """
        a = self.architecture
        with GraphWriter(folder / f"{decoder_name(form)}.onnx") as graph:
            layers = self._layers(graph, form)
            x = graph.input("x", np.float32, ["n", 1, a.d_model])
            graph.output("logits", np.float32, ["n", 1, a.vocab_size])
            for length in ("past", "cross_past"):
                graph.input(length, np.int32, ["n"])
                graph.input(f"{length}_longest", np.int32, [1])
            biases = [
                graph.input(bias, np.float32, ["n", a.num_heads, 1, "t"])
                for bias in bias_names(a, range(a.num_decoder_layers))
            ]
            normed = layers.norm(x, "decoder.block.0.layer.0.layer_norm")
            for i in range(a.num_decoder_layers):
                place = f"decoder.block.{i}.layer"
                bias = biases[i % len(biases)]
                attended = self._cached_self_attention(layers, normed, place, i, bias)
                normed, x = layers.add_and_norm(x, attended, f"{place}.1.layer_norm")
                attended = self._cross_attention(layers, normed, place, i)
                normed, x = layers.add_and_norm(x, attended, f"{place}.2.layer_norm")
                hidden = layers.feed_forward(normed, f"{place}.2.DenseReluDense")
                normed, x = self._next_norm(layers, x, hidden, i)
            self._head(layers, normed)

    def _cached_self_attention(self, layers: Layers, x: str, place: str, i: int, bias: str) -> str:
        place = f"{place}.0.SelfAttention"
        qkv = layers.joined(x, place, "qkv")
        attended = self._grouped_attention(
            layers.graph, [qkv, "", ""], (f"k{i}", f"v{i}"), "past", bias
        )
        return layers.attention_output(attended, place)

    def _cross_attention(self, layers: Layers, x: str, place: str, i: int) -> str:
        a, place = self.architecture, f"{place}.1.EncDecAttention"
        width = a.num_heads * padded_head_size(a)
        last = [
            layers.graph.input(name, np.float32, ["n", 1, width])
            for name in (f"last_ck{i}", f"last_cv{i}")
        ]
        q = layers.joined(x, place, "q")
        attended = self._grouped_attention(
            layers.graph, [q, *last], (f"ck{i}", f"cv{i}"), "cross_past", ""
        )
        return layers.attention_output(attended, place)

    def _grouped_attention(
        self, graph: GraphWriter, qkv: list[str], cache: tuple[str, str], length: str, bias: str
    ) -> str:
        """``cache``: names of the buffers of keys and values, bound as input and as output."""
        a = self.architecture
        shape: Shape = ["n", a.num_heads, f"{length}_capacity", padded_head_size(a)]
        for name in cache:
            graph.input(name, np.float32, shape)
            graph.output(f"{name}_out", np.float32, shape)
        attended, _, _ = graph.nodes(
            "GroupQueryAttention",
            [*qkv, *cache, length, f"{length}_longest", "", "", "", bias],
            [graph.fresh("attended"), *(f"{name}_out" for name in cache)],
            domain=CONTRIB,
            num_heads=a.num_heads,
            kv_num_heads=a.num_heads,
            scale=1.0,
        )
        return attended

    def _next_norm(self, layers: Layers, x: str, hidden: str, i: int) -> tuple[str, str]:
        a = self.architecture
        if i + 1 < a.num_decoder_layers:
            return layers.add_and_norm(x, hidden, f"decoder.block.{i + 1}.layer.0.layer_norm")
        scale = a.d_model**-0.5 if a.scale_logits else 1.0
        return layers.add_and_norm(x, hidden, "decoder.final_layer_norm", scale)

    def _head(self, layers: Layers, x: str) -> None:
        a = self.architecture
        weight = layers.matrix(head_name(self.weights, a), (a.vocab_size, a.d_model))
        layers.graph.node("Identity", [layers.linear(x, weight, "lm_head")], "logits")


def decoder_name(form: str) -> str:
    return f"decoder_{form}"


def bias_names(architecture: T5Architecture, group: range) -> list[str]:
    """Inputs for the relative biases of a group of layers: one for all, or one each."""
    if architecture.bias_in_every_layer:
        return [f"bias{i}" for i in group]
    return ["bias"]


def encoder_groups(a: T5Architecture) -> Iterator[tuple[str, range]]:
    """(graph name, its layers) in their order."""
    attention = 4 * a.d_model * a.num_heads * a.d_kv
    feed_forward = (3 if a.gated else 2) * a.d_model * a.d_ff
    return _groups("encoder", a.num_layers, attention + feed_forward)


def cross_groups(a: T5Architecture) -> Iterator[tuple[str, range]]:
    """(graph name, decoder layers whose cross-attention keys and values it makes)."""
    return _groups("cross", a.num_decoder_layers, 2 * a.d_model * a.num_heads * a.d_kv)


def _groups(name: str, layers: int, weights_of_one: int) -> Iterator[tuple[str, range]]:
    size = max(1, _GROUP_WEIGHTS // weights_of_one)
    for start in range(0, layers, size):
        yield f"{name}{start}", range(start, min(start + size, layers))
