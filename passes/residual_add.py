"""Residual additions: only the skip edge is quantized."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..graph import Annotation, Editor, annotations, constant, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..target import Target

__all__ = ["ResidualAdd", "longer_way"]


@dataclass(frozen=True)
class ResidualAdd(Pass):
    """Quantize the skip input of each addition that TensorRT fuses into a convolution, and only that one.

    Problem: of ``conv(...) + skip`` TensorRT makes one INT8 kernel if the skip arrives in INT8 (R23). With neither
    input quantized the kernel's result is float and the block leaves INT8; with both, Add separates from Conv. Tools
    that swap modules do not see the addition at all.

    Rewrite: the edge that comes straight from a convolution that nobody else reads stays float. The other one is the
    skip: it reads the tensor's own quantizer if the tensor has one (R24, R29), so the skip travels in INT8; otherwise
    the tensor gets one (a downsample convolution's output, a sum of a pre-activation block). Where both inputs are
    convolutions, the one on the longer way from their lowest common ancestor is the block's last one (R25).

    Declines, with a note: neither input comes straight from a convolution; the convolution stays float; the inputs
    broadcast (R44); the other input is a constant, or has no ancestor in common with the convolution.
    """

    name: ClassVar[str] = "residual-add"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        target = state(editor.gm).target
        if target.residual.policy == "none":
            return
        order = {node: index for index, node in enumerate(editor.graph.nodes)}
        for node in editor.graph.nodes:
            if kind_name(node) == "add" and tensor_info(node) is not None and not _spoken_for(node):
                self._annotate(editor, node, target, order)

    def _annotate(self, editor: Editor, add: fx.Node, target: Target, order: dict[fx.Node, int]) -> None:
        if not all(isinstance(a, fx.Node) and tensor_info(a) is not None for a in add.args):
            return
        conv_edge, why = _convolution_edge(add, target, order)
        if conv_edge is None:
            editor.note(add, "R23", f"this addition stays float: {why}")
            return
        skip_edge = 1 - conv_edge
        skip, conv = add.args[skip_edge], add.args[conv_edge]
        shared = any(a.spec is not None for u in skip.users for a in _edges_on(u, skip))  # type: ignore[union-attr]
        reason = f"skip edge: {conv} fuses with the addition when the other input arrives in INT8"  # R23
        if shared:
            reason += f"; {skip} has a quantizer already and the same one serves"
        edges = (0, 1) if target.residual.policy == "both" else (skip_edge,)
        for edge in edges:
            editor.annotate(add, edge, Annotation(target.activation, "R24" if shared else "R23", reason))


def _spoken_for(node: fx.Node) -> bool:
    """Whether a recipe rule decided on this addition's inputs."""
    return any(a.rule == "recipe" for edge, a in annotations(node).items() if edge != "output")


def _edges_on(user: fx.Node, tensor: fx.Node) -> list[Annotation]:
    return [a for edge, a in annotations(user).items() if isinstance(edge, int) and user.args[edge] is tensor]


def _convolution_edge(add: fx.Node, target: Target, order: dict[fx.Node, int]) -> tuple[int | None, str]:
    """Index of the input that stays float, or None and the reason."""
    first, second = add.args
    if first is second:
        return None, "both inputs are one tensor"
    if any(constant(a) is not None for a in (first, second)):
        return None, "one input is a constant"
    shapes = [tensor_info(a).shape for a in (first, second)]  # type: ignore[arg-type,union-attr]
    if shapes[0] != shapes[1]:
        return (
            None,
            f"the inputs {list(shapes[0])} and {list(shapes[1])} broadcast, so it does not fuse (R44)",
        )
    fusible = [i for i, a in enumerate((first, second)) if _fuses(a, add, target)]  # type: ignore[arg-type]
    if not fusible:
        return None, "neither input comes straight from a convolution that nothing else reads"
    lengths = longer_way(first, second, target, order)  # type: ignore[arg-type]
    if lengths is None:
        return None, "its inputs have no tensor in common that they come from"
    if len(fusible) == 2:
        edge = 0 if lengths[0] >= lengths[1] else 1
    else:
        edge = fusible[0]
    conv = add.args[edge]
    if not any(a.spec is not None for a in annotations(conv).values()):  # type: ignore[arg-type]
        return None, f"its convolution {conv} stays float"
    return edge, ""


def _fuses(node: fx.Node, add: fx.Node, target: Target) -> bool:
    return kind_name(node) in target.residual.weighted and list(node.users) == [add]


def longer_way(
    first: fx.Node, second: fx.Node, target: Target, order: dict[fx.Node, int]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """How far two nodes are from their lowest common ancestor.

    Args:
        first: One node.
        second: The other.
        target: Says which op kinds count as weighted.
        order: Position of every node in the graph.

    Returns:
        For each of the two, the length of its longest way from the ancestor, as (weighted operations, all operations);
        None if they have no ancestor in common. Only the nodes between are visited.
    """
    ways: dict[fx.Node, dict[int, tuple[int, int]]] = {}
    heap: list[tuple[int, fx.Node]] = []

    def reach(node: fx.Node, side: int, way: tuple[int, int]) -> None:
        if node.op == "get_attr":
            return
        if node not in ways:
            ways[node] = {}
            heapq.heappush(heap, (-order[node], node))
        ways[node][side] = max(ways[node].get(side, (0, 0)), way)

    reach(first, 0, (0, 0))
    reach(second, 1, (0, 0))
    while heap:
        _, node = heapq.heappop(heap)
        sides = ways[node]
        if len(sides) == 2:
            return sides[0], sides[1]
        for side, (weighted, steps) in sides.items():
            more = kind_name(node) in target.ops
            for source in node.all_input_nodes:
                reach(source, side, (weighted + more, steps + 1))
    return None
