"""Set aside what only training needs: placement then sees the graph that will be deployed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from torch import fx, nn

from ..editor import Editor
from ..graph import ORIGIN, attribute, constant, origin
from ..ops import kind_name
from ..passbase import Numeric, Pass
from .fuse_batch_norm import FOLDABLE, declined
from .keep_dropout import is_dropout

__all__ = ["SET_ASIDE", "SetAside", "SetAsideTraining", "set_aside"]

SET_ASIDE: Final = "set_aside"
"""Key of ``node.meta`` for what was set aside."""
_STATISTICS: Final = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class SetAside:
    """What stood around a node before.

    Attributes:
        norm: Path of the BatchNorm that the node's layer had behind it; None for none.
        dropouts: (position, path): the dropout module through which the node read its input tensor at that position,
            counted over its arguments in order; one input may have several, the first is applied first.
    """

    norm: str | None = None
    dropouts: tuple[tuple[int, str], ...] = ()


def set_aside(node: fx.Node) -> SetAside:
    """What was set aside around `node`."""
    found = node.meta.get(SET_ASIDE)
    return found if isinstance(found, SetAside) else SetAside()


@dataclass(frozen=True)
class SetAsideTraining(Pass):
    """Take dropout and BatchNorm behind convolutions and linear layers out of the graph until placement is done.

    Problem: quantizers stand where the deployed graph wants them, which has neither; the graph that trains has both.

    Rewrite: dropout is skipped. ``batch_norm(conv(x, W, b), …)`` becomes ``conv(x, W, b)`` under the name of the
    BatchNorm, as when it is fused for inference. What stood there is noted on the nodes, for the pass
    ``restore-training``.

    Declines, with a note: a BatchNorm that inference would not fuse either, and one that is no torch.nn module. These
    stay where they are.
    """

    name: ClassVar[str] = "set-aside-training"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    provides: ClassVar[tuple[str, ...]] = ("fused",)
    numeric: ClassVar[Numeric] = "changes-values"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if is_dropout(node):
                _skip(editor, node)
        for node in list(editor.graph.nodes):
            layer = node.args[0] if kind_name(node) == "batch_norm" else None
            if not isinstance(layer, fx.Node) or kind_name(layer) not in FOLDABLE:
                continue
            why = declined(node, layer) or (norm_path(node) is None and "it is called as a function")
            if why:
                editor.note(node, self.name, f"BatchNorm is not folded into {layer.name}: {why}")
            else:
                _absorb(editor, node, layer)


def norm_path(node: fx.Node) -> str | None:
    """Path of the torch.nn BatchNorm whose call `node` is; None if its tensors belong to no such module."""
    owner = node.graph.owning_module
    stored = dict(zip(_STATISTICS, node.args[1:5], strict=True))
    paths = {str(a.target).rpartition(".")[0] for a in stored.values() if isinstance(a, fx.Node)}
    if owner is None or len(paths) != 1:
        return None
    path = paths.pop()
    module: Any = attribute(owner, path) if path else None
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return None
    for name, argument in stored.items():
        if (constant(argument) is None) != (getattr(module, name) is None):
            return None
    return path


def _note(node: fx.Node, **changes: Any) -> None:
    node.meta[SET_ASIDE] = replace(set_aside(node), **changes)


def _skip(editor: Editor, node: fx.Node) -> None:
    path, before = str(node.target), set_aside(node).dropouts
    for user in list(node.users):
        places = [i for i, source in enumerate(_inputs(user)) if source is node]
        chain = (*(p for _, p in before), path)
        held = set_aside(user).dropouts
        _note(user, dropouts=(*((at, p) for at in places for p in chain), *held))
    editor.replace(node, node.args[0])  # type: ignore[arg-type]
    editor.erase(node)


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments in order, repeated as they are."""
    found: list[fx.Node] = []

    def see(source: fx.Node) -> fx.Node:
        found.append(source)
        return source

    fx.map_arg((node.args, node.kwargs), see)
    return found


def _absorb(editor: Editor, norm: fx.Node, layer: fx.Node) -> None:
    if set_aside(norm).dropouts:
        editor.note(norm, SetAsideTraining.name, f"the dropout between {layer.name} and its BatchNorm is left out")
    path, statistics = norm_path(norm), norm.args[1:5]
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    if len(weight.users) > 1:  # each layer's weight is folded, and quantized, on its own
        with editor.before(layer):
            weight = editor.get_attr(str(weight.target), like=layer)
    editor.retarget(norm, layer.target, (layer.args[0], weight, *layer.args[2:]), layer.kwargs)  # type: ignore[arg-type]
    norm.meta[ORIGIN] = origin(layer)
    _note(norm, norm=path, dropouts=set_aside(layer).dropouts)
    editor.erase(layer)
    editor.erase_dead(a for a in statistics if isinstance(a, fx.Node))
