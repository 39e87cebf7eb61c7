"""Fake quantization and its gradients in PyTorch's own operations, on a CPU over pieces that stay in a core's cache.

Memory traffic is what a training step has least of: a piece is divided, rounded, clipped and multiplied while it is at
hand. What cannot go by pieces (other types, tensors with gaps, other devices) goes by whole tensors.
"""

from __future__ import annotations

import enum
from typing import Final

import torch
from torch import Tensor

from .recipe import QDType

__all__ = [
    "ScaleGradient",
    "backward",
    "forward",
    "inside_bounds",
    "weight_backward",
    "weight_forward",
]

_PIECE: Final = 1 << 17
"""Elements of a piece: 512 KiB of float32, so that input and output fit a core's second-level cache."""
_BELOW: Final = 1 + 2.0**-23
"""Half to even rounds qmin - 0.5 (qmin is even or 0) into the range, and qmax + 0.5 (qmax is odd) out of it: the lower
bound lies one float32 lower."""


class ScaleGradient(enum.Enum):
    """What the scale of a fake quantizer learns from.

    Attributes:
        NONE: Nothing: it is set from outside.
        LSQ: The quantization error inside the range and the range's end outside it (Esser et al., 2020, equation 3).
        PACT: The range's end outside it alone (Choi et al., 2018, equation 4, in terms of the scale).
    """

    NONE = "none"
    LSQ = "lsq"
    PACT = "pact"


def forward(x: Tensor, scale: Tensor, dtype: QDType) -> Tensor:
    """Quantize and dequantize over one scale, []; a fresh tensor of x's dtype and strides."""
    if x.is_cpu:
        return _pieces_forward(x, scale, dtype)
    return _quantized(x, scale, dtype).mul_(scale).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, dtype: QDType, gradient: ScaleGradient
) -> tuple[Tensor, Tensor | None]:
    """The gradients of :func:`forward` for x and, unless `gradient` is NONE, for the scale."""
    if x.is_cpu:
        return _pieces_backward(grad, x, scale, dtype, gradient)
    return _plain_backward(grad, x, scale, dtype, gradient)


def _quantized(x: Tensor, scale: Tensor, dtype: QDType) -> Tensor:
    """The integers in a fresh float tensor."""
    steps = x.float() / scale
    return steps.round_().clamp_(dtype.qmin, dtype.qmax)


def _dense(x: Tensor) -> Tensor | None:
    """x's elements in memory order, as a view; None where they have gaps."""
    if x.is_contiguous():
        return x.view(-1)
    strides = x.stride()
    arranged = x.permute(sorted(range(x.dim()), key=lambda d: -strides[d]))
    return arranged.view(-1) if arranged.is_contiguous() else None


def _flat(x: Tensor) -> Tensor:
    """As :func:`_dense`, of a tensor that is known to be dense."""
    found = _dense(x)
    return x.reshape(-1) if found is None else found


def _pieces_forward(x: Tensor, scale: Tensor, dtype: QDType) -> Tensor:
    """Forward on a CPU, piece by piece; a fresh tensor of x's strides."""
    source = _dense(x)
    if source is None or x.dtype is not torch.float32:
        return _quantized(x, scale, dtype).mul_(scale).to(x.dtype)
    y = torch.empty_like(x)
    for piece, into in zip(torch.split(source, _PIECE), torch.split(_flat(y), _PIECE), strict=True):
        torch.div(piece, scale, out=into)
        into.round_().clamp_(dtype.qmin, dtype.qmax).mul_(scale)
    return y


def _bounds(scale: Tensor, dtype: QDType) -> tuple[float, float]:
    """The values strictly between which nothing is clipped: half a step beyond the range's ends."""
    step = float(scale.detach())
    low, high = inside_bounds(dtype)
    return low * step, high * step


