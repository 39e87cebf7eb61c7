"""Advise: shapes that the backend runs badly in low precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx

from ..errors import TargetError
from ..graph import Annotation, Editor, annotations, constant, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..target import Heuristic

__all__ = ["CHECKS", "Advise"]


def _small_channels(node: fx.Node, few: int, multiple: int) -> str | None:
    weight = constant(node.args[1])
    if weight is None or node.kwargs["groups"] != 1:
        return None
    out, into = int(weight.shape[0]), int(weight.shape[1])
    kernel = tuple(weight.shape[2:])
    eights = out % multiple == 0 or into % multiple == 0
    fine = eights and len(set(kernel)) == 1 and (_first(node) or out >= few or into >= few)
    if min(out, into) >= few or fine:
        return None
    return f"{into} input and {out} output channels with a {'x'.join(map(str, kernel))} kernel"


def _first(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _grouped_channels(node: fx.Node, multiple: int, kernel: int) -> str | None:
    weight = constant(node.args[1])
    if weight is None or node.kwargs["groups"] == 1:
        return None
    if weight.shape[0] % multiple == 0 and min(weight.shape[2:]) >= kernel:
        return None
    return f"{weight.shape[0]} output channels in {node.kwargs['groups']} groups with a {'x'.join(map(str, weight.shape[2:]))} kernel"


def _thin_matrix(node: fx.Node, few: int) -> str | None:
    left, right = (tensor_info(a) for a in node.args[:2])  # type: ignore[arg-type]
    if left is None or right is None or len(left.shape) < 2 or len(right.shape) < 2:
        return None
    rows, inner = left.shape[-2], left.shape[-1]
    columns = right.shape[-2] if kind_name(node) == "linear" else right.shape[-1]
    if len(left.shape) == 2 and kind_name(node) == "linear":
        rows = few  # the rows are the batch, which example inputs do not fix
    if rows == 1 or columns == 1 or inner < few or columns < few:
        return f"a {rows} by {inner} times {inner} by {columns} product"
    return None


def _always(node: fx.Node) -> str | None:
    return "whatever its shape"


CHECKS: Final[Mapping[str, Callable[..., str | None]]] = {
    "small-channels": _small_channels,
    "grouped-channels": _grouped_channels,
    "thin-matrix": _thin_matrix,
    "always": _always,
}
"""Checks that a target's heuristics may name; each returns what it saw, or None."""


@dataclass(frozen=True)
class Advise(Pass):
    """Apply the target's kernel heuristics (R35 to R37, R43) to quantized operations.

    ``advise`` leaves the operation quantized and notes the rule; ``exclude`` makes it float. What a recipe asked for is
    never excluded.
    """

    name: ClassVar[str] = "advise"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        for heuristic in state(editor.gm).target.heuristics:
            if heuristic.check not in CHECKS:
                raise TargetError(f"heuristic {heuristic.rule} names check {heuristic.check!r}, which does not exist",
                                  hint=f"use one of {', '.join(CHECKS)}")  # fmt: skip
            for node in editor.graph.nodes:
                if kind_name(node) in heuristic.kinds and any(a.spec for a in annotations(node).values()):
                    self._apply(editor, node, heuristic)

    @staticmethod
    def _apply(editor: Editor, node: fx.Node, heuristic: Heuristic) -> None:
        saw = CHECKS[heuristic.check](node, **dict[str, Any](heuristic.parameters))
        if saw is None:
            return
        if heuristic.action == "exclude":
            for edge, annotation in annotations(node).items():
                if annotation.rule != "recipe":
                    editor.annotate(
                        node, edge, Annotation(None, heuristic.rule, f"{heuristic.reason}: {saw}")
                    )
        else:
            editor.note(node, heuristic.rule, f"{heuristic.reason}: {saw}", kind="advice")
