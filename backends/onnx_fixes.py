"""What a machine can mend in a quantized ONNX graph: each fix an edit for findings of the linter.

A planner reads a graph and yields its fixes; nothing is changed until a fix is applied. Those here leave every number
as it was, which :mod:`.onnx_fixes_rounding` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from .onnx_check_operators import integer_readers
from .onnx_constants import can_compute, compute
from .onnx_edit import OnnxEdit
from .onnx_graph import OnnxGraph
from .onnx_nodes import Node, Quant

__all__ = ["EXACT", "Fix", "Planner", "only_nodes_read"]

Apply = Callable[[OnnxEdit], None]

BIASED: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})
MIDDLE: Final = 128
"""The zero point of uint8 that stands where int8 has 0."""
INT8: Final = (-128, 127)
LIMITS: Final = {"float": (2.0**-126, 2.0**127), "float16": (2.0**-14, 2.0**15)}
"""Between what numbers a float type keeps its digits; bfloat16 has too few to tell 127 from 128."""
LARGEST: Final = {"int4": 16, "uint4": 16, "float4e2m1": 6, "int8": 256, "uint8": 256, "float8e4m3fn": 448}
"""The types of whose numbers, less a zero point, float16 has all, and what none exceeds."""
STEPS: Final = ("output_dtype", "precision")
"""Attributes that say in which float type Q and DQ compute."""


@dataclass(frozen=True, eq=False)
class Fix:
    """One change of a graph.

    Attributes:
        rules: The rules whose findings it mends.
        nodes: At which nodes, by :attr:`.Node.name`.
        what: What it does, for the user.
        apply: Makes the change.
    """

    rules: tuple[str, ...]
    nodes: tuple[str, ...]
    what: str
    apply: Apply


Planner = Callable[[OnnxGraph], Iterator[Fix]]


def only_nodes_read(graph: OnnxGraph, name: str) -> bool:
    """Whether a tensor may be replaced where it is read: no graph output, and not read in a graph inside a node."""
    return all(reader.node is not None and reader.index >= 0 for reader in graph.readers(name))


def _zeros(quant: Quant) -> set[float]:
    """The zero points that occur; none if they are not known."""
    return set() if quant.zeros is None else set(quant.zeros.tolist())


def _equal(first: Quant, second: Quant) -> bool:
    """Whether two Q, two DQ, or a Q and a DQ have the same numbers, as far as known: scales, zero points, types."""
    known = first.scale is not None and second.scale is not None and first.dtype and _zeros(first) and _zeros(second)
    return bool(known) and first.same(second)


def _alike(graph: OnnxGraph, first: Quant, second: Quant) -> bool:
    """Whether two Q or two DQ are :func:`_equal` and compute in one float type, so that one serves for both."""
    types = [
        [graph.dtype(q.node.input(1)), graph.dtype(q.output), *map(q.node.attributes.get, STEPS)]
        for q in (first, second)
    ]
    return _equal(first, second) and types[0] == types[1]


def unread(graph: OnnxGraph) -> Iterator[Fix]:
    """Q and DQ whose result nobody reads (R31)."""
    for quant in graph.quants:
        if not any(graph.final_readers(quant.output)):
            kind = "Q" if quant.quantizes else "DQ"
            what = f"took away the {kind} that nobody reads"
            yield Fix(("R31",), (quant.node.name,), what, partial(_drop_with_readers, graph, quant.node))


def _drop_with_readers(graph: OnnxGraph, node: Node, edit: OnnxEdit) -> None:
    edit.drop(node)
    for reader in (r for name in node.outputs for r in graph.readers(name)):
        if reader.node is not None:
            _drop_with_readers(graph, reader.node, edit)


def requantized(graph: OnnxGraph) -> Iterator[Fix]:
    """A Q right behind a DQ with the same numbers: it gives the DQ's own integers (R31)."""
    for quant in graph.quants:
        dq = graph.quant(graph.producers.get(quant.tensor)) if quant.quantizes else None
        if dq is None or dq.quantizes or not _equal(dq, quant) or not _survives(graph, dq):
            continue
        if graph.dtype(quant.node.input(1)) != graph.dtype(dq.node.input(1)) or "precision" in quant.node.attributes:
            continue
        if only_nodes_read(graph, quant.output):
            what = f"took away the Q: {dq.node.name} reads these integers already"
            yield Fix(("R31",), (quant.node.name,), what, partial(_replace, quant.node, quant.output, dq.tensor))


