"""The forms in which a linear layer's weights are stored and multiplied.

Every form gives a row the same bits whatever rows are beside it. That rules out DynamicQuantize-
MatMul (one scale for all rows) and MatMulNBits with blocks above 64 or in fp32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from handler.checkpoints.quantized import (
    INT8_MAX,
    TINY,
    QuantizedWeight,
    Weight,
    quantize,
    row_scales,
)
from handler.engines.onnx_t5.graph import CONTRIB, GraphWriter

LinearForm = Callable[[GraphWriter, str, Weight, str], str]
"""(graph, x [..., in], weight [out, in], name) -> y [..., out]

A weight that is quantized already is taken as it is, by the int8 forms that have all 8 bits.
"""

# Kernels without VNNI add pairs of products in 16 bits: 2 * 255 * 127 would saturate there.
_INT8_MAX_WITHOUT_VNNI = 63
_ZERO_POINT = 128


def _fp32(graph: GraphWriter, x: str, weight: Weight, name: str) -> str:
    assert not isinstance(weight, QuantizedWeight)
    return graph.node("MatMul", [x, graph.weight(name, weight.T)])


def _int8_blocks(graph: GraphWriter, x: str, weight: Weight, name: str) -> str:
    """8-bit weights with a scale for each block of inputs; activations likewise, at run time.

    accuracy_level=4 multiplies in int8.
    """
    rows, columns = weight.values.shape if isinstance(weight, QuantizedWeight) else weight.shape
    size = 64 if columns % 64 == 0 else 32
    if isinstance(weight, QuantizedWeight):  # each block has its row's scale
        values = _in_blocks(weight.values, size)
        scales = np.repeat(weight.scales[:, None], values.shape[1], axis=1)
    else:
        padded = _in_blocks(weight, size)
        scales = row_scales(padded)
        values = quantize(padded, scales)
    quantized = values.view(np.uint8) ^ _ZERO_POINT  # value + 128
    return graph.node(
        "MatMulNBits",
        [
            x,
            graph.weight(f"{name}.blocks", quantized),
            graph.weight(f"{name}.scales", scales),
        ],
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=8,
        block_size=size,
        accuracy_level=4,
    )


def _in_blocks(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """[out, in] -> [out, blocks, size], the last block filled up with zeros"""
    rows, columns = array.shape
    blocks = -(-columns // size)
    if columns == blocks * size:
        return array.reshape(rows, blocks, size)
    padded = np.zeros((rows, blocks * size), array.dtype)
    padded[:, :columns] = array
    return padded.reshape(rows, blocks, size)


def _int8_rows(largest: int) -> LinearForm:
    """8-bit weights with a scale for each output; activations with one for each row of x."""

    def linear(graph: GraphWriter, x: str, weight: Weight, name: str) -> str:
        if not isinstance(weight, QuantizedWeight):
            scales = row_scales(weight, largest)
            weight = QuantizedWeight(quantize(weight, scales), scales)
        unit = graph.constant(1 / INT8_MAX, np.float32)
        zero = graph.constant(_ZERO_POINT, np.uint8)
        biggest = graph.node(
            "ReduceMax", [graph.node("Abs", [x]), graph.constant([-1], np.int64)], keepdims=1
        )
        biggest = graph.node("Max", [biggest, graph.constant(TINY, np.float32)])
        x8 = graph.node("QuantizeLinear", [graph.node("Div", [x, biggest]), unit, zero])
        y = graph.node(
            "MatMulIntegerToFloat",
            [
                x8,
                graph.weight(f"{name}.rows", weight.values.T),
                unit,
                graph.weight(f"{name}.scales", weight.scales),
                zero,
            ],
            domain=CONTRIB,
        )
        return graph.node("Mul", [y, biggest])

    return linear


FORMS: dict[str, LinearForm] = {
    "fp32": _fp32,
    "int8_blocks": _int8_blocks,
    "int8_rows": _int8_rows(INT8_MAX),
    "int8_rows_63": _int8_rows(_INT8_MAX_WITHOUT_VNNI),
}
