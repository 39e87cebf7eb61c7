"""Decompose attention: where the target runs its products in low precision, attention becomes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx

from ..editor import Editor
from ..graph import state, tensor_info
from ..ops import kind_name
from ..passbase import Numeric, Pass
from .advise import CHECKS
from .annotate import matches
from .expand_attention import Builder, attend

__all__ = ["DecomposeAttention"]

_RANK: Final = 4


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Write scaled_dot_product_attention as two matrix products and a softmax, where those are to be quantized.

    Problem: one call hides two products that TensorRT fuses in INT8, with quantizers before the first, between the
    softmax and the second, and behind the second (R40).

    Rewrite: matmul, scale, mask, softmax, matmul; the products are then placed like any others.

    PyTorch's ONNX exporter takes the call with four dimensions only: others are always written out, and the target's
    heuristics then leave the products float.

    Declines: where the target's data exclude attention of these shapes (R40), with a note; where the target quantizes
    no products; where a recipe rule keeps the call float. Also grouped queries, and dropout that inference would
    apply, with a note: those stay one call.
    """

    name: ClassVar[str] = "decompose-attention"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        wanted = "matmul" in state(editor.gm).target.weighted
        for node in list(editor.graph.nodes):
            if kind_name(node) == "scaled_dot_product_attention":
                info = tensor_info(node)
                exportable = info is not None and len(info.shape) == _RANK
                if wanted or not exportable:
                    self._decompose(editor, node, exportable=exportable)

    @staticmethod
    def _decompose(editor: Editor, node: fx.Node, *, exportable: bool) -> None:
        why = _kept(editor, node, exportable=exportable)
        if why is not None:
            editor.note(node, why[0], f"this attention stays one call in floating point: {why[1]}", kind="opaque")
            return
        if _float_by_recipe(editor, node):
            return
        query, key, value, mask = node.args
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        with editor.before(node):
            build = Builder(editor, node)
            added = _causal(build, query, key) if node.kwargs["is_causal"] else _additive(build, query, mask)
            scale: Any = node.kwargs["scale"]
            result, _ = attend(build, query, key, value, added, dropout=0.0, scale=scale)
        editor.replace(node, result)
        editor.erase(node)


def _kept(editor: Editor, node: fx.Node, *, exportable: bool) -> tuple[str, str] | None:
    """The rule and the reason by which a call stays whole."""
    for heuristic in state(editor.gm).target.heuristics:
        excludes = heuristic.action == "exclude" and exportable
        if "scaled_dot_product_attention" in heuristic.kinds and excludes:
            saw = CHECKS[heuristic.check](node, **heuristic.parameters)
            if saw is not None:
                return heuristic.rule, f"{heuristic.reason}: {saw}"
    for name in ("enable_gqa", "dropout_p"):
        if node.kwargs[name]:
            return "R20", f"it is called with {name}"
    return None


def _float_by_recipe(editor: Editor, node: fx.Node) -> bool:
    wishes = [rule.edges.input for rule in state(editor.gm).recipe.rules if matches(rule, node)]
    return bool(wishes) and wishes[-1] is None


def _causal(build: Builder, query: fx.Node, key: fx.Node) -> fx.Node:
    """The mask (L, S) that lets no position look ahead, from tensors alone, so that both lengths may change."""
    ends = []
    for tensor, fill, name in ((query, 1.0, "rows"), (key, float("-inf"), "columns")):
        info = tensor_info(tensor)
        assert info is not None
        index = (*[0] * (len(info.shape) - 2), slice(None), 0)
        along = build.call(operator.getitem, tensor, index, name=f"along_{name}")
        ends.append(build.call(torch.full_like, along, fill, name=name))
    return build.call(torch.triu, build.call(torch.outer, *ends, name="square"), 1, name="mask")


def _additive(build: Builder, query: fx.Node, mask: object) -> fx.Node | None:
    """The mask as what is added to the scores; False in a mask of booleans forbids."""
    if not isinstance(mask, fx.Node):
        return None
    info, like = tensor_info(mask), tensor_info(query)
    assert info is not None
    assert like is not None
    if info.dtype is not torch.bool:
        return mask
    forbidden = build.call(torch.logical_not, mask, name="forbidden")
    zeros = build.call(torch.zeros_like, mask, dtype=like.dtype, name="mask_zeros")
    return build.call(torch.masked_fill, zeros, forbidden, float("-inf"), name="mask")
