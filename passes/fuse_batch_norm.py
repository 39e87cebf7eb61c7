"""Fuse BatchNorm into the convolution or linear layer before it; :mod:`fxq.folding` has the algebra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from ..editor import Editor
from ..folding import fold
from ..graph import ORIGIN, constant, origin, tensor_info
from ..ops import kind_name
from ..passbase import Pass

__all__ = ["FOLDABLE", "FuseBatchNorm", "declined", "store_folded"]

FOLDABLE = frozenset(
    ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
)


@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Fold BatchNorm into the Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear before it.

    Problem: TensorRT folds BatchNorm itself and would derive other weight ranges than those that were
    calibrated (R22).

    Rewrite: ``batch_norm(conv(x, W, b), …)`` becomes ``conv(x, W', b')`` under the name of the BatchNorm, the
    last node that it replaces, with the weight at its old path. A weight that other nodes read too stays, and
    the folded one goes beside it.

    Declines, with a note: the layer's result has other readers; running statistics are missing or BatchNorm
    is in training mode; the weight is computed, not stored; a Linear layer whose features are not BatchNorm's
    channels.
    """

    name: ClassVar[str] = "fuse-batch-norm"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    provides: ClassVar[tuple[str, ...]] = ("fused",)
    numeric: ClassVar = "rounding"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if kind_name(node) != "batch_norm" or not isinstance(node.args[0], fx.Node):
                continue
            layer = node.args[0]
            if kind_name(layer) not in FOLDABLE:
                continue
            why = declined(node, layer)
            if why:
                editor.note(node, self.name, f"BatchNorm is not folded into {layer.name}: {why}")
            else:
                self._fuse(editor, node, layer)
        if editor.modified:
            editor.drop_unused()

    @staticmethod
    @torch.no_grad()
    def _fuse(editor: Editor, norm: fx.Node, layer: fx.Node) -> None:
        old = norm.args[1:5]
        mean, var, gamma, beta = (constant(a) for a in old)
        weight, bias = constant(layer.args[1]), constant(layer.args[2])
        folded = fold(
            weight,  # type: ignore[arg-type]
            bias,
            mean,  # type: ignore[arg-type]
            var,  # type: ignore[arg-type]
            gamma,
            beta,
            norm.kwargs["eps"],  # type: ignore[arg-type]
            groups=layer.kwargs.get("groups", 1),  # type: ignore[arg-type]
            transposed=kind_name(layer).startswith("conv_transpose"),
        )
        weight_node, bias_node = layer.args[1], layer.args[2]
        new_weight, new_bias = store_folded(editor, layer, weight_node, bias_node, *folded)  # type: ignore[arg-type]
        editor.retarget(norm, layer.target, (layer.args[0], new_weight, new_bias), layer.kwargs)  # type: ignore[arg-type]
        norm.meta[ORIGIN] = origin(layer)
        statistics_nodes = [a for a in old if isinstance(a, fx.Node)]
        editor.erase(layer)
        editor.erase_dead([*statistics_nodes, *(n for n in (weight_node, bias_node) if isinstance(n, fx.Node))])


def store_folded(
    editor: Editor,
    layer: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    new_weight: torch.Tensor,
    new_bias: torch.Tensor,
) -> tuple[fx.Node, fx.Node]:
    """Nodes for a layer's folded weight and bias, stored where the old ones are, or beside those that others
    read.

    Args:
        editor: Changes the graph.
        layer: New nodes go before it.
        weight: The old weight.
        bias: The old bias; None if the layer has none.
        new_weight: The folded weight.
        new_bias: The folded bias.
    """
    made = _store(editor, layer, weight, str(weight.target), new_weight)
    path = f"{made.target}_bias"
    if bias is not None:
        path = str(bias.target)
    elif "." in str(made.target):
        path = f"{str(made.target).rpartition('.')[0]}.bias"
    return made, _store(editor, layer, bias, path, new_bias)


def _store(editor: Editor, layer: fx.Node, node: fx.Node | None, path: str, value: torch.Tensor) -> fx.Node:
    """A get_attr for a folded tensor: `node` itself with a new value, or a new one if others read the old
    value.
    """
    parameter = nn.Parameter(value, requires_grad=False)
    if node is not None and len(node.users) == 1 and not _read_elsewhere(editor, node):
        editor.set_tensor(path, parameter)
        return node
    path = editor.free_path(path)
    editor.set_tensor(path, parameter)
    with editor.before(layer):
        return editor.get_attr(path, like=layer)


def _read_elsewhere(editor: Editor, weight: fx.Node) -> bool:
    return len(editor.stored(str(weight.target))) > 1


def declined(norm: fx.Node, layer: fx.Node) -> str | None:
    """Why the fold is not possible; None if it is."""
    if len(layer.users) > 1:
        others = [u.name for u in layer.users if u is not norm]
        return f"{layer.name} is read by {', '.join(others)} too"
    if norm.args[1] is None or norm.args[2] is None:
        return "it has no running statistics"
    if norm.kwargs["training"]:
        return "it is in training mode"
    if any(a is not None and constant(a) is None for a in norm.args[1:5]):
        return "its statistics are computed, not stored"
    if constant(layer.args[1]) is None or (layer.args[2] is not None and constant(layer.args[2]) is None):
        return f"the weight of {layer.name} is computed, not stored"
    info = tensor_info(layer)
    if kind_name(layer) == "linear" and info is not None and len(info.shape) != 2:
        return "a Linear layer of more than two dimensions has its features last, BatchNorm its channels second"
    return None
