"""Finish training: a graph that trained becomes the graph that it simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..batch_norm import TrainedBatchNorm
from ..editor import Editor
from ..fake_quantizers import FakeQuantizer
from ..folding import fold
from ..graph import EDGES, attribute, constant, edge_annotations
from ..ops import KINDS, kind_name
from ..passbase import Numeric, Pass
from ..verify import quantizer_of
from .fuse_batch_norm import store_folded
from .keep_dropout import is_dropout

__all__ = ["FinishTraining"]


@dataclass(frozen=True)
class FinishTraining(Pass):
    """Fold the trained BatchNorms for good, settle the scales, and drop dropout; any other graph stays as it is.

    Rewrite: ``norm(conv(x, W, b))`` becomes ``conv(x, W', b')`` under the name of the BatchNorm, with the very weight
    that the weight's quantizer saw in training, and with the bias of eval mode. A BatchNorm that was not folded becomes
    the functional call in eval mode.
    """

    name: ClassVar[str] = "finish-training"
    requires: ClassVar[tuple[str, ...]] = ("observed",)
    numeric: ClassVar[Numeric] = "exact"

    def call(self, editor: Editor) -> None:
        for node in editor.graph.nodes:
            quantizer = quantizer_of(node)
            if isinstance(quantizer, FakeQuantizer):
                quantizer.settle(constant(node.args[0]))
        for node in list(editor.graph.nodes):
            if is_dropout(node):
                editor.replace(node, node.args[0])
                editor.erase(node)
            elif (norm := _norm_of(node)) is not None:
                if norm.folded:
                    _fold(editor, node, norm)
                else:
                    _evaluate(editor, node, norm)
        if editor.modified:
            editor.drop_unused()


def _norm_of(node: fx.Node) -> TrainedBatchNorm | None:
    owner = node.graph.owning_module
    found = attribute(owner, str(node.target)) if owner is not None and node.op == "call_module" else None
    return found if isinstance(found, TrainedBatchNorm) else None


@torch.no_grad()
def _fold(editor: Editor, node: fx.Node, norm: TrainedBatchNorm) -> None:
    layer = node.args[0]
    assert isinstance(layer, fx.Node)
    source, through, bias_call = layer.args[:3]
    assert isinstance(through, fx.Node)
    assert isinstance(bias_call, fx.Node)
    weight_node, bias_node = through.args[0], bias_call.args[0]
    assert isinstance(weight_node, fx.Node)
    weight = constant(weight_node)
    assert weight is not None
    new_weight, new_bias = fold(
        weight,
        constant(bias_node),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.eps,
        groups=layer.kwargs.get("groups", 1),  # type: ignore[arg-type]
        transposed=kind_name(layer).startswith("conv_transpose"),
    )
    quantizer = quantizer_of(through)
    new_weight_node, new_bias_node = store_folded(
        editor,
        through,
        weight_node,
        bias_node if isinstance(bias_node, fx.Node) else None,
        new_weight,
        new_bias,
    )
    if isinstance(quantizer, FakeQuantizer):
        quantizer.folded = None
        editor.set_arg(through, 0, new_weight_node)
        new_weight_node = through
    node.meta[EDGES] = {**edge_annotations(layer), **edge_annotations(node)}
    editor.retarget(node, layer.target, (source, new_weight_node, new_bias_node), layer.kwargs)  # type: ignore[arg-type]
    editor.erase(layer)
    editor.erase_dead([n for n in (bias_call, through, weight_node) if n is not new_weight_node])


def _evaluate(editor: Editor, node: fx.Node, norm: TrainedBatchNorm) -> None:
    path = str(node.target)
    names = ("running_mean", "running_var", "weight", "bias")
    with editor.before(node):
        held = [None if getattr(norm, n) is None else editor.get_attr(f"{path}.{n}", like=node) for n in names]
    options = {"training": False, "momentum": 0.0, "eps": norm.eps}
    editor.retarget(node, KINDS["batch_norm"].target, (node.args[0], *held), options)
