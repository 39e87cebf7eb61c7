"""Checks of an ONNX graph's numbers and formats: scales, zero points, types, opset, axes (R8 to R17, R32)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ..checks import check
from ..findings import Finding, Severity
from .onnx_graph import WEIGHTED, OnnxGraph
from .onnx_nodes import Node, Quant

__all__ = ["TYPES", "output_axis", "scale_axis"]

OPSETS: Final = (9, 25)
"""The opsets that TensorRT 11's parser documents (R8)."""
FP4: Final = "float4e2m1"
FP8: Final = "float8e4m3fn"
TYPES: Final = frozenset({"int8", FP8, "int4", FP4})
"""What TensorRT quantizes to (R10)."""
BLOCKS: Final = {"int4": (64, 128), FP4: (16,), FP8: (32,)}
"""Documented block sizes (R12)."""
SMALLEST_NORMAL: Final = {
    "float": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-14,
    "double": 2.0**-1022,
}


def _repeated(graph: OnnxGraph, quant: Quant) -> bool:
    """Whether this is the DQ of a Q with the same parameters: what is wrong with them is said at the Q."""
    if quant.quantizes:
        return False
    quantizer = graph.quantizer(quant)
    if quantizer is None or quantizer.node.inputs[1:] == quant.node.inputs[1:]:
        return quantizer is not None
    first, second = quantizer.zeros, quant.zeros
    return quantizer.same(quant) and first is not None and second is not None and np.array_equal(first, second)


