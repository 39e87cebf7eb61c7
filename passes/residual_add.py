"""Residual additions: only the skip edge is quantized."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..editor import Editor
from ..graph import Annotation, State, constant, edge_annotations, reads_sizes, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..target import Target
from .annotate import SUMS, asked

__all__ = ["ResidualAdd", "longest_ways", "sources"]

Way = tuple[int, int]
_AFFINE = frozenset(("add", "sub", "mul", "div"))


@dataclass(frozen=True)
class ResidualAdd(Pass):
    """Quantize the skip input of each addition that TensorRT fuses into a convolution, and only that one.

    Problem: of ``conv(...) + skip`` TensorRT makes one INT8 kernel if the skip arrives in INT8 (R23). With
    neither input quantized the kernel's result is float and the block leaves INT8; with both, Add separates
    from Conv. Tools that swap modules do not see the addition at all.

    Rewrite: the edge that comes straight from a convolution that nobody else reads (constants that scale or
    shift its result are part of its kernel) stays float. The other one is the skip: it reads the tensor's
    own quantizer if the tensor has one (R24, R29), so the skip travels in INT8; otherwise the tensor gets one
    (a downsample convolution's output, a sum of a pre-activation block). Where both inputs are convolutions,
    the one on the longer way from their lowest common ancestor is the block's last one; where the ways are
    equally long, the one that runs last takes the addition along (R25).

    Where no convolution takes the addition along but one input has a quantizer for another reader (the stream of a
    ConvNeXt, which a depthwise convolution reads too), that input is read through it: the tensor is stored in INT8
    alone, not in INT8 and in float (R29).

    Declines, with a note. Under R23, additions that are residual: neither input comes straight from a
    convolution that nothing else reads; the convolution stays float; its output has a quantizer of its own.
    Under R44: the inputs broadcast. Under R25, additions that are not: both inputs are one tensor; one is a
    constant; they have no ancestor in common; what they have in common is the convolution itself. What a
    recipe says of the addition's edges holds.
    """

    name: ClassVar[str] = "residual-add"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        now = state(editor.gm)
        if now.target.residual.policy == "none":
            return
        order = {node: index for index, node in enumerate(editor.graph.nodes)}
        origins = sources(editor.graph)
        quantized = _quantized(node for node in editor.graph.nodes if kind_name(node) not in SUMS)
        for node in editor.graph.nodes:
            if kind_name(node) not in SUMS or not _adds_tensors(node):
                continue
            if edge_annotations(node).keys() - {"output"}:
                _note_recipe(editor, node, origins)
            else:
                found = _skip(node, now.target, order, origins)
                stored = [edge for edge in (0, 1) if node.args[edge] in quantized]
                if isinstance(found, _Declined) and found.alone and len(stored) == 1:
                    editor.annotate(node, stored[0], _stored(node, stored[0], now))
                elif isinstance(found, _Declined):
                    editor.note(node, found.rule, f"this addition stays float: {found.why}")
                else:
                    editor.annotate(node, found, _annotation(node, found, now, node.args[found] in quantized))
            quantized |= _quantized((node,))


def _quantized(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The tensors that have a quantizer because of an edge of these nodes."""
    return {
        node if edge == "output" else node.args[edge]  # type: ignore[misc,index]
        for node in nodes
        for edge, annotation in edge_annotations(node).items()
        if annotation.spec is not None
    }


def _annotation(add: fx.Node, edge: int, now: State, shared: bool) -> Annotation:
    """What holds for the skip edge."""
    skip, conv = add.args[edge], add.args[1 - edge]
    reason = f"skip edge: {conv} takes the addition along when the other input arrives quantized"
    if shared:
        reason += f"; {skip} has a quantizer already and the same one serves"
    spec, priority, how = asked(add, "input", f"input {edge}", now)
    return Annotation(spec, "R24" if shared else "R23", reason + how, priority)


def _stored(add: fx.Node, edge: int, now: State) -> Annotation:
    """What holds for an input that has a quantizer anyway, of an addition that is a kernel of its own."""
    tensor = add.args[edge]
    spec, priority, how = asked(add, "input", f"input {edge}", now)
    reason = f"{tensor} is stored in INT8 for another reader; read so here too, it needs no float copy"
    return Annotation(spec, "R29", reason + how, priority)


@dataclass(frozen=True)
class _Declined:
    """Why an addition stays float.

    Attributes:
        rule: Rule id.
        why: What follows "this addition stays float: ".
        alone: Whether all that is wrong is that no convolution would take it along.
    """

    rule: str
    why: str
    alone: bool = False


def _adds_tensors(node: fx.Node) -> bool:
    parts = (*node.args[:2], node)
    return all(isinstance(a, fx.Node) and tensor_info(a) is not None for a in parts)


def _note_recipe(editor: Editor, add: fx.Node, origins: Mapping[fx.Node, int]) -> None:
    """Say what a recipe rule that decided on the addition's inputs means for it."""
    said = [a for edge, a in edge_annotations(add).items() if edge != "output" and a.rule == "recipe"]
    first, second = add.args[:2]
    if not said or _unfit(first, second, origins) is not None:  # type: ignore[arg-type]
        return
    if all(a.spec is None for a in said):
        editor.note(add, "R23", f"this addition stays float: {said[0].reason}")
    elif all(a.spec is not None for a in said) and len(said) == 2:
        text = "both its inputs are quantized, so it separates from its convolution"
        editor.note(add, "R23", f"{text}: {said[0].reason}", kind="advice")


def _skip(
    add: fx.Node, target: Target, order: Mapping[fx.Node, int], origins: Mapping[fx.Node, int]
) -> int | _Declined:
    """Index of the input that is the skip."""
    first, second = add.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    unfit = _unfit(first, second, origins)
    if unfit is not None:
        return unfit
    ends = [_convolution(a, add, target) for a in (first, second)]
    if ends == [None, None]:
        return _not_fusible(first, second, target, order)
    conv = 0 if ends[0] is not None else 1
    if None not in ends:
        ways = longest_ways(first, second, target, order)
        assert ways is not None
        longer = [(*way, order[node]) for way, node in zip(ways, (first, second), strict=True)]
        conv = longer.index(max(longer))
    node = ends[conv]
    assert node is not None
    edges = [a for key, a in edge_annotations(node).items() if key != "output"]
    if not edges or any(a.spec is None for a in edges):
        return _Declined("R23", f"its convolution {node} stays float")
    own = edge_annotations(node).get("output")
    if own is not None and own.spec is not None:
        return _Declined("R23", f"the output of its convolution {node} has a quantizer of its own")
    return 1 - conv


def _unfit(first: fx.Node, second: fx.Node, origins: Mapping[fx.Node, int]) -> _Declined | None:
    """Why these two inputs make no residual addition at all."""
    if first is second:
        return _Declined("R25", "both inputs are one tensor")
    if constant(first) is not None or constant(second) is not None:
        return _Declined("R25", "one input is a constant")
    one, other = tensor_info(first), tensor_info(second)
    assert one is not None
    assert other is not None
    if one.dtype != other.dtype or not one.dtype.is_floating_point:
        return _Declined("R25", f"its inputs are {one.dtype} and {other.dtype}".replace("torch.", ""))
    if one.shape != other.shape:
        return _Declined("R44", f"its inputs {list(one.shape)} and {list(other.shape)} broadcast, which does not fuse")
    if not origins[first] & origins[second]:
        return _Declined("R25", "its inputs have no tensor in common that they come from")
    return None


def _convolution(node: fx.Node, add: fx.Node, target: Target) -> fx.Node | None:
    """The convolution that takes the addition along: `node`, or what is only scaled or shifted by constants to
    `node` (R44), if nobody else reads any of it.
    """
    reader = add
    while [user for user in node.users if not reads_sizes(user)] == [reader]:
        if kind_name(node) in target.residual.weighted:
            return node
        moving = [a for a in node.args[:2] if isinstance(a, fx.Node) and constant(a) is None]
        if kind_name(node) not in _AFFINE or len(moving) != 1 or not _keeps_form(node, moving[0]):
            return None
        reader, node = node, moving[0]
    return None


def _keeps_form(node: fx.Node, moving: fx.Node) -> bool:
    """Whether the operation scales or shifts `moving` as it is: divides it, not by it, and broadcasts only to it."""
    given, made = tensor_info(moving), tensor_info(node)
    divides_by = kind_name(node) == "div" and node.args[0] is not moving
    return not divides_by and given is not None and made is not None and given.shape == made.shape


def _not_fusible(first: fx.Node, second: fx.Node, target: Target, order: Mapping[fx.Node, int]) -> _Declined:
    for conv, other in ((first, second), (second, first)):
        if kind_name(conv) in target.residual.weighted:
            ways = longest_ways(conv, other, target, order)
            if ways is not None and ways[0] == (0, 0) and ways[1][0] == 0:
                return _Declined("R25", f"{other} comes from {conv} without another weighted operation between them")
    return _Declined("R23", "neither input comes straight from a convolution that nothing else reads", alone=True)


def sources(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node the set of inputs that its values depend on, as bits; stored tensors (``get_attr``) and
    sizes do not count.

    Two nodes have an ancestor in common exactly if their bits meet. One walk over the graph.
    """
    bits: dict[fx.Node, int] = {}
    inputs = 0
    for node in graph.nodes:
        bits[node] = 0
        if node.op == "get_attr" or reads_sizes(node):
            continue
        for source in node.all_input_nodes:
            bits[node] |= bits[source]
        if node.op == "placeholder":
            bits[node] = 1 << inputs
            inputs += 1
    return bits


def longest_ways(
    first: fx.Node, second: fx.Node, target: Target, order: Mapping[fx.Node, int]
) -> tuple[Way, Way] | None:
    """How far two nodes are from their lowest common ancestor.

    Args:
        first: One node.
        second: The other.
        target: Says which op kinds count as weighted.
        order: Position of every node in the graph.

    Returns:
        For each of the two, the length of its longest way from the ancestor, as (weighted operations, all
        operations); None if they have no ancestor in common. Only the nodes between are visited, the latest
        first, so that each is left when all ways to it are known.
    """
    ways: dict[fx.Node, dict[int, Way]] = {}
    heap: list[tuple[int, fx.Node]] = []

    def reach(node: fx.Node, side: int, way: Way) -> None:
        if node.op == "get_attr" or reads_sizes(node):
            return
        if node not in ways:
            ways[node] = {}
            heapq.heappush(heap, (-order[node], node))
        ways[node][side] = max(ways[node].get(side, (0, 0)), way)

    reach(first, 0, (0, 0))
    reach(second, 1, (0, 0))
    while heap:
        _, node = heapq.heappop(heap)
        sides = ways.pop(node)
        if len(sides) == 2:
            return sides[0], sides[1]
        for side, (weighted, steps) in sides.items():
            more = kind_name(node) in target.weighted
            for source in node.all_input_nodes:
                reach(source, side, (weighted + more, steps + 1))
    return None