def _pieces_backward(
    grad: Tensor, x: Tensor, scale: Tensor, dtype: QDType, gradient: ScaleGradient
) -> tuple[Tensor, Tensor | None]:
    low, high = _bounds(scale, dtype)
    if gradient is ScaleGradient.NONE:
        return torch.ops.aten.hardtanh_backward(grad, x, low, high), None
    flat = _dense(x)
    if flat is None or grad.stride() != x.stride() or x.dtype is not torch.float32 or grad.dtype is not x.dtype:
        return _plain_backward(grad, x, scale, dtype, gradient)
    to_x = torch.empty_like(x)
    pieces = zip(*(torch.split(_flat(t), _PIECE) for t in (grad, x, to_x)), strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for g, piece, into in pieces:
        torch.ops.aten.hardtanh_backward.grad_input(g, piece, low, high, grad_input=into)
        held = torch.div(piece, scale).round_().clamp_(dtype.qmin, dtype.qmax)
        total += torch.dot(g - into, held)
        if gradient is ScaleGradient.LSQ:
            total += torch.dot(into, held.sub_(piece / scale))
    return to_x, total.to(scale.dtype)


def _plain_backward(
    grad: Tensor, x: Tensor, scale: Tensor, dtype: QDType, gradient: ScaleGradient
) -> tuple[Tensor, Tensor | None]:
    """Backward in plain operations, over any scale that broadcasts; the scale's part has the scale's shape."""
    steps = x.float() / scale
    rounded = steps.round()
    inside = (rounded >= dtype.qmin) & (rounded <= dtype.qmax)
    to_x = grad * inside
    if gradient is ScaleGradient.NONE:
        return to_x, None
    wide = grad.float()
    ends = rounded.clamp(dtype.qmin, dtype.qmax)
    within = ends - steps if gradient is ScaleGradient.LSQ else 0.0
    return to_x, (wide * torch.where(inside, within, ends)).sum_to_size(scale.shape)


def inside_bounds(dtype: QDType) -> tuple[float, float]:
    """The unrounded steps strictly between which nothing is clipped."""
    return (dtype.qmin - 0.5) * _BELOW, dtype.qmax + 0.5


def weight_backward(
    grad: Tensor, steps: Tensor, undone: Tensor | None, dtype: QDType, gradient: ScaleGradient
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`weight_forward` for the weight and, for each element, for the scale."""
    low, high = inside_bounds(dtype)
    to_weight = torch.ops.aten.hardtanh_backward(grad, steps, low, high)
    ends = steps.round().clamp_(dtype.qmin, dtype.qmax)
    within = ends - steps if gradient is ScaleGradient.LSQ else torch.zeros_like(ends)
    to_scale = grad * torch.where((steps > low) & (steps < high), within, ends)
    return to_weight, to_scale if undone is None else to_scale * undone


def weight_forward(weight: Tensor, scale: Tensor, factor: Tensor | None, dtype: QDType) -> tuple[Tensor, Tensor]:
    """The weight that training computes with, in its dtype, and its unrounded steps, float32."""
    if factor is None:
        return _weight_pieces(weight, scale, None, scale, dtype)
    dead = factor == 0
    y, steps = _weight_pieces(weight, scale, factor, scale / factor.masked_fill(dead, 1.0), dtype)
    if not weight.is_cpu or bool(dead.any()):  # a GPU would have to be waited for
        y = torch.where(dead, weight, y)
    return y, steps


def _weight_pieces(
    weight: Tensor, scale: Tensor, factor: Tensor | None, real: Tensor, dtype: QDType
) -> tuple[Tensor, Tensor]:
    """The quantized weight times `real`, and the unrounded steps; row by row on a CPU."""
    spreads = [t for t in (scale, factor) if t is not None and t.dim() > 0]
    rows_alone = all(t.numel() == t.shape[0] for t in spreads)
    if not (weight.is_cpu and weight.dtype is torch.float32 and weight.is_contiguous() and rows_alone):
        steps = (weight if factor is None else weight * factor).float() / scale
        return (steps.round().clamp_(dtype.qmin, dtype.qmax).mul_(real)).to(weight.dtype), steps
    steps, y = torch.empty_like(weight), torch.empty_like(weight)
    rows = max(1, _PIECE // max(1, weight.numel() // max(1, weight.shape[0])))
    for first in range(0, weight.shape[0], rows):
        block = slice(first, first + rows)
        own, its = (t if t.dim() == 0 else t[block] for t in (scale, real))
        piece = weight[block] if factor is None else torch.mul(weight[block], factor[block], out=steps[block])
        torch.div(piece, own, out=steps[block])
        torch.round(steps[block], out=y[block]).clamp_(dtype.qmin, dtype.qmax).mul_(its)
    return y, steps
