"""The forms in which a linear layer's weights are stored and multiplied.

Every form gives a row the same bits whatever rows are beside it. That rules out DynamicQuantize-
MatMul (one scale for all rows) and MatMulNBits with blocks above 64 or in fp32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from handler.checkpoints.read import Array
from handler.engines.onnx_t5.graph import CONTRIB, GraphWriter

LinearForm = Callable[[GraphWriter, str, Array, str], str]
"""(graph, x [..., in], weight [out, in], name) -> y [..., out]"""

_INT8_MAX = 127
# Kernels without VNNI add pairs of products in 16 bits: 2 * 255 * 127 would saturate there.
_INT8_MAX_WITHOUT_VNNI = 63
_ZERO_POINT = 128
_TINY = 1e-30


def _fp32(graph: GraphWriter, x: str, weight: Array, name: str) -> str:
    return graph.node("MatMul", [x, graph.weight(name, weight.T)])


def _int8_blocks(graph: GraphWriter, x: str, weight: Array, name: str) -> str:
    """8-bit weights with a scale for each block of inputs; activations likewise, at run time.

    accuracy_level=4 multiplies in int8.
    """
    rows, columns = weight.shape
    size = 64 if columns % 64 == 0 else 32
    blocks = -(-columns // size)
    padded = np.zeros((rows, blocks * size), np.float32)
    padded[:, :columns] = weight
    padded = padded.reshape(rows, blocks, size)
    scales = np.maximum(np.abs(padded).max(-1) / _INT8_MAX, _TINY).astype(np.float32)
    quantized = np.round(padded / scales[..., None]) + _ZERO_POINT
    return graph.node(
        "MatMulNBits",
        [
            x,
            graph.weight(f"{name}.blocks", quantized.astype(np.uint8)),
            graph.weight(f"{name}.scales", scales),
        ],
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=8,
        block_size=size,
        accuracy_level=4,
    )


def _int8_rows(largest: int) -> LinearForm:
    """8-bit weights with a scale for each output; activations with one for each row of x."""

    def linear(graph: GraphWriter, x: str, weight: Array, name: str) -> str:
        scales = np.maximum(np.abs(weight).max(1) / largest, _TINY).astype(np.float32)
        quantized = np.round(weight / scales[:, None]).astype(np.int8)
        unit = graph.constant(1 / _INT8_MAX, np.float32)
        zero = graph.constant(_ZERO_POINT, np.uint8)
        biggest = graph.node(
            "ReduceMax", [graph.node("Abs", [x]), graph.constant([-1], np.int64)], keepdims=1
        )
        biggest = graph.node("Max", [biggest, graph.constant(_TINY, np.float32)])
        x8 = graph.node("QuantizeLinear", [graph.node("Div", [x, biggest]), unit, zero])
        y = graph.node(
            "MatMulIntegerToFloat",
            [
                x8,
                graph.weight(f"{name}.rows", quantized.T),
                unit,
                graph.weight(f"{name}.scales", scales),
                zero,
            ],
            domain=CONTRIB,
        )
        return graph.node("Mul", [y, biggest])

    return linear


FORMS: dict[str, LinearForm] = {
    "fp32": _fp32,
    "int8_blocks": _int8_blocks,
    "int8_rows": _int8_rows(_INT8_MAX),
    "int8_rows_63": _int8_rows(_INT8_MAX_WITHOUT_VNNI),
}
