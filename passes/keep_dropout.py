"""Keep dropout: dropout that tracing saw in eval mode follows the graph's own mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import fx, nn

from ..editor import Editor
from ..ops import kind_name
from ..passbase import Pass

__all__ = ["DROPOUTS", "KeepDropout", "is_dropout"]

DROPOUTS: Final[dict[str, type[Any]]] = {
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
"""Op kinds of dropout, and the module that each is."""


@dataclass(frozen=True)
class KeepDropout(Pass):
    """Write dropout as a module, which ``train()`` and ``eval()`` switch.

    Problem: tracing sees a model in eval mode, so its dropout is written down as switched off, for good.

    Rewrite: a functional dropout with ``training=False`` becomes a call of the torch.nn module.

    Declines: dropout with ``training=True``, which the model asked for in every mode, and ``p=0``. Other calls with
    ``training=False`` (stochastic depth) stay off, with a note.
    """

    name: ClassVar[str] = "keep-dropout"
    requires: ClassVar[tuple[str, ...]] = ("functional",)
    numeric: ClassVar = "exact"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.op != "call_function" or node.kwargs.get("training") is not False:
                continue
            kind = DROPOUTS.get(kind_name(node))
            if kind is None:
                if kind_name(node) != "batch_norm":
                    editor.note(node, self.name, "it stays as in eval mode, also while the graph trains")
            elif node.kwargs.get("p"):
                self._rewrite(editor, node, kind)

    @staticmethod
    def _rewrite(editor: Editor, node: fx.Node, kind: type[Any]) -> None:
        path = editor.free_path(f"{node.name}_module")
        editor.set_module(path, kind(node.kwargs["p"]).eval())
        editor.retarget_module(node, path, (node.args[0],))


def is_dropout(node: fx.Node) -> bool:
    """Whether `node` calls a dropout module."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return type(owner.get_submodule(str(node.target))) in DROPOUTS.values()
