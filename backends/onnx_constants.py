"""Values of an ONNX graph's constants, computed from what the file stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import FxqError
from .onnx_graph import OnnxGraph

if TYPE_CHECKING:
    import onnx

__all__ = ["can_compute", "compute"]

COMPUTED: Final = frozenset(
    {
        *("Clip", "DequantizeLinear", "Flatten", "Identity", "Max", "Min"),
        *("QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
"""Operations that :func:`compute` carries out."""
OPSETS: Final = (13, 21)
"""Between these they mean the same; from the second one on, ONNX's reference implementation has all of them."""


def can_compute(graph: OnnxGraph, name: str) -> bool:
    """Whether :func:`compute` gives a tensor's value."""
    if graph.stored(name):
        return True
    node = graph.producers.get(name) if graph.opset >= OPSETS[0] else None
    if node is None or name not in graph.fixed or node.domain or node.op not in COMPUTED:
        return False
    return all(can_compute(graph, i) for i in node.inputs if i)


def compute(graph: OnnxGraph, name: str) -> npt.NDArray[Any]:
    """A constant tensor's value in its own type, by ONNX's reference implementation of the steps that lead to it.

    Args:
        graph: The graph.
        name: A tensor that :func:`can_compute`.

    Raises:
        FxqError: A stored value lies in a file that cannot be read.
    """
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    steps, given = _steps_to(graph, name)
    if name in given:
        return given[name]
    inputs = [
        helper.make_tensor_value_info(tensor, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for tensor, value in given.items()
    ]
    output = helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None)
    opsets = [helper.make_opsetid("", max(graph.opset, OPSETS[1]))]
    model = helper.make_model(helper.make_graph(steps, "constant", inputs, [output]), opset_imports=opsets)
    (value,) = ReferenceEvaluator(model).run(None, given)
    return np.asarray(value)


def _steps_to(graph: OnnxGraph, name: str) -> tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]]]:
    """The nodes that lead to a constant, in the file's order, and the stored values that they begin with."""
    found: set[int] = set()
    given: dict[str, npt.NDArray[Any]] = {}
    wanted = [name]
    while wanted:
        name = wanted.pop()
        if graph.stored(name):
            given[name] = _stored(graph, name)
        elif name and (index := graph.producers[name].index) not in found:
            found.add(index)
            wanted += graph.nodes[index].inputs
    return [graph.proto(graph.nodes[index]) for index in sorted(found)], given


def _stored(graph: OnnxGraph, name: str) -> npt.NDArray[Any]:
    value = graph.stored_value(name)
    if value is None:
        raise FxqError(f"the values of {name!r} lie in a file out of reach", hint="give the model as a file")
    return np.asarray(value)
