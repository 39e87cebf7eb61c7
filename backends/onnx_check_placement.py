"""Checks of where Q/DQ sit in an ONNX graph (R19 to R31, R38)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..checks import check
from ..findings import Finding
from .onnx_check_numbers import TYPES
from .onnx_graph import WEIGHTED, OnnxGraph
from .onnx_nodes import Node, Quant, Reader
from .onnx_residual import behind_weighted, residual_adds

__all__: list[str] = []

FUSED_BEHIND: Final = frozenset(
    {
        "BatchNormalization",
        "Clip",
        "Elu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "PRelu",
        "Relu",
        "Sigmoid",
        "Tanh",
    }
)
"""What a kernel takes along behind a weighted operation (R44)."""
UNQUANTIZED: Final = frozenset(
    {
        "ArgMax",
        "Erf",
        "GatherElements",
        "GatherND",
        "Gelu",
        "InstanceNormalization",
        "LayerNormalization",
        "LeakyRelu",
        "Relu",
        "Sigmoid",
        "Softmax",
        "Where",
    }
)
"""What gains nothing from an INT8 input (R38)."""
AVERAGING: Final = frozenset({"AveragePool", "GlobalAveragePool", "Resize", "Upsample"})


@check("onnx", "R20")
def both_inputs(graph: OnnxGraph) -> Iterator[Finding]:
    """Weighted operations with one quantized input, or with two in different types."""
    for node in graph.nodes:
        if node.op not in WEIGHTED or len(node.inputs) < 2:
            continue
        first, second = (_types(graph, name) for name in node.inputs[:2])
        if first and second:
            if len(types := (first | second) & TYPES) > 1:
                yield node.finding("R20", "error", f"the inputs have different types: {_listed(types)}")
        elif (first or second) and not _weight_only(graph, node):
            one, other = node.inputs[:2] if first else reversed(node.inputs[:2])
            yield node.finding("R20", "warning", f"{one!r} is quantized and {other!r} is float")


def _types(graph: OnnxGraph, name: str) -> set[str]:
    """The quantized types that reach a tensor; none if any of what reaches it is float."""
    found = graph.dequantizers(name)
    return set() if None in found else {dq.dtype for dq in found if dq is not None}


def _listed(types: set[str]) -> str:
    return ", ".join(sorted(types))


def _weight_only(graph: OnnxGraph, node: Node) -> bool:
    """Whether only the weight is meant to be quantized: 4 bits or blocks (R12)."""
    dq = graph.dequantizer(node.inputs[1])
    return dq is not None and (bool(dq.block) or dq.dtype in {"int4", "float4e2m1"})


@check("onnx", "R21", "R31", "R38")
def useless_pairs(graph: OnnxGraph) -> Iterator[Finding]:
    """Activations' Q/DQ that cut a kernel apart, or that no kernel uses."""
    for dq in graph.quants:
        if dq.quantizes or dq.tensor in graph.fixed:
            continue
        readers = list(graph.final_readers(dq.output))
        ops = {r.node.op if r.node is not None else "" for r in readers}
        producer = _weighted_in_front(graph, dq)
        if not readers:
            yield dq.node.finding("R31", "advice", "nobody reads what this DQ makes")
        elif producer is not None and (fused := sorted(ops & FUSED_BEHIND)):
            message = f"Q/DQ between {producer.op} {producer.name} and {', '.join(fused)}"
            yield dq.node.finding("R21", "warning", message)
        elif ops == {""}:
            yield dq.node.finding("R31", "warning", "Q/DQ right in front of a graph output")
        elif ops <= UNQUANTIZED | {""} and not (producer is not None and "LayerNormalization" in ops):
            message = f"only {', '.join(sorted(ops - {''}))} reads this pair's result"
            yield dq.node.finding("R38", "warning", message)


def _weighted_in_front(graph: OnnxGraph, dq: Quant) -> Node | None:
    """The weighted operation whose result a pair quantizes."""
    quantizer = graph.quantizer(dq)
    return behind_weighted(graph, quantizer.tensor, WEIGHTED) if quantizer is not None else None


@check("onnx", "R31")
def unread_quantizers(graph: OnnxGraph) -> Iterator[Finding]:
    """Q whose integers nobody reads."""
    for quant in graph.quants:
        if quant.quantizes and not graph.readers(quant.output):
            yield quant.node.finding("R31", "advice", "nobody reads what this Q makes")


@check("onnx", "R19", "R31")
def requantized(graph: OnnxGraph) -> Iterator[Finding]:
    """A Q right behind a DQ, and a Q with another scale behind a DQ and operations that only move values."""
    for quant in graph.quants:
        dq = graph.dequantizer(quant.tensor) if quant.quantizes else None
        if dq is None:
            continue
        direct = quant.tensor == dq.output
        if direct and dq.same(quant):
            message = f"it quantizes what {dq.node.name} has just dequantized, with the same scale"
            yield quant.node.finding("R31", "advice", message)
        elif direct:
            message = f"{_difference(dq, quant)} right behind {dq.node.name}: the values are rounded twice"
            yield quant.node.finding("R31", "warning", message)
        elif not dq.same(quant) and not (dq.axis or quant.axis):
            between = graph.producers[quant.tensor]
            message = f"{_difference(dq, quant)} behind {dq.node.name} and {between.op} {between.name}"
            yield quant.node.finding("R19", "warning", message)


def _difference(first: Quant, second: Quant) -> str:
    """How two quantizers differ, for messages."""
    if first.dtype != second.dtype:
        return f"{first.dtype} and {second.dtype}"
    if first.saturates != second.saturates:
        return "one that saturates and one that does not"
    if first.scale_text == second.scale_text:  # they differ in digits that are not shown, or channel by channel
        return f"{first.scale_text}, and others nearly equal" if first.axis is None else "different scales"
    return f"{first.scale_text} and {second.scale_text}"


