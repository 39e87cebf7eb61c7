"""Float32 islands: which nodes of a model stay float32 when the rest computes in 16 bits.

What has to stay is found first: what the user asked for, tensors that would overflow, constants that would be
lost, operators that ONNX does not define in 16 bits. Then the borders are drawn: of the nodes between that may
have either type each gets the one with which the fewest bytes go through casts. That is a minimum cut
(Boykov, Veksler and Zabih, 2001), and exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from .onnx_floats import FloatGraph, Role, inner_graphs
from .onnx_graph import MOVING, WEIGHTED
from .onnx_names import NODE, properties
from .onnx_spelling import REFUSED
from .onnx_values import tensor_values

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["required_islands", "spread"]

_BOUNDING: Final = frozenset({"Clip", "Max", "Min"})
"""A bound beyond what a type holds bounds nothing, so the type's own extreme may stand for it."""
_CAST_BYTES: Final = 6
_KEPT_BYTES: Final = 2
"""A cast between float32 and 16 bits moves 6 bytes for each element; keeping one in float32 costs 2 more."""


def required_islands(graph: FloatGraph, wanted: Mapping[str, str], largest: Mapping[str, float]) -> dict[int, str]:
    """Nodes that have to compute in float32, and why.

    Args:
        graph: The model.
        wanted: FX node name to reason: what the user wants in float32.
        largest: Tensor name to the largest magnitude that was seen there.

    Returns:
        Index of node to reason.
    """
    found: dict[int, str] = {}
    pinned = _extreme_tensors(graph, largest)
    for name in graph.captured:
        if graph.is_float(name):
            pinned[name] = f"{name} is read inside a branch or loop"
    for i, node in enumerate(graph.nodes):
        if graph.roles[i] is not Role.COMPUTE:
            continue
        reason = _reason(graph, i, wanted)
        if reason is not None:
            found[i] = reason
        lost = _lost_constant(graph, i)
        if lost is not None:
            found.setdefault(i, lost)
            pinned.update(dict.fromkeys(graph.float_outputs(i), lost))
        if node.op_type in MOVING and node.input[0] in pinned:  # what is merely moved keeps its range
            pinned.update({name: pinned[node.input[0]] for name in graph.float_outputs(i) if name not in pinned})
    for name, why in pinned.items():
        touching = [graph.producer[name]] if name in graph.producer else []
        for i in (*touching, *(i for i, _ in graph.readers[name])):
            if graph.roles[i] is Role.COMPUTE:
                found.setdefault(i, why)
    return found


def _reason(graph: FloatGraph, index: int, wanted: Mapping[str, str]) -> str | None:
    node = graph.nodes[index]
    asked = wanted.get(properties(node).get(NODE, ""))
    if asked is not None:
        return asked
    if inner_graphs(node):
        return f"{node.op_type} has graphs of its own"
    if not graph.can_compute(index):
        return f"ONNX's opset {graph.opset} has no {node.op_type} in {graph.compute.onnx_name}"
    return REFUSED.get(graph.compute.onnx_name, {}).get(node.op_type)


def _extreme_tensors(graph: FloatGraph, largest: Mapping[str, float]) -> dict[str, str]:
    """Tensors that the compute dtype has no room for, by what was seen and by the scales of their quantizers."""
    kind = graph.compute
    found = {
        name: f"magnitudes up to {value:.3g} leave {kind.onnx_name} no headroom"
        for name, value in largest.items()
        if value > kind.headroom and graph.is_float(name)
    }
    for i, node in enumerate(graph.nodes):
        if graph.roles[i] is not Role.QUANTIZE and node.op_type != "DequantizeLinear":
            continue
        name = node.input[0] if graph.roles[i] is Role.QUANTIZE else node.output[0]
        scale = _values(graph, node.input[1])
        if scale is None or scale.dtype != "float32" or (name == node.output[0] and node.input[0] in graph.constants):
            continue
        if not kind.holds(scale, closely=True) or float(scale.max()) * 127 > kind.headroom:
            found.setdefault(name, f"a scale of {float(scale.max()):.3g} is beyond {kind.onnx_name}")
    return found


def _lost_constant(graph: FloatGraph, index: int) -> str | None:
    """Why a node's float constants do not survive in the compute dtype; None if they do."""
    node = graph.nodes[index]
    for _, name in graph.float_inputs(index):
        values = _values(graph, name)
        if values is None:
            continue
        alone = values.size == 1
        if graph.compute.holds(values, closely=alone):
            continue
        if node.op_type in _BOUNDING and alone and abs(float(values)) > graph.compute.largest:
            continue
        shown = f"{float(values.ravel()[0]):.3g}" if alone else f"values up to {float(abs(values).max()):.3g}"
        return f"its constant {name} ({shown}) is beyond {graph.compute.onnx_name}"
    return None


def _values(graph: FloatGraph, name: str) -> npt.NDArray[np.float32] | None:
    tensor = graph.constants.get(name)
    return None if tensor is None else tensor_values(tensor, "")


def spread(graph: FloatGraph, required: Iterable[int], *, float_io: bool) -> set[int]:
    """The nodes that compute in float32 so that the fewest bytes go through casts.

    Convolutions and matrix products that need not stay float32 never do.

    Args:
        graph: The model.
        required: Indices of nodes that have to be float32.
        float_io: Whether the model's float inputs and outputs are float32.

    Returns:
        Indices of nodes, those required among them.
    """
    import networkx as nx

    net: Any = nx.DiGraph()
    net.add_node(_FLOAT)
    net.add_node(_NARROW)
    for i, role in enumerate(graph.roles):
        if role is not Role.COMPUTE:
            continue
        if graph.nodes[i].op_type in WEIGHTED:
            net.add_edge(i, _NARROW)  # an edge without a capacity is never cut
        else:
            kept = sum(graph.elements(name) for name in graph.float_outputs(i))
            net.add_edge(i, _NARROW, capacity=_KEPT_BYTES * kept)
    for i in required:
        net.remove_node(i)
        net.add_edge(_FLOAT, i)
    for name in (*graph.inputs, *graph.producer):
        if graph.is_float(name):
            _add_tensor(net, graph, name, _FLOAT if float_io else _NARROW)
    # From the other end: networkx gives the side of the second terminal as few nodes as an optimum can have.
    _, (_, float_side) = nx.minimum_cut(net.reverse(), _NARROW, _FLOAT)
    return {i for i in float_side if isinstance(i, int)}


_FLOAT: Final = "float32"
_NARROW: Final = "16 bits"


def _add_tensor(net: Any, graph: FloatGraph, name: str, boundary: str) -> None:
    """A tensor whose writer has one type costs one cast, however many of its readers have the other."""
    readers: list[int | str] = [i for i, _ in graph.readers[name] if graph.roles[i] is Role.COMPUTE]
    if name in graph.outputs:
        readers.append(boundary)
    index = graph.producer.get(name)
    writer: int | str = boundary if index is None else index
    if (index is not None and graph.roles[index] is not Role.COMPUTE) or not readers:
        return  # made in any type for nothing
    price = _CAST_BYTES * graph.elements(name)
    down, up = f"down {name}", f"up {name}"
    net.add_edge(writer, down, capacity=price)
    net.add_edge(up, writer, capacity=price)
    for reader in readers:
        net.add_edge(down, reader)
        net.add_edge(reader, up)