def _survives(graph: OnnxGraph, dq: Quant) -> bool:
    """Whether DQ and Q give every integer back: q·s is neither too large nor subnormal, and its type has the digits."""
    limits, largest = LIMITS.get(graph.dtype(dq.output)), LARGEST.get(dq.dtype)
    if limits is None or largest is None or dq.scale is None:
        return False
    return bool(np.all((dq.scale >= limits[0]) & (dq.scale * largest <= limits[1])))


def _replace(node: Node, old: str, new: str, edit: OnnxEdit) -> None:
    edit.reroute(old, new)
    edit.drop(node)


def doubled(graph: OnnxGraph) -> Iterator[Fix]:
    """Several Q of one tensor with the same numbers: one stays, and its DQ serves all (R29)."""
    first: dict[str, Quant] = {}
    for quant in graph.quants:
        if not quant.quantizes or quant.tensor in graph.fixed:
            continue
        kept = first.setdefault(quant.tensor, quant)
        if kept is not quant and _alike(graph, kept, quant) and only_nodes_read(graph, quant.output):
            what = f"let its readers share {kept.node.name}"
            yield Fix(("R29",), (quant.node.name,), what, partial(_merge, graph, kept, quant))


def _merge(graph: OnnxGraph, kept: Quant, extra: Quant, edit: OnnxEdit) -> None:
    _replace(extra.node, extra.output, kept.output, edit)
    shared = [dq for dq in _dequantizers(graph, kept.output) if dq.node.index < extra.node.index]
    for dq in _dequantizers(graph, extra.output):
        same = next((other for other in shared if _alike(graph, other, dq)), None)
        if same is not None and only_nodes_read(graph, dq.output):
            _replace(dq.node, dq.output, same.output, edit)


def _dequantizers(graph: OnnxGraph, name: str) -> list[Quant]:
    found = (graph.quant(reader.node) for reader in graph.readers(name) if reader.index == 0)
    return [quant for quant in found if quant is not None and not quant.quantizes]


def quantized_biases(graph: OnnxGraph) -> Iterator[Fix]:
    """Constant biases behind a DQ: stored in float, as the DQ computes them (R17)."""
    for dq in graph.quants:
        if dq.quantizes or not can_compute(graph, dq.output) or dq.output in graph.outputs:
            continue
        bias = all(r.node is not None and r.node.op in BIASED and r.index == 2 for r in graph.readers(dq.output))
        if bias or dq.dtype == "int32":
            what = f"stored {dq.output!r} in float, as this DQ computes it"
            yield Fix(("R17",), (dq.node.name,), what, partial(_store_computed, graph, dq.output))


def _store_computed(graph: OnnxGraph, name: str, edit: OnnxEdit) -> None:
    edit.store(name, compute(graph, name))


def integer_constants(graph: OnnxGraph) -> Iterator[Fix]:
    """Operations on stored integers in front of a DQ: computed once and stored (R14)."""
    for node, name in integer_readers(graph):
        if can_compute(graph, node.outputs[0]) and node.outputs[0] not in graph.outputs:
            what = f"stored what {node.op} makes of the constant {name!r}"
            yield Fix(("R14",), (node.name,), what, partial(_store_computed, graph, node.outputs[0]))


def shifted(graph: OnnxGraph) -> Iterator[Fix]:
    """Zero points that go with other integers: uint8 around 128 as int8, weights less their own (R9, R10)."""
    for quant in graph.quants:
        if quant.quantizes and quant.tensor not in graph.fixed:
            readers = [graph.quant(r.node) for r in graph.readers(quant.output)]
            around = all(dq is not None and not dq.quantizes and _zeros(dq) == {MIDDLE} for dq in readers)
            if quant.dtype == "uint8" and _zeros(quant) == {MIDDLE} and around and only_nodes_read(graph, quant.output):
                what = "made int8 with zero point 0 of uint8 with zero point 128"
                pair = [quant, *(dq for dq in readers if dq is not None)]
                yield Fix(("R9", "R10"), tuple(q.node.name for q in pair), what, partial(_recentre, graph, pair))
        elif not quant.quantizes and quant.dtype in {"int8", "uint8"} and can_compute(graph, quant.tensor):
            source = graph.quantizer(quant)
            names = (quant.node.name, *([source.node.name] if source is not None else []))
            if (quant.dtype == "uint8" or _zeros(quant) - {0.0}) and _centred(graph, quant) is not None:
                what = "stored its integers less their zero points, in int8"
                yield Fix(("R9", "R10"), names, what, partial(_store_centred, graph, quant))