@check("onnx", "R23", "R25")
def residual_edges(graph: OnnxGraph) -> Iterator[Finding]:
    """Residual additions of an INT8 convolution with Q/DQ on both edges, on none, or on its own."""
    for residual in residual_adds(graph):
        add, conv = residual.add, residual.conv
        if not all(graph.quantized(name) for name in conv.inputs[:2]):
            continue  # a float convolution fuses with a float addition
        convs, skip = (graph.quantized(add.inputs[i]) for i in (residual.conv_edge, residual.skip_edge))
        edge = f"{add.inputs[residual.conv_edge]!r} from {conv.name}"
        if convs and skip:
            message = f"both inputs are quantized; {edge} should stay float"
            yield add.finding("R23", "warning", message)
        elif not convs and not skip:
            source = f" from {residual.other_conv.name}" if residual.other_conv is not None else ""
            message = f"no input is quantized; the skip {add.inputs[residual.skip_edge]!r}{source} should be"
            yield add.finding("R23", "warning", message)
        elif convs and not skip and residual.other_conv is None:
            message = f"the convolution's edge {edge} is quantized instead of the skip"
            yield add.finding("R23", "warning", message)
        elif convs and not skip and residual.decided and residual.other_conv is not None:
            message = f"{edge} is quantized, at the end of the longer way; the skip is {residual.other_conv.name}'s"
            yield add.finding("R25", "advice", message)


@check("onnx", "R24", "R29")
def one_quantizer(graph: OnnxGraph) -> Iterator[Finding]:
    """Activations that several Q read."""
    skips = {r.add.inputs[r.skip_edge] for r in residual_adds(graph)}
    tensors: dict[str, list[Quant]] = {}
    for quant in graph.quants:
        if quant.quantizes and quant.tensor not in graph.fixed:
            tensors.setdefault(quant.tensor, []).append(quant)
    for tensor, (first, *others) in tensors.items():
        different = next((q for q in others if not q.same(first)), None)
        if different is not None:
            skip = any(_feeds(graph, q, skips) for q in (first, different))
            message = f"a second quantizer of {tensor!r}: {_difference(first, different)}"
            yield different.node.finding("R24" if skip else "R29", "warning", message)
        elif others:
            count = f"{len(others) + 1} quantizers" if len(others) > 1 else "a second quantizer"
            yield others[0].node.finding("R29", "advice", f"{count} of {tensor!r} with one scale")


def _feeds(graph: OnnxGraph, quantizer: Quant, tensors: set[str]) -> bool:
    """Whether a DQ of this Q makes one of the tensors."""
    readers = (graph.quant(r.node) for r in graph.final_readers(quantizer.output))
    return any(dq is not None and dq.output in tensors for dq in readers)


@check("onnx", "R26")
def one_sided(graph: OnnxGraph) -> Iterator[Finding]:
    """Average pools and resizes that read a DQ and whose result no Q reads."""
    for node in graph.nodes:
        averages = node.op in AVERAGING or (node.op == "ReduceMean" and _spatial(graph, node))
        if not averages or graph.dequantizer(node.inputs[0]) is None:
            continue
        if not any(_quantizes(graph, reader) for reader in graph.final_readers(node.outputs[0])):
            message = f"a {node.op} whose input is quantized and whose output is not"
            yield node.finding("R26", "warning", message)


def _spatial(graph: OnnxGraph, node: Node) -> bool:
    """Whether a ReduceMean is a global average pool: over height and width of an image."""
    shape = graph.shape(node.inputs[0])
    given = node.attributes.get("axes")
    axes = graph.array(node.input(1)) if given is None else given
    return shape is not None and len(shape) == 4 and axes is not None and {int(a) % 4 for a in axes} == {2, 3}


def _quantizes(graph: OnnxGraph, reader: Reader) -> bool:
    quant = graph.quant(reader.node)
    return quant is not None and quant.quantizes


@check("onnx", "R27", "R28")
def concat_scales(graph: OnnxGraph) -> Iterator[Finding]:
    """Concatenations whose quantized inputs and output have different scales."""
    for node in graph.nodes:
        if node.op != "Concat" or graph.fixed.intersection(node.outputs):
            continue
        inputs = [graph.dequantizer(name) for name in node.inputs]
        quantized = [dq for dq in inputs if dq is not None]
        behind = [graph.quant(r.node) for r in graph.final_readers(node.outputs[0]) if _quantizes(graph, r)]
        wanted = behind[0] if behind else quantized[0] if len(quantized) == len(inputs) else None
        odd = [i for i, dq in enumerate(inputs) if dq is not None and wanted and not dq.same(wanted)]
        if wanted is None or not odd:
            continue
        pooled = all(_through_max_pool(graph, node.inputs[i]) for i in odd)
        where = f"the Q behind it ({wanted.node.name})" if behind else f"input 0 ({wanted.node.name})"
        found = ", ".join(f"input {i} ({_scale(inputs[i])})" for i in odd)
        message = f"{where} has {wanted.scale_text}, and {found} does not"
        yield node.finding("R28" if pooled else "R27", "warning", message)


def _scale(dq: Quant | None) -> str:
    return "" if dq is None else dq.scale_text


def _through_max_pool(graph: OnnxGraph, name: str) -> bool:
    """Whether a MaxPool lies between a tensor and its DQ."""
    while (node := graph.producers.get(name)) is not None and graph.moves(Reader(node)):
        if node.op == "MaxPool":
            return True
        name = node.inputs[0]
    return False
