"""Residual additions in an ONNX graph, and which of their edges is the convolution's (R23, R25)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from .onnx_graph import Node, OnnxGraph

__all__ = ["ResidualAdd", "behind_weighted", "residual_adds"]

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
    addition and nobody else reads its result. Additions that broadcast are not fused (R44) and not given.

    Yields:
        The additions, in the graph's order.
    """
    for node in graph.nodes:
        if node.op in {"Add", "Sum"} and len(node.inputs) == 2 and not graph.fixed.intersection(node.inputs):
            if node.inputs[0] == node.inputs[1] or _broadcasts(graph, node):
                continue
            ends = [_convolution(graph, name) for name in node.inputs]
            if ends[0] is not None and ends[1] is not None:
                yield _both(graph, node, ends[0], ends[1])
            elif (conv := ends[0] or ends[1]) is not None:
                yield ResidualAdd(node, conv, 0 if ends[0] is not None else 1)


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
        if node.op == "Conv":
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


def _both(graph: OnnxGraph, add: Node, first: Node, second: Node) -> ResidualAdd:
    """A convolution at either end: the longer way from the fork is the convolution's (R25)."""
    lengths = _ways(graph, first, second)
    edge = 0 if lengths[0] > lengths[1] else 1
    conv, other = (first, second) if edge == 0 else (second, first)
    return ResidualAdd(add, conv, edge, other, decided=lengths[0] != lengths[1])


def _ways(graph: OnnxGraph, first: Node, second: Node) -> tuple[int, int]:
    """How many convolutions lie between the lowest common ancestor and each end; (0, 0) if there is none."""
    common = _ancestors(graph, first) & _ancestors(graph, second)
    if not common:
        return 0, 0
    fork = max(common)
    return _longest(graph, fork, first), _longest(graph, fork, second)


def _ancestors(graph: OnnxGraph, node: Node) -> set[int]:
    """Indices of the nodes that a node's result depends on, itself included."""
    found, todo = set(), [node]
    while todo:
        one = todo.pop()
        if one.index not in found:
            found.add(one.index)
            makers = (graph.producers.get(name) for name in one.inputs if name not in graph.fixed)
            todo.extend(maker for maker in makers if maker is not None)
    return found


def _longest(graph: OnnxGraph, fork: int, end: Node) -> int:
    """The most convolutions on a way from the node at index `fork` to `end`, `end` included."""
    most = {fork: 0}
    between = sorted(index for index in _ancestors(graph, end) if index > fork)
    for index in between:
        node = graph.nodes[index]
        makers = (graph.producers.get(name) for name in node.inputs)
        before = [most[maker.index] for maker in makers if maker is not None and maker.index in most]
        if before:
            most[index] = max(before) + (node.op in {"Conv", "ConvTranspose"})
    return most.get(end.index, 0)
