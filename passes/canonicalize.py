"""Canonicalize: one spelling for each operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..editor import Editor
from ..graph import TENSOR, tensor_info
from ..ops import Spelling, bind, kind, spelling, split_args
from ..passbase import Pass

__all__ = ["Canonicalize"]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite every known function and method call into its kind's canonical call.

    Problem: ``x + y``, ``torch.add(x, y)``, ``x.add(y)`` and ``x += y`` are one operation; passes that list
    spellings forget some.

    Rewrite: the canonical function of :data:`fxq.ops.KINDS`, tensors by position, everything else by keyword
    with defaults filled in, one number per spatial dimension.

    Declines: calls with an argument that the canonical function lacks (``alpha=2``, ``out=``, a dtype); they
    stay as they are, and no later pass takes them for something else. Arithmetic on Python numbers (sizes) is
    left alone.
    """

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[tuple[str, ...]] = ("functional",)

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            spelled = spelling(node)
            if spelled is not None:
                self._rewrite(editor, node, spelled)

    @staticmethod
    def _rewrite(editor: Editor, node: fx.Node, spelled: Spelling) -> None:
        gives_tensors = tensor_info(node) is not None or isinstance(node.meta.get(TENSOR), tuple)
        if not gives_tensors and kind(node) is spelled.kind:
            return
        bound = bind(spelled, node.args, node.kwargs)
        if bound is None:
            return
        args, kwargs = split_args(spelled.kind, bound)
        editor.retarget(node, spelled.kind.target, args, kwargs)
