"""Insert quantizers: annotated edges read their tensor through a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..errors import TraceError
from ..graph import Annotation, Editor, annotations, constant, error_at
from ..passbase import Pass
from ..quantizer import QUANTIZERS, Quantizer

__all__ = ["InsertQuantizers"]


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Put one quantizer on each tensor that an annotated edge reads.

    Rewrite: the quantizer goes right behind the tensor, under ``quantizers.<tensor>`` and named after it; edges that
    are annotated read it, others keep reading the float tensor. One tensor has one quantizer (R29): where edges ask
    for different specs, the one from the later recipe rule holds.
    """

    name: ClassVar[str] = "insert-quantizers"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)
    provides: ClassVar[tuple[str, ...]] = ("observed",)

    def call(self, editor: Editor) -> None:
        if hasattr(editor.gm, QUANTIZERS):
            node = next(iter(editor.graph.nodes))
            raise error_at(
                TraceError,
                f"the model has an attribute named {QUANTIZERS!r}, which fxq needs",
                node,
                "rename it",
            )
        for tensor in list(editor.graph.nodes):
            wishes = _wishes(tensor)
            if wishes:
                self._insert(editor, tensor, wishes)

    @staticmethod
    def _insert(
        editor: Editor, tensor: fx.Node, wishes: Mapping[tuple[fx.Node, int | str], Annotation]
    ) -> None:
        chosen = max(wishes.values(), key=lambda a: a.priority)
        if chosen.spec is None:
            return
        path = f"{QUANTIZERS}.{tensor.name}"
        weight = constant(tensor) is not None
        module = Quantizer(
            chosen.spec, tensor=tensor.name, axis=chosen.spec.axis, tie=chosen.tie, weight=weight
        )
        editor.set_module(path, module)
        with editor.after(tensor):
            quantizer = editor.call_module(path, (tensor,), like=tensor, name=f"{tensor.name}_quantizer")
        if any(edge == "output" for _, edge in wishes):
            editor.replace(tensor, quantizer)
            return
        for (user, edge), _ in wishes.items():
            editor.set_arg(user, edge, quantizer)  # type: ignore[arg-type]


def _wishes(tensor: fx.Node) -> dict[tuple[fx.Node, int | str], Annotation]:
    """What the annotated edges of `tensor` ask for."""
    found: dict[tuple[fx.Node, int | str], Annotation] = {
        (user, edge): a
        for user in tensor.users
        for edge, a in annotations(user).items()
        if isinstance(edge, int) and user.args[edge] is tensor and a.spec is not None
    }
    own = annotations(tensor).get("output")
    if own is not None and own.spec is not None:
        found[tensor, "output"] = own
    return found
