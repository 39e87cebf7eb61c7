"""Drop identities: what changes nothing at inference goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ..editor import Editor
from ..graph import tensor_info
from ..ops import kind_name
from ..passbase import Pass

__all__ = ["DropIdentities"]

_DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))
_COPIES = frozenset(("contiguous", "clone", "detach"))
_ONE_INPUT = frozenset(("cat",))


@dataclass(frozen=True)
class DropIdentities(Pass):
    """Remove nodes whose output is their input.

    Rewrite: dropout and stochastic depth outside training, ``contiguous``, ``clone`` and ``detach``
    (nothing is changed in place any more), a concatenation of one tensor, a flatten or permute that changes
    nothing; nodes left without a reader go too.

    Declines: dropout with ``training=True``, which the user asked for, and a reshape or expand to the shape
    that the example has already: another batch size may differ.
    """

    name: ClassVar[str] = "drop-identities"
    requires: ClassVar[tuple[str, ...]] = ("functional",)
    provides: ClassVar[tuple[str, ...]] = ("canonical",)

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            source = _identity_of(node)
            if source is not None:
                editor.replace(node, source)
                editor.erase(node)
        nodes = reversed(list(editor.graph.nodes))
        editor.erase_dead(n for n in nodes if n.op in ("call_function", "call_method", "get_attr") and not n._erased)


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The node that `node` merely repeats."""
    if node.op != "call_function" or not node.args:
        return None
    name = kind_name(node)
    first = node.args[0]
    if name in _ONE_INPUT and isinstance(first, list | tuple) and len(first) == 1:
        first = first[0]
        return first if isinstance(first, fx.Node) else None
    if not isinstance(first, fx.Node):
        return None
    if name in _DROPOUTS:
        return first if node.kwargs.get("training") is False or node.kwargs.get("p") == 0 else None
    if name == "stochastic_depth":  # torchvision.ops.stochastic_depth(input, p, mode, training), kept whole
        training = node.args[3] if len(node.args) > 3 else node.kwargs.get("training", True)
        return first if training is False else None
    if name in _COPIES:
        return first
    same = tensor_info(node) is not None and tensor_info(node) == tensor_info(first)
    if name == "permute" and same:
        dims: Any = node.kwargs["dims"]
        return first if list(dims) == list(range(len(dims))) else None
    return first if name == "flatten" and same else None
