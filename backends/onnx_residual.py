"""Residual additions in an ONNX graph, and which of their edges is the convolution's (R23, R25)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .onnx_graph import WEIGHTED, OnnxGraph
from .onnx_nodes import Node

__all__ = ["ResidualAdd", "behind_weighted", "residual_adds"]

CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
AFFINE: Final = frozenset({"Add", "Sub", "Mul", "Div"})


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """An addition that TensorRT can fuse into a convolution's kernel.

    Attributes:
        add: The addition.
        conv: The convolution that takes it along.
        conv_edge: Which input of the addition comes from it.
        other_conv: The convolution that ends on the other edge too (a downsample block); None if not.
        decided: Whether it is known which edge is the convolution's: with a convolution on both, the way back
            to where the branches fork has to be longer on one side.
    """

    add: Node
    conv: Node
    conv_edge: int
    other_conv: Node | None = None
    decided: bool = True

    @property
    def skip_edge(self) -> int:
        """Which input of the addition is the skip."""
        return 1 - self.conv_edge


def residual_adds(graph: OnnxGraph) -> Iterator[ResidualAdd]:
    """The additions of two activations with a convolution at the end of at least one edge.

    A convolution counts if nothing but a folded BatchNormalization, constants and Q/DQ lie between it and the
    addition and nobody else reads its result. Additions that broadcast are not fused (R44) and not given, nor
    are those whose inputs have nothing in common that they come from.

    Yields:
        The additions, in the graph's order.
    """
    for node in graph.nodes:
        if node.op in {"Add", "Sum"} and len(node.inputs) == 2 and not graph.fixed.intersection(node.inputs):
            if node.inputs[0] == node.inputs[1] or _broadcasts(graph, node):
                continue
            first, second = (_convolution(graph, name) for name in node.inputs)
            ways = _ways(graph, node) if first is not None or second is not None else None
            if ways is None:
                continue
            if first is not None and second is not None:
                yield _both(node, first, second, ways)
            elif (conv := first or second) is not None:
                yield ResidualAdd(node, conv, 0 if first is not None else 1)


def behind_weighted(graph: OnnxGraph, name: str, ops: frozenset[str]) -> Node | None:
    """The weighted operation whose result a tensor is, perhaps with BatchNormalization, bias or a factor.

    Args:
        graph: The graph.
        name: The tensor.
        ops: The operators to look for.
    """
    node = graph.producers.get(name)
    while node is not None and node.op not in ops:
        step = _through_affine(graph, node)
        node = graph.producers.get(step) if step else None
    return node


def _through_affine(graph: OnnxGraph, node: Node) -> str | None:
    """The activation behind an operation that is folded into a kernel; None if the node is none."""
    if node.op in {"BatchNormalization", "Identity"}:
        return node.inputs[0]
    moving = [name for name in node.inputs if name not in graph.fixed]
    return moving[0] if node.op in AFFINE and len(moving) == 1 else None


def _broadcasts(graph: OnnxGraph, add: Node) -> bool:
    """Whether the inputs' shapes are known to differ."""
    first, second = (graph.shape(name) for name in add.inputs)
    if first is None or second is None:
        return False
    pairs = zip(first, second, strict=False)
    return len(first) != len(second) or any(a != b for a, b in pairs if None not in (a, b))


def _convolution(graph: OnnxGraph, name: str) -> Node | None:
    """The convolution whose result arrives here, if nobody else reads anything on the way."""
    integers = False
    while len(graph.readers(name)) == 1 and (node := graph.producers.get(name)) is not None:
        if node.op in CONVOLUTIONS:
            return node
        if (quant := graph.quant(node)) is not None:
            integers = not quant.quantizes
            step: str | None = quant.tensor
        else:
            step = node.inputs[0] if integers else _through_affine(graph, node)
        if step is None:
            return None
        name = step
    return None


def _both(add: Node, first: Node, second: Node, ways: tuple[int, int]) -> ResidualAdd:
    """A convolution at either end: the longer way from the fork is the convolution's (R25)."""
    edge = 0 if ways[0] > ways[1] else 1
    conv, other = (first, second) if edge == 0 else (second, first)
    return ResidualAdd(add, conv, edge, other, decided=ways[0] != ways[1])


def _ways(graph: OnnxGraph, add: Node) -> tuple[int, int] | None:
    """The most weighted operations on a way from the inputs' lowest common ancestor to each of them.

    The ancestor is a node or an input of the graph. Only what lies between is visited: nodes are taken from
    the latest back to the earliest, and the first one that both sides have reached is it.
    """
    most: dict[str, dict[int, int]] = {}
    heap: list[tuple[int, str]] = []

    def reach(name: str, side: int, length: int) -> None:
        node = graph.producers.get(name)
        key = node.outputs[0] if node is not None else name
        if key not in most:
            most[key] = {}
            heapq.heappush(heap, (-node.index if node is not None else 1, key))
        most[key][side] = max(most[key].get(side, 0), length)

    for side, name in enumerate(add.inputs):
        reach(name, side, 0)
    while heap:
        _, key = heapq.heappop(heap)
        sides = most[key]
        if len(sides) == 2:
            return sides[0], sides[1]
        node = graph.producers.get(key)
        if node is None:
            continue
        for name in node.inputs:
            if name and name not in graph.fixed:
                for side, length in sides.items():
                    reach(name, side, length + (node.op in WEIGHTED))
    return None
