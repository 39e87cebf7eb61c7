"""Checks of what an ONNX graph computes on integers (R14)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..checks import check
from ..findings import Finding
from .onnx_check_numbers import TYPES
from .onnx_graph import OnnxGraph
from .onnx_nodes import Node

__all__ = ["integer_readers"]

INTEGER_OPS: Final = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
    }
)


@check("onnx", "R14")
def integer_operators(graph: OnnxGraph) -> Iterator[Finding]:
    """Operators on integers, which the parser does not have."""
    for node in graph.nodes:
        if _on_integers(node):
            yield node.finding("R14", "error", f"TensorRT's parser has no {node.op}")


@check("onnx", "R14")
def stored_integers(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized constants that something else than a DQ reads."""
    for node, name in integer_readers(graph):
        message = f"it reads the {graph.dtype(name)} constant {name!r}; TensorRT lets only a DQ read that"
        yield node.finding("R14", "error", message, fix="Store what the operation makes of the constant.")


def integer_readers(graph: OnnxGraph) -> Iterator[tuple[Node, str]]:
    """The operations of ONNX's own, Q and DQ left out, that read a stored INT8, FP8, INT4 or FP4 tensor, and which."""
    for node in graph.nodes:
        if node.domain or graph.quant(node) is not None or _on_integers(node):
            continue
        data = node.inputs[:1] if node.op == "Clip" else node.inputs  # its bounds become attributes
        name = next((name for name in data if graph.stored(name) and graph.dtype(name) in TYPES), None)
        if name is not None:
            yield node, name


def _on_integers(node: Node) -> bool:
    return node.op in INTEGER_OPS or node.op.startswith("QLinear")
