"""Normalizations behind a convolution: what lies between the two is stored in INT8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..editor import Editor
from ..graph import Annotation, State, edge_annotations, state
from ..ops import kind_name
from ..passbase import Pass
from .annotate import applied, asked, governing
from .tie_scales import moved

__all__ = ["QuantizeNorms"]


@dataclass(frozen=True)
class QuantizeNorms(Pass):
    """Quantize a convolution's result on its way into a normalization whose own result is quantized.

    Problem: a normalization over channels is no part of the convolution's kernel, so the result in between is written
    and read in float, although kernels that read and write INT8 lie on both sides.

    Rewrite: the convolution's output gets a quantizer, so its kernel writes INT8 and the normalization reads it (R38).
    Operations that only move data may stand between; nobody else may read any of it.

    Declines in silence: a result that others read too; a normalization that gives nothing quantized (R26); a
    convolution that stays float, or whose output a recipe decides on.
    """

    name: ClassVar[str] = "quantize-norms"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        now = state(editor.gm)
        for node in editor.graph.nodes:
            if kind_name(node) not in now.target.norms.kinds:
                continue
            convolution = _source(node, now)
            if convolution is not None and _gives_quantized(node, now.target.ties):
                editor.annotate(convolution, "output", _annotation(node, now))


def _source(norm: fx.Node, now: State) -> fx.Node | None:
    """The quantized convolution whose result this normalization alone reads, moved at most."""
    reader, here = norm, norm.args[0]
    while isinstance(here, fx.Node) and list(here.users) == [reader]:
        if kind_name(here) in now.target.norms.behind:
            own = edge_annotations(here)
            said = applied(here, "output", now.recipe), applied(norm, "input", now.recipe)
            kept = any(rule is not None and None in (rule[1].edges.output, rule[1].edges.input) for rule in said)
            free = "output" not in own and not kept
            return here if free and own and all(annotation.spec is not None for annotation in own.values()) else None
        sources = list(moved(here, now.target.ties))
        if len(sources) != 1:
            return None
        reader, here = here, sources[0]
    return None


def _gives_quantized(norm: fx.Node, ties: frozenset[str]) -> bool:
    """Whether a quantizer lies right behind it, or behind operations that only move data."""
    return any(governing(tensor) is not None for tensor in _carried(norm, ties))


def _carried(tensor: fx.Node, ties: frozenset[str]) -> Iterator[fx.Node]:
    """A tensor, and what is the same values moved."""
    waiting = [tensor]
    while waiting:
        here = waiting.pop()
        yield here
        waiting += [user for user in here.users if any(source is here for source in moved(user, ties))]


def _annotation(norm: fx.Node, now: State) -> Annotation:
    spec, priority, how = asked(norm, "input", "input 0", now)
    reason = f"{norm} is no part of this kernel, and gives INT8: it reads INT8 too"
    return Annotation(spec, "R38", reason + how, priority)
