"""Write clamped sums: a HardSigmoid among integers becomes an addition, whose quantizer clamps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import Annotation, TensorInfo, constant, edge_annotations, state, tensor_info
from ..ops import KINDS, kind_name
from ..passbase import Numeric, Pass
from ..qdq import DEQUANTIZE, QUANTIZE
from ..specs import DTYPES

__all__ = ["WriteClampedSums"]


class _Sum(NamedTuple):
    """``clamp(x * factor + offset, low, high)``."""

    factor: float
    offset: float
    low: float
    high: float


_SUMS: Final[Mapping[str, _Sum]] = {"hardsigmoid": _Sum(1 / 6, 0.5, 0.0, 1.0)}


@dataclass(frozen=True)
class WriteClampedSums(Pass):
    """Write what the target ``adds`` as a sum of two quantized tensors, where integers come in and go out.

    Problem: a backend without an integer kernel for HardSigmoid, and with one for additions, leaves integers for it
    (ORT8), although ``hardsigmoid(x) = clamp(x / 6 + 1/2, 0, 1)`` is an addition.

    Rewrite: the integers of the input are read once more with a sixth of their scale, which divides them for nothing,
    and a constant of one integer is added. The clamp, which keeps the activation's name, is what the quantizer behind
    it does by saturating.

    Declines: an input or a reader that is float; an input with several scales or in another float type than float32,
    whose scale has no room for a sixth of its own.

    Raises:
        TargetError: The target adds a kind that is no such sum.
    """

    name: ClassVar[str] = "write-clamped-sums"
    requires: ClassVar[tuple[str, ...]] = ("quantized",)
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        target = state(editor.gm).target
        target.require_known("adds", _SUMS, "sum")
        for node in list(editor.graph.nodes):
            if kind_name(node) in target.adds and _among_integers(node):
                _write(editor, node, _SUMS[kind_name(node)])


def _among_integers(node: fx.Node) -> bool:
    source, info = node.args[0], tensor_info(node)
    if not isinstance(source, fx.Node) or source.target is not DEQUANTIZE or info is None:
        return False
    integers = source.args[0]
    whole = isinstance(integers, fx.Node) and integers.target is QUANTIZE and source.args[3] is None
    return whole and info.dtype == torch.float32 and all(user.target is QUANTIZE for user in node.users)


@torch.no_grad()
def _write(editor: Editor, node: fx.Node, made: _Sum) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    integers, scale_node, zero_point, _ = source.args
    assert isinstance(integers, fx.Node)
    scale, dtype = constant(scale_node), DTYPES[str(integers.args[4])]
    assert scale is not None
    holder = editor.free_path(f"quantizers.{node.name}_sum")
    parts: dict[str, Tensor] = {
        "scale": scale * made.factor,
        "offset": torch.tensor(dtype.qmax, dtype=dtype.storage, device=scale.device),
        "offset_scale": torch.tensor(made.offset / dtype.qmax, dtype=scale.dtype, device=scale.device),
        "offset_zero_point": torch.zeros((), dtype=torch.int32, device=scale.device),
    }
    for name, tensor in parts.items():
        editor.set_tensor(f"{holder}.{name}", tensor)
    one = TensorInfo((), scale.dtype)
    with editor.before(node):
        held = {name: editor.get_attr(f"{holder}.{name}", like=node) for name in parts}
        scaled = editor.call(
            DEQUANTIZE, (integers, held["scale"], zero_point, None), like=source, name=f"{node.name}_scaled"
        )
        rest = (held["offset_scale"], held["offset_zero_point"], None)
        offset = editor.call(DEQUANTIZE, (held["offset"], *rest), like=node, info=one, name=f"{node.name}_offset")
        total = editor.call(KINDS["add"].target, (scaled, offset), like=node, name=f"{node.name}_sum")
    annotation = edge_annotations(node).get(0)
    if annotation is not None:
        editor.annotate(total, 0, annotation)
        text = f"it is the addition {total.name}, and its quantizer does the clamping"
        editor.annotate(node, 0, Annotation(None, annotation.rule, text))
    editor.retarget(node, KINDS["clamp"].target, (total,), {"min": made.low, "max": made.high})
    editor.erase_dead([source])
