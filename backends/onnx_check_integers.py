"""Checks of what ONNX Runtime's optimizer makes of Q/DQ on a CPU: kernels on integers, or float ones (ORT1 to ORT7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ..checks import check
from ..findings import Finding, Severity
from .onnx_graph import WEIGHTED, OnnxGraph
from .onnx_nodes import Node, Quant

__all__: list[str] = []

ABSORBED: Final = frozenset({"Clip", "Relu"})
"""What the range of a quantized result computes."""
INTEGER: Final = WEIGHTED - {"ConvTranspose"}
"""What there are integer kernels for; a transposed convolution is computed in float whatever it reads (ORT9)."""
POOLS: Final = frozenset({"AveragePool", "Concat", "GlobalAveragePool", "MaxPool"})
RANGES: Final = {"int8": (-128, 127), "uint8": (0, 255)}
FEW_INPUTS: Final = 8
FEW_OUTPUTS: Final = 32
CLOSE: Final = 1e-5
"""How far a bias's scale may be from the product of two float32 scales, relatively."""


def _written_in_integers(graph: OnnxGraph, name: str) -> bool:
    """Whether all that reads a tensor, or the activation that the range computes, is Q."""
    readers = graph.readers(name)
    activation = readers[0].node if len(readers) == 1 else None
    if activation is None or activation.op not in ABSORBED:
        return bool(_quantizers(graph, name))
    behind = _quantizers(graph, activation.outputs[0])
    return bool(behind) and all(_computes(graph, quant, activation) for quant in behind)


def _quantizers(graph: OnnxGraph, name: str) -> list[Quant]:
    """The Q that read a tensor; none if anything else does too."""
    quants = [graph.quant(reader.node) for reader in graph.readers(name)]
    found = [quant for quant in quants if quant is not None and quant.quantizes]
    return found if len(found) == len(quants) else []


def _computes(graph: OnnxGraph, quant: Quant, activation: Node) -> bool:
    """Whether saturation does what an activation in front of a Q does."""
    if quant.scale is None or quant.scale.size != 1 or quant.dtype not in RANGES:
        return False
    zero_point = 0.0 if quant.zero_point is None else quant.zero_point.item()
    low, high = ((end - zero_point) * quant.scale.item() for end in RANGES[quant.dtype])
    if activation.op == "Relu":
        return low >= 0
    bounds = [graph.array(name) if (name := activation.input(index)) else None for index in (1, 2)]
    lower, upper = (None if bound is None else bound.item() for bound in bounds)
    return (lower is None or low >= lower) and (upper is None or high <= upper * (1 + CLOSE))


def _read_in_integers(graph: OnnxGraph, node: Node, inputs: int | None = None) -> list[bool]:
    return [graph.dequantizer(name) is not None for name in node.inputs[:inputs]]


@check("onnx", "ORT1", "ORT2")
def weighted_in_integers(graph: OnnxGraph) -> Iterator[Finding]:
    """Convolutions and matrix products with one quantized input, and convolutions whose result stays float."""
    for node in graph.nodes:
        if node.op not in INTEGER or len(node.inputs) < 2:
            continue
        rule = "ORT1" if node.op == "Conv" else "ORT2"
        first, second = _read_in_integers(graph, node, 2)
        if first != second:
            one, other = node.inputs[:2] if first else reversed(node.inputs[:2])
            yield node.finding(rule, "warning", f"{one!r} is quantized and {other!r} is float")
        elif first and rule == "ORT1" and not _written_in_integers(graph, node.outputs[0]):
            yield node.finding(rule, "warning", "its inputs are quantized and its result is not")


@check("onnx", "ORT3")
def activations_cut_off(graph: OnnxGraph) -> Iterator[Finding]:
    """Q/DQ between an operation and its activation."""
    for dq in graph.quants:
        quantizer = None if dq.quantizes else graph.quantizer(dq)
        before = None if quantizer is None else graph.producers.get(quantizer.tensor)
        if before is None or before.op not in WEIGHTED | {"Add"}:
            continue
        readers = [reader.node for reader in graph.readers(dq.output)]
        found = sorted({node.op for node in readers if node is not None and node.op in ABSORBED})
        if found:
            message = f"Q/DQ between {before.op} {before.name} and {', '.join(found)}"
            yield dq.node.finding("ORT3", "warning", message)


@check("onnx", "ORT4", "ORT5")
def joined_in_integers(graph: OnnxGraph) -> Iterator[Finding]:
    """Additions, pools and concatenations of quantized tensors whose result stays float."""
    for node in graph.nodes:
        rule = "ORT4" if node.op == "Add" else "ORT5" if node.op in POOLS else None
        if rule is None or graph.fixed.intersection(node.outputs):
            continue
        given = [name for name in node.inputs if name and name not in graph.fixed]
        quantized = all(graph.dequantizer(name) is not None for name in given)
        if quantized and given and len(given) == len(node.inputs) and not _written_in_integers(graph, node.outputs[0]):
            yield node.finding(rule, "warning", f"what this {node.op} reads is quantized and its result is not")


@check("onnx", "ORT6")
def integer_biases(graph: OnnxGraph) -> Iterator[Finding]:
    """Float biases of operations on integers, and integer ones in other steps than the kernel's."""
    for node in graph.nodes:
        if node.op not in {"Conv", "Gemm"} or not node.input(2) or not all(_read_in_integers(graph, node, 2)):
            continue
        first, second, bias = (graph.dequantizer(name) for name in node.inputs[:3])
        if bias is None:
            severity: Severity = "warning" if node.op == "Gemm" else "advice"
            yield node.finding("ORT6", severity, f"the bias {node.input(2)!r} is float")
        elif bias.dtype != "int32":
            yield node.finding("ORT6", "warning", f"the bias is {bias.dtype}")
        elif not _in_step(first, second, bias):
            message = "the bias has other scales than input times weight, in whose steps the kernel adds"
            yield node.finding("ORT6", "warning", message)


def _in_step(first: Quant | None, second: Quant | None, bias: Quant) -> bool:
    """Whether a bias is in steps of one product, as far as the scales are known."""
    if first is None or second is None or first.scale is None or second.scale is None or bias.scale is None:
        return True
    wanted = first.scale.ravel() * second.scale.ravel()
    got = np.broadcast_to(bias.scale.ravel(), wanted.shape) if bias.scale.size == 1 else bias.scale.ravel()
    return got.shape == wanted.shape and bool(np.allclose(got, wanted, rtol=CLOSE, atol=0))


def _branches(graph: OnnxGraph, node: Node) -> bool:
    """Whether a result is read in several places before the next operation with a weight."""
    while len(readers := graph.readers(node.outputs[0])) == 1 and readers[0].node is not None:
        node = readers[0].node
        if node.op in WEIGHTED:
            return False
    return len(readers) > 1


@check("onnx", "ORT7")
def few_channels(graph: OnnxGraph) -> Iterator[Finding]:
    """Quantized convolutions of so few channels that float is faster."""
    for node in graph.nodes:
        if node.op != "Conv" or node.attributes.get("group", 1) != 1 or not all(_read_in_integers(graph, node, 2)):
            continue
        shape = graph.shape(node.inputs[1])
        if shape is None or shape[0] is None or shape[1] is None:
            continue
        if shape[1] < FEW_INPUTS and shape[0] <= FEW_OUTPUTS and not _branches(graph, node):
            yield node.finding("ORT7", "advice", f"{shape[1]} input and {shape[0]} output channels")
