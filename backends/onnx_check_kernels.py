"""Advice on quantized layers that TensorRT's kernels may not serve well (R35 to R37, R40, R43)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from ..checks import check
from ..findings import Finding
from .onnx_graph import OnnxGraph
from .onnx_nodes import Node

__all__ = ["quantized_type"]

FP8: Final = "float8e4m3fn"
FEW: Final = 16
"""Channels, and rows and columns of a matrix, that INT8 kernels want at least (R35, R37)."""
HEADS: Final = (16, 32, 64)
"""Head sizes of the fused INT8 attention (R40)."""
LONGEST: Final = 512
"""Its longest sequence (R40)."""
AROUND_SOFTMAX: Final = frozenset({"Add", "Cast", "Div", "Mul", "Reshape", "Transpose", "Where"})


def quantized_type(graph: OnnxGraph, node: Node) -> str | None:
    """The type that both inputs of a weighted operation are quantized to; None if one is float."""
    found = [dq for name in node.inputs[:2] for dq in graph.dequantizers(name)]
    types = {dq.dtype if dq is not None else None for dq in found}
    return types.pop() if len(types) == 1 else None


def _weight_shape(graph: OnnxGraph, node: Node) -> tuple[int, ...] | None:
    """The weight's shape; None if it is not fully known."""
    shape = graph.shape(node.inputs[1]) or graph.shape(graph.origin(node.inputs[1]))
    known = [size for size in shape or () if size is not None]
    return tuple(known) if shape and len(known) == len(shape) else None


@check("onnx", "R35")
def small_convolutions(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized INT8 convolutions with few channels, or with a weight that is no constant."""
    for node in graph.nodes:
        if node.op != "Conv" or quantized_type(graph, node) != "int8":
            continue
        if node.inputs[1] not in graph.fixed:
            yield node.finding("R35", "advice", f"the weight {node.inputs[1]!r} is not constant")
        elif (shape := _weight_shape(graph, node)) and not _serves(graph, node, shape):
            yield node.finding("R35", "advice", f"an INT8 convolution with {_described(node, shape)}")


def _serves(graph: OnnxGraph, node: Node, shape: Sequence[int]) -> bool:
    """Whether R35 expects an INT8 kernel for a convolution; `shape` is the weight's."""
    out, into, *kernel = shape
    if out >= FEW and into >= FEW:
        return True
    if int(node.attributes.get("group", 1)) > 1:
        return out % 8 == 0 and min(kernel) >= 3
    first = _reads_graph_input(graph, node)
    return (out % 8 == 0 or into % 8 == 0) and len(set(kernel)) == 1 and (first or max(out, into) >= FEW)


def _reads_graph_input(graph: OnnxGraph, node: Node) -> bool:
    """Whether a convolution is a first layer."""
    dq = graph.dequantizer(node.inputs[0])
    quantizer = graph.quantizer(dq) if dq is not None else None
    return quantizer is not None and graph.origin(quantizer.tensor) in graph.inputs


def _described(node: Node, shape: Sequence[int]) -> str:
    """A convolution's sizes for messages."""
    out, into, *kernel = shape
    group = int(node.attributes.get("group", 1))
    groups = f" in {group} groups" if group > 1 else ""
    return f"{into * group} to {out} channels{groups}, kernel {'x'.join(map(str, kernel))}"


@check("onnx", "R36")
def fp8_convolutions(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized FP8 convolutions with few channels, large kernels or groups."""
    for node in graph.nodes:
        shape = _weight_shape(graph, node) if node.op == "Conv" else None
        if shape is None or quantized_type(graph, node) != FP8:
            continue
        out, into, *kernel = shape
        grouped = int(node.attributes.get("group", 1)) > 1
        if grouped or min(out, into) <= FEW or math.prod(kernel) > 32:
            yield node.finding("R36", "advice", f"an FP8 convolution with {_described(node, shape)}")


@check("onnx", "R37")
def thin_products(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized MatMul and Gemm with one row or column, or fewer than 16 along K or N."""
    for node in graph.nodes:
        if node.op not in {"Gemm", "MatMul"} or quantized_type(graph, node) is None:
            continue
        m, n, k = _product(graph, node)
        sizes = f"M={m or '?'}, N={n or '?'}, K={k or '?'}"
        if 1 in (m, n):
            yield node.finding("R37", "advice", f"a matrix product with one row or column: {sizes}")
        elif min(n or FEW, k or FEW) < FEW:
            yield node.finding("R37", "advice", f"a matrix product with fewer than {FEW} along N or K: {sizes}")


def _product(graph: OnnxGraph, node: Node) -> tuple[int | None, int | None, int | None]:
    """M, N and K of a matrix product; None where it is not known.

    With a constant weight all leading dimensions count as rows.
    """
    shape, weight = graph.shape(node.outputs[0]), graph.shape(node.inputs[1])
    if shape is None or len(shape) < 2 or weight is None or len(weight) < 2:
        return None, None, None
    k = weight[-1] if node.attributes.get("transB", 0) else weight[-2]
    rows = shape[:-1] if node.inputs[1] in graph.fixed else shape[-2:-1]
    known = [size for size in rows if size is not None]
    return math.prod(known) if len(known) == len(rows) else None, shape[-1], k


@check("onnx", "R40")
def attention(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized attention whose heads or sequences the fused INT8 kernel does not take."""
    for node in graph.nodes:
        if node.op != "MatMul" or quantized_type(graph, node) != "int8" or not _to_softmax(graph, node):
            continue
        scores, keys = graph.shape(node.outputs[0]), graph.shape(node.inputs[1])
        length = scores[-1] if scores else None
        head = keys[-2] if keys and len(keys) > 1 else None
        if length is not None and length > LONGEST:
            yield node.finding("R40", "advice", f"attention over {length} positions, more than {LONGEST}")
        elif head is not None and head not in HEADS:
            sizes = ", ".join(map(str, HEADS))
            yield node.finding("R40", "advice", f"attention with heads of {head}, not of {sizes}")


def _to_softmax(graph: OnnxGraph, node: Node) -> bool:
    """Whether the product of two activations runs into a Softmax."""
    if graph.fixed.intersection(node.inputs):
        return False
    name = node.outputs[0]
    while len(readers := graph.readers(name)) == 1 and (reader := readers[0].node) is not None:
        if reader.op == "Softmax":
            return True
        if reader.op not in AROUND_SOFTMAX:
            return False
        name = reader.outputs[0]
    return False


@check("onnx", "R43")
def transposed_convolutions(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized transposed convolutions with a scale for each channel."""
    for node in graph.nodes:
        if node.op != "ConvTranspose" or quantized_type(graph, node) is None:
            continue
        dq = graph.dequantizer(node.inputs[1])
        if dq is not None and dq.axis is not None:
            kind = "a grouped ConvTranspose" if node.attributes.get("group", 1) > 1 else "a ConvTranspose"
            message = f"{kind} with a scale for each channel: INT8 or float, as version and GPU have a kernel for it"
            yield node.finding("R43", "advice", message)
