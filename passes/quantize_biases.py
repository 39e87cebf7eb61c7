"""Quantize biases: store them as the integers that a backend's kernels add up with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, fx

from ..editor import Editor
from ..graph import TensorInfo, constant, state, tensor_info
from ..ops import kind_name
from ..passbase import Numeric, Pass
from ..qdq import DEQUANTIZE, quantize
from ..target_parts import Biases

__all__ = ["QuantizeBiases"]

_BIAS: Final = 2
_LARGEST: Final = 2.0**30
"""The kernel adds as much again in products without leaving 32 bits: 33,000 of uint8 by int8."""


@dataclass(frozen=True)
class QuantizeBiases(Pass):
    """Store biases as int32, where the target's kernels add them to the sum of integer products.

    Problem: such a kernel takes its bias in steps of one product, ``input scale * weight scale``. A float bias keeps
    the whole operation from running in integers.

    Rewrite: the bias of each operation that the target's ``bias`` names, and whose input and weight are quantized,
    becomes ``dequantize`` of an int32 buffer at its old path (or beside the weight, if others read it too). A channel
    whose bias does not fit, because its weights are all but zero beside it, first has its weight's scale raised, which
    moves the channel by less than 2**-22 of its bias.

    Declines, and says so: a bias that is computed in the graph; weights with several scales along another axis than
    that of the output channels; an input of another rank than the target asks for; a bias that does not fit and whose
    weights cannot be changed, because they have one scale or another reader. An operation that is not quantized, or has
    no bias, is none of its business.
    """

    name: ClassVar[str] = "quantize-biases"
    requires: ClassVar[tuple[str, ...]] = ("quantized",)
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        wanted = state(editor.gm).target.bias
        if wanted is None:
            return
        for node in list(editor.graph.nodes):
            if kind_name(node) in wanted.kinds and node.args[_BIAS] is not None:
                self._quantize(editor, node, wanted)

    def _quantize(self, editor: Editor, node: fx.Node, wanted: Biases) -> None:
        source, weight, bias = node.args[:3]
        if not (_dequantized(source) and _dequantized(weight)) or _dequantized(bias):
            return
        why = _reason_to_decline(node, wanted) or _store(editor, node)
        if why:
            editor.note(node, wanted.rule, f"its bias stays float: {why}")


def _dequantized(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is DEQUANTIZE


def _reason_to_decline(node: fx.Node, wanted: Biases) -> str:
    source, weight, bias = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    rank, info = wanted.ranks.get(str(kind_name(node))), tensor_info(source)
    if constant(bias) is None:
        return "it is computed in the graph"
    if rank is not None and (info is None or len(info.shape) != rank):
        return f"the kernel adds it for inputs of rank {rank} alone"
    if weight.args[3] not in (None, 0):
        return f"the weight's scales run along axis {weight.args[3]}, not along the output channels"
    if source.args[3] is not None:
        return "the input has several scales"
    return ""


@torch.no_grad()
def _store(editor: Editor, node: fx.Node) -> str:
    """Put the integers in place; why that cannot be done, if it cannot."""
    source, weight, bias = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    assert isinstance(bias, fx.Node)
    values, step, scale = (constant(n) for n in (bias, source.args[1], weight.args[1]))
    if values is None or step is None or scale is None:
        return "a scale is computed in the graph"
    per_channel = weight.args[3] is not None
    least = values.abs().double() / (step.double().reshape(()) * _LARGEST)
    if bool((least > scale.double()).any()):
        if not per_channel or not _alone(editor, weight):
            return "it is too large for int32 in steps of input scale * weight scale"
        scale = _raise_scale(editor, weight, least)
    product = step.reshape(()) * (scale if per_channel else scale.reshape(()))
    zero_point = torch.zeros_like(product, dtype=torch.int32)
    axis = 0 if per_channel else None
    integers = quantize(values.float(), product, zero_point, axis, "int32")
    path = str(bias.target)
    if len(editor.stored(path)) > 1 or len(bias.users) > 1:
        path = editor.free_path(f"{path}_int32")
    parameters = editor.free_path(f"{path}_quantization")
    for name, tensor in ((path, integers), (f"{parameters}.scale", product), (f"{parameters}.zero_point", zero_point)):
        editor.set_tensor(name, tensor)
    with editor.before(node):
        stored = editor.get_attr(path, like=bias)
        rest = [editor.get_attr(f"{parameters}.{name}", like=bias) for name in ("scale", "zero_point")]
        info = TensorInfo(tuple(values.shape), product.dtype)
        real = editor.call(DEQUANTIZE, (stored, *rest, axis), like=bias, info=info, name=f"{bias.name}_dequantize")
    editor.set_arg(node, _BIAS, real)
    editor.erase_dead([bias])
    return ""


def _alone(editor: Editor, weight: fx.Node) -> bool:
    """Whether a weight's integers and its scale are read by this one ``dequantize``, and that by one operation."""
    parts = weight.args[:2]
    return len(weight.users) == 1 and all(
        isinstance(part, fx.Node) and len(part.users) == 1 and len(editor.stored(str(part.target))) == 1
        for part in parts
    )


def _raise_scale(editor: Editor, weight: fx.Node, least: Tensor) -> Tensor:
    """Raise a weight's scales where they are below `least`, [channels], and bring its integers in step."""
    stored, scale_node, zero_node, axis = weight.args
    integers, scale, zero_point = (constant(n) for n in (stored, scale_node, zero_node))
    assert integers is not None
    assert scale is not None
    assert zero_point is not None
    assert isinstance(stored, fx.Node)
    assert isinstance(scale_node, fx.Node)
    assert axis == 0
    raised = torch.maximum(scale, (least * (1 + 2.0**-20)).to(scale.dtype))
    shape = (-1, *[1] * (integers.ndim - 1))
    shift = zero_point.reshape(shape)
    moved = (integers - shift).double() * (scale.double() / raised.double()).reshape(shape)
    editor.set_tensor(str(stored.target), (moved.round() + shift).to(integers.dtype))
    editor.set_tensor(str(scale_node.target), raised)
    return raised
