"""Tie scales: tensors that only move data between each other share one scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from ..editor import Editor
from ..graph import Annotation, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..recipe import PerTensor, QSpec
from .annotate import governing, quantized_edges

__all__ = ["TieScales", "moved", "tied"]


@dataclass(frozen=True)
class TieScales(Pass):
    """Give one scale to the inputs and the output of concatenations, max-pools and pure data movement.

    Problem: TensorRT moves the quantizer after a concatenation onto each input. Equal scales cancel there,
    unequal ones leave requantization kernels (R27, R28). The same holds of operations that commute with
    quantization (R19).

    Rewrite: tensors on both sides of such an operation that have a quantizer get the same tie, named after
    the first, and one calibration method, that of the latest recipe rule among them.

    Declines, with a note: tensors of different data types or granularity, which cannot have one scale.
    Averages, sums and clipped activations have other values than their inputs; a tensor that is quantized
    alone needs no tie; what comes out of a layer that is kept whole is of its own making; weights are never
    tied.
    """

    name: ClassVar[str] = "tie-scales"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        for members in tied(editor.graph, state(editor.gm).target.ties):
            governed = {m: a for m in members if (a := governing(m)) is not None and a.spec is not None}
            while governed:
                first = next(iter(governed))
                alike = [m for m in governed if _form(governed[m]) == _form(governed[first])]
                rest = {m: a for m, a in governed.items() if m not in alike}
                for other in rest:
                    _note_parted(editor, first, other, governed)
                self._tie(editor, {m: governed[m] for m in alike})
                governed = rest

    @staticmethod
    def _tie(editor: Editor, members: dict[fx.Node, Annotation]) -> None:
        first = next(iter(members))
        spec = members[first].spec
        if len(members) < 2 or spec is None or not isinstance(spec.granularity, PerTensor):
            return
        method = _spec(max(members.values(), key=lambda a: a.priority)).method
        for member in members:
            for user, edge, annotation in quantized_edges(member):
                same = replace(_spec(annotation), method=method)
                editor.annotate(user, edge, replace(annotation, spec=same, tie=first.name))


def _spec(annotation: Annotation) -> QSpec:
    assert annotation.spec is not None
    return annotation.spec


def _form(annotation: Annotation) -> QSpec:
    """What tensors with one scale must agree on."""
    return replace(_spec(annotation), method=None)


def _note_parted(editor: Editor, first: fx.Node, other: fx.Node, governed: dict[fx.Node, Annotation]) -> None:
    editor.note(
        other,
        "R27",
        f"{other} is {_form(governed[other])} and {first} is {_form(governed[first])}, so they share no "
        "scale although they hold the same data",
    )


def tied(graph: fx.Graph, ties: frozenset[str]) -> list[list[fx.Node]]:
    """Groups of nodes that pass the same values on, in the order of the graph; `ties` are the kinds that do."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader.setdefault(node, node) is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in graph.nodes:
        for source in moved(node, ties):
            leader[find(node)] = find(source)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in leader:
            groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def moved(node: fx.Node, ties: frozenset[str]) -> Iterator[fx.Node]:
    """The inputs whose values the node passes on (not sizes, indices or weights)."""
    kind = kind_name(node)
    if kind not in ties or not node.args:
        return
    parts = node.args[0] if isinstance(node.args[0], list | tuple) else (node.args[0],)
    for part in parts:
        if not isinstance(part, fx.Node) or part.op == "get_attr":
            continue
        if kind == "getitem" and tensor_info(part) is None and kind_name(part) not in ties:
            continue  # one of several results of something else, which need not have the same range
        yield part
