"""An ONNX graph as kernels read it: behind views, and without what needs no kernel."""

from __future__ import annotations

from typing import Final

from .onnx_check_kernels import quantized_type
from .onnx_check_numbers import output_axis, scale_axis
from .onnx_graph import OnnxGraph
from .onnx_nodes import Node, Reader
from .trt_fusions import closed_region, host_values, is_view

__all__ = ["DTYPES", "KernelGraph", "broadcasts", "runs_in"]

DTYPES: Final = {"float": "float32", "double": "float64", "float8e4m3fn": "float8", "float4e2m1": "float4"}
"""ONNX's names of types that TensorRT calls otherwise."""


def runs_in(graph: OnnxGraph, node: Node) -> str | None:
    """The low precision that a weighted operation runs in; None for float (R13, R16, R20, R27, R32).

    Args:
        graph: The graph.
        node: A convolution or matrix product.
    """
    kind = quantized_type(graph, node)
    if kind not in {"int8", "float8e4m3fn"}:
        return None
    activations, weights = ([d for d in graph.dequantizers(name) if d is not None] for name in node.inputs[:2])
    if any(dq.axis is not None for dq in activations) or any(not dq.same(activations[0]) for dq in activations):
        return None
    for dq in weights:
        axis = scale_axis(graph, node.inputs[1], dq) if node.inputs[1] in graph.fixed and dq.axis is not None else None
        if axis is not None and axis != output_axis(graph, node):
            return None
    return DTYPES.get(kind, kind)


def broadcasts(graph: OnnxGraph, node: Node) -> bool:
    """Whether the two inputs of a node are of different shapes, as far as they are known."""
    first, second = (graph.shape(name) for name in node.inputs[:2])
    if first is None or second is None:
        return False
    return len(first) != len(second) or any(a != b for a, b in zip(first, second, strict=True) if None not in (a, b))


class KernelGraph:
    """Who reads a tensor, and what it is computed from, in terms of kernels.

    Args:
        graph: The graph.

    Attributes:
        host: Tensors that are computed from shapes alone.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.host = host_values(graph)

    def needs_no_kernel(self, node: Node) -> bool:
        """Whether a node is computed ahead, on the host, by whoever reads it, or where its parts are written."""
        if node.op == "Constant" or self.graph.fixed.issuperset(n for n in node.outputs if n):
            return True
        if self.host.issuperset(node.outputs) or is_view(self.graph, node):
            return True
        quant = self.graph.quant(node)
        return (quant is not None and not quant.quantizes) or self._written_in_place(node)

    def _written_in_place(self, node: Node) -> bool:
        """Whether a concatenation's parts are written where they belong: all have one scale (R27), or one reader."""
        if node.op != "Concat":
            return False
        dqs = [self.graph.dequantizer(name) for name in node.inputs]
        if None not in dqs:
            readers = [self.graph.quant(r.node) for r in self.graph.final_readers(node.outputs[0])]
            behind = [quant for quant in readers if quant is not None and quant.quantizes]
            return all(dq is not None and dq.same((behind or dqs)[0] or dq) for dq in dqs)
        return False

    def region(self, name: str) -> list[Node]:
        """What several readers of a tensor compute together, if their results meet again."""
        if len(self.readers(name)) < 2:
            return []
        return closed_region(self.graph, name) or closed_region(self.graph, name, frozenset({"pointwise", "reduction"}))

    def readers(self, name: str) -> list[Reader]:
        """Who reads a tensor, behind views; Q not counted."""
        found = []
        for reader in self.graph.readers(name):
            if reader.node is not None and is_view(self.graph, reader.node) and reader.index == 0:
                found += self.readers(reader.node.outputs[0])
            elif (quant := self.graph.quant(reader.node)) is None or not quant.quantizes:
                found.append(reader)
        return found

    def source(self, name: str) -> str:
        """The tensor behind views."""
        node = self.graph.producers.get(name)
        while node is not None and is_view(self.graph, node):
            name = node.inputs[0]
            node = self.graph.producers.get(name)
        return name
