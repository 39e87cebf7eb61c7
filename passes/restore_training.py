"""Restore training: the placed graph gets fake quantizers, trainable BatchNorm and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from ..batch_norm import FoldedBias, FoldedWeight, TrainedBatchNorm
from ..editor import Editor
from ..fake_quantizers import FakeQuantizer, FoldedInto
from ..graph import EDGES, attribute, constant, device_of, edge_annotations, state, tensor_info
from ..ops import kind_name
from ..passbase import Numeric, Pass
from ..quantizer import quantizers, tie_groups
from ..scale_policy import POLICIES, ScalePolicy
from ..verify import quantizer_of
from ..weight_batch import WeightBatch
from .set_aside_training import SET_ASIDE, norm_path, set_aside

__all__ = ["RestoreTraining"]

_RELUS = frozenset(("relu", "relu6"))


@dataclass(frozen=True)
class RestoreTraining(Pass):
    """Put back what the pass ``set-aside-training`` took out, around fake quantizers in the quantizers' places.

    Rewrite:
        - each quantizer becomes a :class:`~fxq.fake_quantizers.FakeQuantizer` under its own name and keys, and those
          that are tied share one scale;
        - dropout goes between a quantizer and the operation that read through it, so that the deployed graph is the
          one without it;
        - a layer that had a BatchNorm behind it becomes ``norm(conv(x, W, b))``, the last under the old name: the
          weight's quantizer folds the BatchNorm in, and so does the bias, once batch statistics no longer count
          (:mod:`fxq.batch_norm`);
        - any other BatchNorm that is a torch.nn module becomes one that follows the graph's mode.

    Declines: BatchNorm that is called as a function, which stays in eval mode.

    Attributes:
        policy: What moves the scales.
    """

    name: ClassVar[str] = "restore-training"
    requires: ClassVar[tuple[str, ...]] = ("observed",)
    numeric: ClassVar[Numeric] = "changes-values"

    policy: ScalePolicy = field(default=POLICIES["fixed"])

    def call(self, editor: Editor) -> None:
        _fake_quantizers(editor, self.policy)
        _restore_dropout(editor)
        for node in list(editor.graph.nodes):
            path = set_aside(node).norm
            if path is not None:
                _restore_norm(editor, node, path)
            elif kind_name(node) == "batch_norm" and not node.kwargs["training"]:
                _train_norm(editor, node)
        for node in editor.graph.nodes:
            node.meta.pop(SET_ASIDE, None)
        for node in editor.graph.nodes:
            quantizer, weight = quantizer_of(node), constant(node.args[0]) if node.args else None
            if isinstance(quantizer, FakeQuantizer) and weight is not None:
                quantizer.begin_weight(weight)
        if editor.modified:
            editor.drop_unused()


def _fake_quantizers(editor: Editor, policy: ScalePolicy) -> None:
    nodes = {str(n.target): n for n in editor.graph.nodes if quantizer_of(n) is not None}
    relus = {tie for node in nodes.values() for tie in _relu_groups(editor, node)}
    batch = WeightBatch()
    device = device_of(editor.gm)
    for path, node in nodes.items():
        source = quantizer_of(node)
        info = tensor_info(node.args[0])
        assert source is not None
        chosen = policy.weights if source.weight else policy.activations
        if chosen == "pact" and (source.tie or source.tensor) not in relus:
            chosen = "moving-average"
        shape = info.shape if info is not None else ()
        made = FakeQuantizer(source, chosen, shape, momentum=policy.momentum)
        if made.weight:
            made.join(batch)
        editor.set_module(path, made.to(device))
    for group in tie_groups(quantizers(editor.gm).values()):
        members = [q for q in group if isinstance(q, FakeQuantizer)]
        if len(members) > 1:
            members[0].share(members)


def _relu_groups(editor: Editor, node: fx.Node) -> Iterator[str]:
    """The tie, or the tensor's own name, of a quantizer behind a ReLU and whatever only moves its result."""
    source, tensor = quantizer_of(node), node.args[0]
    moving = state(editor.gm).target.ties
    while isinstance(tensor, fx.Node) and kind_name(tensor) in moving:
        tensor = tensor.args[0]
    if source is not None and isinstance(tensor, fx.Node) and kind_name(tensor) in _RELUS:
        yield source.tie or source.tensor


def _restore_dropout(editor: Editor) -> None:
    made: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in list(editor.graph.nodes):
        wanted = set_aside(node).dropouts
        if not wanted:
            continue
        position = -1

        def through(source: fx.Node) -> fx.Node:
            nonlocal position
            position += 1
            for path in (p for at, p in wanted if at == position):  # noqa: B023
                if (source, path) not in made:
                    with editor.after(source):
                        name = path.removesuffix("_module")
                        made[source, path] = editor.call_module(path, (source,), like=source, name=name)
                source = made[source, path]
            return source

        editor.map_args(node, through)


def _norm_module(editor: Editor, path: str, *, folded: bool) -> TrainedBatchNorm:
    found = attribute(editor.gm, path)
    if not isinstance(found, TrainedBatchNorm):
        found = TrainedBatchNorm(found, folded=folded)
        editor.set_module(path, found)
    return found


def _restore_norm(editor: Editor, node: fx.Node, path: str) -> None:
    norm = _norm_module(editor, path, folded=True)
    groups, transposed = int(node.kwargs.get("groups", 1)), kind_name(node).startswith("conv_transpose")  # type: ignore[arg-type]
    source, weight, bias = node.args[:3]
    quantizer = quantizer_of(weight)  # type: ignore[arg-type]
    with editor.before(node):
        if isinstance(quantizer, FakeQuantizer):
            quantizer.folded = FoldedInto(norm, groups, transposed)
        else:
            part = editor.free_path(f"{path}.folded_weight")
            editor.set_module(part, FoldedWeight(norm, groups=groups, transposed=transposed))
            weight = editor.call_module(part, (weight,), like=weight, name=f"{node.name}_weight")  # type: ignore[arg-type]
        part = f"{path}.folded_bias"
        if not hasattr(norm, "folded_bias"):
            editor.set_module(part, FoldedBias(norm))
        bias = editor.call_module(part, (bias,), like=node, name=f"{node.name}_bias")
        bias.meta.pop("tensor", None)
        layer = editor.call(
            node.target,  # type: ignore[arg-type]
            (source, weight, bias),
            node.kwargs,
            like=node,
            name=f"{node.name}_{kind_name(node)}",
        )
    edges = edge_annotations(node)
    layer.meta[EDGES] = {edge: a for edge, a in edges.items() if edge != "output"}
    node.meta[EDGES] = {edge: a for edge, a in edges.items() if edge == "output"}
    editor.retarget_module(node, path, (layer,))


def _train_norm(editor: Editor, node: fx.Node) -> None:
    path = norm_path(node)
    if path is None:
        editor.note(node, RestoreTraining.name, "BatchNorm that is called as a function stays as in eval mode")
        return
    _norm_module(editor, path, folded=False)
    statistics = [a for a in node.args[1:5] if isinstance(a, fx.Node)]
    editor.retarget_module(node, path, (node.args[0],))
    editor.erase_dead(statistics)
