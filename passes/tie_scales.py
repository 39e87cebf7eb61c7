"""Tie scales: tensors that only move data between each other share one scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from ..graph import Annotation, Editor, annotations, state
from ..ops import kind_name
from ..passbase import Pass

__all__ = ["TieScales"]


@dataclass(frozen=True)
class TieScales(Pass):
    """Give one scale to the inputs and the output of concatenations, max-pools and pure data movement.

    Problem: TensorRT moves the quantizer after a concatenation onto each input. Equal scales cancel there, unequal ones
    leave requantization kernels (R27, R28). The same holds of operations that commute with quantization (R19).

    Rewrite: tensors on both sides of such an operation that have a quantizer get the same tie, named after the first.

    Declines: averages, sums and clipped activations, whose values are others than their inputs'; a group in which
    only one tensor is quantized needs no tie. Weights are never tied.
    """

    name: ClassVar[str] = "tie-scales"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        ties = state(editor.gm).target.ties
        leader: dict[fx.Node, fx.Node] = {}

        def find(node: fx.Node) -> fx.Node:
            while leader.setdefault(node, node) is not node:
                leader[node] = leader[leader[node]]
                node = leader[node]
            return node

        for node in editor.graph.nodes:
            if kind_name(node) in ties:
                for source in _data_inputs(node):
                    if source.op != "get_attr":
                        leader[find(node)] = find(source)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in list(leader):
            if _quantized_edges(node):
                groups.setdefault(find(node), []).append(node)
        order = {node: index for index, node in enumerate(editor.graph.nodes)}
        for members in groups.values():
            if len(members) > 1:
                name = min(members, key=order.__getitem__).name
                for member in members:
                    for user, edge, annotation in _quantized_edges(member):
                        editor.annotate(user, edge, replace(annotation, tie=name))


def _data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values the node passes on (not sizes or indices)."""
    first = node.args[0] if node.args else None
    parts = first if isinstance(first, list | tuple) else (first,)
    return [p for p in parts if isinstance(p, fx.Node)]


def _quantized_edges(tensor: fx.Node) -> list[tuple[fx.Node, int | str, Annotation]]:
    """Every annotation that quantizes `tensor`, with the node and edge that it is noted on."""
    found: list[tuple[fx.Node, int | str, Annotation]] = [
        (user, edge, a)
        for user in tensor.users
        for edge, a in annotations(user).items()
        if isinstance(edge, int) and user.args[edge] is tensor and a.spec is not None
    ]
    own = annotations(tensor).get("output")
    if own is not None and own.spec is not None:
        found.append((tensor, "output", own))
    return found
