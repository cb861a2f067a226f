"""Writing one ONNX graph: nodes by their operator, large weights straight to a file beside it.

onnx is imported where a graph is made: a start that finds its graphs does without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

CONTRIB = "com.microsoft"
_OPSET, _IR_VERSION = 18, 9
# Larger tensors go to the data file; offsets there are page-aligned so that they can be mapped.
_INLINE_BYTES = 1024
_PAGE = 4096

Shape = Sequence["int | str"]


class GraphWriter:
    """One graph in the making. As a context: the file is complete when the block ends.

    Weights are written as they come and not kept, so building needs memory for one tensor only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data_path = path.with_suffix(".data")
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def __enter__(self) -> GraphWriter:
        self._data = self._data_path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._data.close()
        if error is None:
            self._path.write_bytes(self._model().SerializeToString())

    def input(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> str:
        """Declare an output; give its name to the node that makes it."""
        self._outputs.append(_value_info(name, dtype, shape))
        return name

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """A small array, one copy however often it is asked for."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, array: npt.NDArray[Any]) -> str:
        from onnx import TensorProto, helper, numpy_helper

        array = np.ascontiguousarray(array)
        if array.nbytes <= _INLINE_BYTES:
            self._constants[name] = numpy_helper.from_array(array, name)
            return name
        offset = -(-self._data.tell() // _PAGE) * _PAGE
        self._data.seek(offset)
        array.tofile(self._data)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", self._data_path.name),
            ("offset", offset),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self._constants[name] = tensor
        return name

    def node(
        self, operator: str, inputs: Sequence[str], output: str = "", domain: str = "", **attrs: Any
    ) -> str:
        """Add a node of one output and return its name."""
        return self.nodes(operator, inputs, [output or self.fresh(operator)], domain, **attrs)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | int,
        domain: str = "",
        **attrs: Any,
    ) -> list[str]:
        """Add a node of several outputs (their names, or how many) and return their names."""
        from onnx import helper

        if isinstance(outputs, int):
            outputs = [self.fresh(operator) for _ in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attrs))
        return list(outputs)

    def fresh(self, operator: str) -> str:
        """A name for a value that none has yet."""
        self._count += 1
        return f"{operator}_{self._count}"

    def _model(self) -> onnx.ModelProto:
        from onnx import helper

        graph = helper.make_graph(
            self._nodes,
            self._path.stem,
            self._inputs,
            self._outputs,
            list(self._constants.values()),
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def _value_info(name: str, dtype: npt.DTypeLike, shape: Shape) -> onnx.ValueInfoProto:
    from onnx import helper

    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, element, shape)
