"""Fixes that take a rounding away or add one: the numbers change slightly, for better placement (R21, R23, R31, R38).

The new scale that a skip without any quantizer needs comes from data, so that such a skip is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from .onnx_edit import OnnxEdit
from .onnx_fixes import Fix, Planner, only_nodes_read
from .onnx_graph import OnnxGraph
from .onnx_nodes import Node, Quant
from .onnx_residual import ResidualAdd, residual_adds

__all__ = ["ROUNDING"]


def useless_pairs(graph: OnnxGraph) -> Iterator[Fix]:
    """Pairs in front of activations (R21, R38) and of graph outputs (R31): what was quantized is read instead."""
    for dq in graph.quants:
        quant = _pair(graph, dq)
        if quant is None:
            continue
        if only_nodes_read(graph, dq.output):
            apply = partial(_read_instead, dq, quant.tensor)
            yield Fix(("R21", "R38"), (dq.node.name,), "took Q/DQ away", apply)
        elif _ends_here(graph, dq, quant):
            apply = partial(_give_instead, graph, dq, quant)
            yield Fix(("R31",), (dq.node.name,), f"took Q/DQ in front of the output {dq.output!r} away", apply)


def _pair(graph: OnnxGraph, dq: Quant) -> Quant | None:
    """The Q right in front of an activation's DQ."""
    quant = None if dq.quantizes else graph.quant(graph.producers.get(dq.tensor))
    return quant if quant is not None and quant.quantizes and quant.tensor not in graph.fixed else None


def _read_instead(dq: Quant, name: str, edit: OnnxEdit) -> None:
    edit.reroute(dq.output, name)


def _ends_here(graph: OnnxGraph, dq: Quant, quant: Quant) -> bool:
    """Whether a DQ makes a graph output, and the operation in front of its Q could make it by that name."""
    only_output = [r.node for r in graph.readers(dq.output)] == [None]
    maker = graph.producers.get(quant.tensor)
    first = maker is not None and maker.outputs[0] == quant.tensor
    return only_output and first and only_nodes_read(graph, quant.tensor) and _alike(graph, dq, quant)


def _alike(graph: OnnxGraph, dq: Quant, quant: Quant) -> bool:
    """Whether the tensors in front of and behind a pair have one type, as far as the file tells."""
    return graph.dtype(dq.output) == graph.dtype(quant.tensor)


def _give_instead(graph: OnnxGraph, dq: Quant, quant: Quant, edit: OnnxEdit) -> None:
    edit.drop(dq.node)
    edit.drop(quant.node)
    edit.write(graph.producers[quant.tensor], dq.output)
    edit.reroute(quant.tensor, dq.output)


def residual_edges(graph: OnnxGraph) -> Iterator[Fix]:
    """The convolution's edge read in float, the skip from the quantizer that its tensor has (R23)."""
    for residual in residual_adds(graph):
        conv, skip = (residual.add.inputs[i] for i in (residual.conv_edge, residual.skip_edge))
        dq = graph.quant(graph.producers.get(conv))
        pair = _pair(graph, dq) if dq is not None else None
        float_edge = None if pair is None else pair.tensor
        shared = None if graph.quantized(skip) else _shared(graph, residual)
        needed = (graph.quantized(conv), not graph.quantized(skip))
        if not any(needed) or needed != (float_edge is not None, shared is not None):
            continue
        what = [f"let it read {float_edge!r} in float"] if float_edge is not None else []
        what += [f"let it read the skip from {shared.node.name}"] if shared is not None else []
        yield Fix(("R23",), (residual.add.name,), " and ".join(what), partial(_reconnect, residual, float_edge, shared))


def _shared(graph: OnnxGraph, residual: ResidualAdd) -> Quant | None:
    """A DQ of the skip's own tensor that stands in front of the addition."""
    skip = residual.add.inputs[residual.skip_edge]
    for quant in _quants_reading(graph, skip):
        for dq in _quants_reading(graph, quant.output):
            if quant.quantizes and not dq.quantizes and dq.axis is None and dq.node.index < residual.add.index:
                return dq
    return None


def _quants_reading(graph: OnnxGraph, name: str) -> list[Quant]:
    found = (graph.quant(reader.node) for reader in graph.readers(name) if reader.index == 0)
    return [quant for quant in found if quant is not None]


def _reconnect(residual: ResidualAdd, float_edge: str | None, shared: Quant | None, edit: OnnxEdit) -> None:
    add: Node = residual.add
    if float_edge is not None:
        edit.read(add, residual.conv_edge, float_edge)
    if shared is not None:
        edit.read(add, residual.skip_edge, shared.output)


ROUNDING: Final[tuple[Planner, ...]] = (residual_edges, useless_pairs)
"""In the order in which they are applied."""