def _recentre(graph: OnnxGraph, pair: list[Quant], edit: OnnxEdit) -> None:
    import onnx

    for quant in pair:
        _no_zero_point(graph, quant, edit)
    edit.set_integer(pair[0].node, "output_dtype", onnx.TensorProto.INT8)
    edit.forget_type(pair[0].output)


def _no_zero_point(graph: OnnxGraph, quant: Quant, edit: OnnxEdit) -> None:
    """Give a Q or DQ an int8 zero point of 0, in the shape that it has."""
    if name := quant.node.input(2):
        zero = edit.free_name(f"{name}_int8")
        edit.store(zero, np.zeros([size or 0 for size in graph.shape(name) or ()], np.int8))
        edit.read(quant.node, 2, zero)


def _centred(graph: OnnxGraph, dq: Quant) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]] | None:
    """A weight's integers less their zero points; None if they do not fit int8, or the zero points are not known."""
    integers = compute(graph, dq.tensor).astype(np.int32)
    zero = dq.zeros
    if zero is None:
        return None
    if zero.size > 1:
        if dq.axis is None or dq.block:
            return None
        zero = zero.reshape([-1 if axis == dq.axis else 1 for axis in range(integers.ndim)])
    found = integers - zero.astype(np.int32).reshape(zero.shape if zero.size > 1 else ())
    return found.astype(np.int8) if found.size and INT8[0] <= found.min() and found.max() <= INT8[1] else None


def _store_centred(graph: OnnxGraph, dq: Quant, edit: OnnxEdit) -> None:
    values = _centred(graph, dq)
    if values is not None:
        name = edit.free_name(f"{dq.tensor}_int8")
        edit.store(name, values)
        edit.read(dq.node, 0, name)
        _no_zero_point(graph, dq, edit)


def in_front_of_relu(graph: OnnxGraph) -> Iterator[Fix]:
    """A pair that only a Relu reads: behind the Relu it rounds to the same numbers (R21, R38)."""
    for dq in graph.quants:
        quant = None if dq.quantizes else graph.quant(graph.producers.get(dq.tensor))
        relu = _sole_reader(graph, dq.output)
        if quant is None or relu is None or relu.op != "Relu" or quant.tensor in graph.fixed:
            continue
        alone = _sole_reader(graph, quant.output) is not None and _equal(quant, dq) and _zeros(quant) == {0.0}
        whole = graph.dtype(quant.tensor) == "int32"  # which Q takes, and Relu not before opset 14
        if alone and not whole and quant.saturates and _wants_int8(graph, relu, quant):
            what = f"moved Q/DQ behind {relu.name}"
            yield Fix(("R21", "R38"), (dq.node.name,), what, partial(_move_behind, quant, dq, relu))


def _sole_reader(graph: OnnxGraph, name: str) -> Node | None:
    readers = graph.readers(name)
    return readers[0].node if len(readers) == 1 and only_nodes_read(graph, name) else None


def _wants_int8(graph: OnnxGraph, relu: Node, quant: Quant) -> bool:
    """Whether a pair behind the Relu serves: an operation reads it, and no Q with another scale does."""
    readers = list(graph.final_readers(relu.outputs[0]))
    quants = [found for r in readers if (found := graph.quant(r.node)) is not None]
    return only_nodes_read(graph, relu.outputs[0]) and bool(readers) and all(_equal(quant, q) for q in quants)


def _move_behind(quant: Quant, dq: Quant, relu: Node, edit: OnnxEdit) -> None:
    result = relu.outputs[0]
    between = edit.free_name(f"{result}_float")
    edit.read(relu, 0, quant.tensor)
    edit.write(relu, between)
    edit.move(relu, before=quant.node)
    edit.read(quant.node, 0, between)
    edit.write(dq.node, result)
    edit.forget_type(dq.output)


EXACT: Final[tuple[Planner, ...]] = (
    integer_constants,
    quantized_biases,
    shifted,
    unread,
    requantized,
    doubled,
    in_front_of_relu,
)
"""In the order in which they are applied."""