def _range(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    low, high = values.min(), values.max()
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"


@check("onnx", "R8")
def known_opset(graph: OnnxGraph) -> Iterator[Finding]:
    """Opsets that TensorRT's parser does not document."""
    low, high = OPSETS
    if not low <= graph.opset <= high:
        severity: Severity = "error" if graph.opset < low else "warning"
        yield Finding("R8", severity, None, f"opset {graph.opset} is outside {low} to {high}")


@check("onnx", "R9")
def symmetric(graph: OnnxGraph) -> Iterator[Finding]:
    """Zero points that are not 0."""
    for quant in graph.quants:
        if quant.zero_point is not None and np.any(quant.zero_point) and not _repeated(graph, quant):
            yield quant.node.finding("R9", "error", f"the zero point is {_range(quant.zero_point)}, not 0")


@check("onnx", "R9")
def positive_scales(graph: OnnxGraph) -> Iterator[Finding]:
    """Scales that are zero, negative, infinite, NaN or subnormal."""
    for quant in graph.quants:
        if quant.scale is None or _repeated(graph, quant):
            continue
        scale, kind = quant.scale, graph.dtype(quant.node.input(1))
        bad = scale[~(np.isfinite(scale) & (scale > 0))]
        small = scale[(scale > 0) & (scale < SMALLEST_NORMAL.get(kind, 0.0))]
        if bad.size:
            which = "the scale is" if scale.size == 1 else f"{bad.size} of {scale.size} scales are"
            yield quant.node.finding("R9", "error", f"{which} {_range(bad)}: not positive and finite")
        elif small.size:
            which = "the scale is" if scale.size == 1 else f"{small.size} of {scale.size} scales are"
            yield quant.node.finding("R9", "warning", f"{which} {_range(small)}: subnormal in {kind}")


@check("onnx", "R10")
def quantized_types(graph: OnnxGraph) -> Iterator[Finding]:
    """Types that TensorRT does not quantize to, or silently takes as INT8."""
    for quant in graph.quants:
        if quant.dtype in TYPES or not quant.dtype or _repeated(graph, quant) or _reads_int32(quant):
            continue
        if quant.quantizes and quant.dtype == "uint8" and not quant.node.input(2):
            message = "there is no zero point, so that ONNX says uint8 and TensorRT takes int8"
        elif quant.quantizes and quant.dtype == "uint8":
            message = "it quantizes to uint8, which TensorRT takes as int8"
        else:
            message = f"TensorRT does not take {quant.dtype}"
        yield quant.node.finding("R10", "error", message)


@check("onnx", "R11")
def constant_scales(graph: OnnxGraph) -> Iterator[Finding]:
    """Scales that depend on the graph's inputs; blocks of FP8 and FP4 are scaled at run time by design."""
    for quant in graph.quants:
        dynamic = quant.node.input(1) not in graph.fixed
        if dynamic and not (quant.block and quant.dtype in {FP8, FP4}) and not _repeated(graph, quant):
            yield quant.node.finding("R11", "error", "the scale is computed from the graph's inputs")


@check("onnx", "R11")
def scale_shapes(graph: OnnxGraph) -> Iterator[Finding]:
    """Scales and zero points whose length does not fit."""
    for quant in graph.quants:
        if quant.scale is None or quant.block or _repeated(graph, quant):
            continue
        scale, zeros = quant.scale, quant.zero_point
        if zeros is not None and zeros.size != scale.size:
            message = f"{scale.size} scales and {zeros.size} zero points"
            yield quant.node.finding("R11", "error", message)
        elif (channels := _channels(graph, quant)) is not None and channels != scale.size:
            message = f"{scale.size} scales along axis {quant.axis}, which has {channels} indices"
            yield quant.node.finding("R11", "error", message)


def _channels(graph: OnnxGraph, quant: Quant) -> int | None:
    """The length of the axis that the scales run along; None if it is unknown or there is one scale."""
    shape = graph.shape(quant.tensor)
    if quant.axis is None or shape is None or not 0 <= quant.axis < len(shape):
        return None
    return shape[quant.axis]


@check("onnx", "R12")
def blocks(graph: OnnxGraph) -> Iterator[Finding]:
    """Block sizes that are not documented."""
    for quant in graph.quants:
        sizes = BLOCKS.get(quant.dtype)
        if quant.block and sizes and quant.block not in sizes and not _repeated(graph, quant):
            documented = " or ".join(map(str, sizes))
            message = f"blocks of {quant.block} {quant.dtype}; documented are {documented}"
            yield quant.node.finding("R12", "warning", message)


@check("onnx", "R12")
def four_bit_activations(graph: OnnxGraph) -> Iterator[Finding]:
    """INT4 on what is no weight."""
    for quant in graph.quants:
        if quant.quantizes and quant.dtype == "int4" and quant.tensor not in graph.fixed:
            yield quant.node.finding("R12", "warning", f"int4 on the activation {quant.tensor!r}")


@check("onnx", "R13")
def convolution_types(graph: OnnxGraph) -> Iterator[Finding]:
    """Convolutions that read 4-bit values."""
    for node in graph.nodes:
        if node.op not in {"Conv", "ConvTranspose"}:
            continue
        found = [graph.dequantizer(name) for name in node.inputs[:2]]
        types = sorted({dq.dtype for dq in found if dq is not None and dq.dtype in {"int4", FP4}})
        if types:
            yield node.finding("R13", "warning", f"a {node.op} that reads {' and '.join(types)}")


@check("onnx", "R15")
def opset_features(graph: OnnxGraph) -> Iterator[Finding]:
    """Features that the file's opset does not have; each is reported once, where it is first used."""
    seen: set[str] = set()
    for quant in graph.quants:
        if quant.node.domain or quant.node.op not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        for feature, opset in _features(graph, quant):
            if graph.opset < opset and feature not in seen:
                seen.add(feature)
                message = f"{feature} need opset {opset}, and the file has {graph.opset}"
                yield quant.node.finding("R15", "error", message)


def _features(graph: OnnxGraph, quant: Quant) -> Iterator[tuple[str, int]]:
    """What a Q or DQ uses, and the opset that brought it."""
    if quant.axis is not None:
        yield "per-channel scales", 13
    if graph.dtype(quant.node.input(1)) in {"float16", "bfloat16"}:
        yield "16-bit scales", 19
    if quant.dtype.startswith("float8"):
        yield "FP8 values", 19
    if quant.dtype in {"int4", "uint4"}:
        yield "4-bit integers", 21
    if quant.block:
        yield "blocks", 21
    if quant.dtype == FP4:
        yield "FP4 values", 23


@check("onnx", "R16")
def weight_axes(graph: OnnxGraph) -> Iterator[Finding]:
    """Per-channel weight scales along an axis that is not the output channels'."""
    for node in graph.nodes:
        if node.op not in WEIGHTED or len(node.inputs) < 2 or node.inputs[1] not in graph.fixed:
            continue
        dq = graph.dequantizer(node.inputs[1])
        if dq is None or dq.axis is None or dq.block:
            continue
        axis, wanted = scale_axis(graph, node.inputs[1], dq), output_axis(graph, node)
        if axis is not None and wanted is not None and axis != wanted:
            message = f"the weight's scales run along axis {axis}; its output channels are axis {wanted}"
            yield node.finding("R16", "error", f"{message} for {node.op}")


def scale_axis(graph: OnnxGraph, name: str, dq: Quant) -> int | None:
    """The scales' axis as the reader of `name` sees it, behind transposes; None behind other operations."""
    permutations = []
    while name != dq.output:
        node = graph.producers[name]
        shape = graph.shape(node.inputs[0])
        if node.op == "Transpose" and ("perm" in node.attributes or shape is not None):
            permutations.append(list(node.attributes.get("perm") or range(len(shape or ()))[::-1]))
        elif node.op not in {"Identity", "Dropout"}:
            return None
        name = node.inputs[0]
    axis = dq.axis
    for permutation in reversed(permutations):
        axis = permutation.index(axis)
    return axis


def output_axis(graph: OnnxGraph, node: Node) -> int | None:
    """The weight's axis of output channels; None if its rank is not known."""
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        return 0 if node.attributes.get("transB", 0) else 1
    shape = graph.shape(node.inputs[1])
    return None if shape is None else len(shape) - 1


@check("onnx", "R17")
def float_biases(graph: OnnxGraph) -> Iterator[Finding]:
    """DQ that read int32, and biases behind any other DQ."""
    biases = {n.input(2) for n in graph.nodes if n.op in {"Conv", "ConvTranspose", "Gemm"}} - {""}
    for quant in graph.quants:
        if quant.quantizes:
            continue
        if _reads_int32(quant):
            yield quant.node.finding("R17", "error", "a DQ that reads int32, as quantized biases are stored")
        elif quant.output in biases and quant.tensor in graph.fixed:
            yield quant.node.finding("R17", "warning", f"the bias {quant.output!r} is quantized")


def _reads_int32(quant: Quant) -> bool:
    return not quant.quantizes and quant.dtype == "int32"


@check("onnx", "R32")
def granularity(graph: OnnxGraph) -> Iterator[Finding]:
    """Activations with several scales, and weights with one."""
    for node in graph.nodes:
        if node.op not in WEIGHTED or len(node.inputs) < 2:
            continue
        for name in node.inputs[:2]:
            dq = graph.dequantizer(name)
            if dq is None or dq.block:
                continue
            if name not in graph.fixed and dq.axis is not None:
                message = f"the activation {name!r} has {dq.scale_text} along axis {dq.axis}"
                yield node.finding("R32", "warning", message)
            elif name in graph.fixed and dq.axis is None and _several_outputs(graph, node):
                yield node.finding("R32", "advice", f"the weight {name!r} has one scale for all channels")


def _several_outputs(graph: OnnxGraph, node: Node) -> bool:
    """Whether more scales for a weight would be of use; for ConvTranspose R43 advises against them."""
    shape, axis = graph.shape(node.inputs[1]), output_axis(graph, node)
    return node.op != "ConvTranspose" and shape is not None and axis is not None and shape[axis] != 1
