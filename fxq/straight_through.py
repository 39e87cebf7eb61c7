"""Fake quantization that trains: symmetric quantize and dequantize with straight-through gradients.

Forward is what :func:`fxq.qdq.fake_quantize` computes; on a GPU and under torch.compile, an activation that lies within
a rounding error of the middle between two integers may go to the other one. Backward regards rounding as the identity
(Bengio et al., 2013) and is 0 for what was clipped (Jacob et al., 2018). The scale's gradient is one of
:class:`ScaleGradient`.

A training step has time for few passes over memory, so each kind of device goes its own way: on a CPU the arithmetic
runs over pieces that stay in a core's cache, on a GPU it is one Triton kernel each way where Triton is installed, and
under torch.compile it is plain arithmetic for the compiler to fuse. None of them waits for the device or keeps more
than tensors that autograd holds anyway.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
from typing import Any, Final

import torch
from torch import Tensor

from .folding import Fold
from .recipe import QDType

__all__ = [
    "SMALLEST_SCALE",
    "ScaleGradient",
    "averages",
    "fake_quantize",
    "fake_quantize_weight",
    "keep",
    "refreshes",
]

SMALLEST_SCALE: Final = 2.0**-100
"""What a learned scale counts as where an optimizer drove it below; its gradient is as if it were not."""
_PIECE: Final = 1 << 17
"""Elements of a piece: 512 KiB of float32, so that input and output fit a core's second-level cache."""


_BELOW: Final = 1 + 2.0**-23
"""Half to even rounds qmin - 0.5 (qmin is even or 0) into the range, and qmax + 0.5 (qmax is odd) out of it: the lower
bound lies one float32 lower."""


torch.library.define("fxq::keep", "(Tensor x) -> Tensor")
torch.library.impl("fxq::keep", "CompositeExplicitAutograd", torch.clone)


def keep(x: Tensor) -> Tensor:
    """A copy of x, which needs no gradient, as backward is to see it.

    Under torch.compile, backward may compute again what forward computed, and then finds running statistics and scales
    that the same forward has changed in place. It never computes a custom operator again.
    """
    if not torch.compiler.is_compiling():
        return x.clone()
    result: Tensor = torch.ops.fxq.keep(x)
    return result


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


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    dtype: QDType,
    *,
    gradient: ScaleGradient = ScaleGradient.NONE,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Quantize and dequantize a tensor over one scale.

    Args:
        x: Float, any shape.
        scale: Positive float32, [], on x's device.
        zero_point: int32, [], 0.
        dtype: An integer type; the zero point is 0.
        gradient: What the scale's gradient is.
        gradient_scale: What the scale's gradient is multiplied by.

    Returns:
        ``clamp(round(x / scale), qmin, qmax) * scale`` in x's shape and dtype.
    """
    if torch.compiler.is_compiling():
        return _traced(x, scale, dtype, gradient, gradient_scale)
    if gradient is ScaleGradient.NONE:
        scale = scale.detach()
        if x.is_cuda:  # PyTorch's own kernel and gradient; it multiplies by the reciprocal of the scale
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, int(dtype.qmin), int(dtype.qmax))
    result: Tensor = _PerTensor.apply(  # type: ignore[no-untyped-call]
        x, scale, dtype, gradient, gradient_scale
    )
    return result


def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    dtype: QDType,
    axis: int | None,
    *,
    fold: Fold | None = None,
    refresh: bool = False,
    gradient: ScaleGradient = ScaleGradient.NONE,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Quantize and dequantize a weight, over its values or over those that a BatchNorm behind it gives it.

    With a fold, the weight is quantized as the folded weight ``weight * factor`` and divided by the factor again, so
    that the BatchNorm can follow (Jacob et al., 2018, section 3.2; the division is torch.ao's, done on the weight
    instead of the layer's output). Where the factor is 0, which no division undoes, the weight passes as it is. The
    factor gets no gradient: under the straight-through estimate it cancels.

    Args:
        weight: Float, any shape.
        scale: Positive float32, [] if axis is None, else [weight.shape[axis]].
        dtype: An integer type; the zero point is 0.
        axis: The per-channel axis, or None.
        fold: The BatchNorm, or None for none.
        refresh: Whether the scale is set to the range of the weight first; only where :func:`refreshes` says so.
        gradient: What the scale's gradient is.
        gradient_scale: What the scale's gradient is multiplied by.
    """
    if gradient is ScaleGradient.NONE and scale.requires_grad:
        scale = scale.detach()
    if torch.compiler.is_compiling():
        spread = _spread(scale, weight, axis)
        if fold is None:
            return _traced(weight, spread, dtype, gradient, gradient_scale)
        factor = keep(fold.factor(weight))
        held = _traced(weight * factor, spread, dtype, gradient, gradient_scale)
        return torch.where(factor == 0, weight, held / torch.where(factor == 0, 1.0, factor))
    if gradient is ScaleGradient.NONE and weight.is_cuda and _by_rows(weight, axis, fold):
        kernels = _kernels()
        if kernels is not None:
            made: Tensor = kernels.masked_weight(weight, scale, fold, dtype, refresh=refresh)
            return made
    result: Tensor = _Weight.apply(  # type: ignore[no-untyped-call]
        weight, scale, axis, fold, dtype, gradient, gradient_scale
    )
    return result


def refreshes(weight: Tensor, axis: int | None, fold: Fold | None) -> bool:
    """Whether :func:`fake_quantize_weight` can let a symmetric scale follow the weight in the same kernel."""
    if not weight.is_cuda or torch.compiler.is_compiling() or axis != 0 or not _by_rows(weight, axis, fold):
        return False
    kernels = _kernels()
    return kernels is not None and weight.numel() <= weight.shape[0] * kernels.WIDEST


def averages(x: Tensor) -> Any:
    """The kernel that pulls running ranges on x's device; None where there is none."""
    if not x.is_cuda or torch.compiler.is_compiling() or (kernels := _kernels()) is None:
        return None
    return kernels.average


def _spread(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """The scale in a shape that broadcasts over x."""
    if axis is None:
        return scale
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.view(shape)


def _traced(x: Tensor, scale: Tensor, dtype: QDType, gradient: ScaleGradient, gradient_scale: float) -> Tensor:
    """Fake quantization in operations whose own gradients are the wanted ones, over any scale that broadcasts."""
    held = scale.detach()
    if gradient is not ScaleGradient.NONE:
        held = scale * gradient_scale + (scale.clamp(min=SMALLEST_SCALE) - scale * gradient_scale).detach()
    inner = held.detach() if gradient is ScaleGradient.PACT else held
    # Kept within one step of the range, infinities do not meet in a difference.
    steps = (x.float() / inner).clamp(dtype.qmin - 1, dtype.qmax + 1)
    steps = steps + (steps.round() - steps).detach()
    real = steps.clamp(dtype.qmin, dtype.qmax) * inner
    if gradient is ScaleGradient.PACT:
        real = torch.where(
            steps > dtype.qmax, dtype.qmax * held, torch.where(steps < dtype.qmin, dtype.qmin * held, real)
        )
    return real.to(x.dtype)


class _PerTensor(torch.autograd.Function):
    """One scale for the whole tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, dtype: QDType, gradient: ScaleGradient, gradient_scale: float
    ) -> Tensor:
        if gradient is not ScaleGradient.NONE:
            scale = scale.clamp(min=SMALLEST_SCALE)
        if x.is_cuda and (kernels := _kernels()) is not None:
            y: Tensor = kernels.forward(x, scale, dtype.qmin, dtype.qmax)
        elif x.is_cpu:
            y = _pieces_forward(x, scale, dtype)
        else:
            y = _quantized(x, scale, dtype).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, scale)
        ctx.how = dtype, gradient, gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        dtype, gradient, gradient_scale = ctx.how
        if not ctx.needs_input_grad[1]:
            gradient = ScaleGradient.NONE
        if x.is_cuda and (kernels := _kernels()) is not None:
            to_x, to_scale = kernels.backward(grad, x, scale, dtype.qmin, dtype.qmax, gradient.value)
        elif x.is_cpu:
            to_x, to_scale = _pieces_backward(grad, x, scale, dtype, gradient)
        else:
            to_x, to_scale = _plain_backward(grad, x, scale, dtype, gradient)
        return (
            to_x,
            None if to_scale is None else (to_scale * gradient_scale).reshape(scale.shape),
            None,
            None,
            None,
        )


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
    return (dtype.qmin - 0.5) * _BELOW * step, (dtype.qmax + 0.5) * step


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


class _Weight(torch.autograd.Function):
    """Any scale that broadcasts, and the fold of a BatchNorm; for tensors as small as weights."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        axis: int | None,
        fold: Fold | None,
        dtype: QDType,
        gradient: ScaleGradient,
        gradient_scale: float,
    ) -> Tensor:
        learns = gradient is not ScaleGradient.NONE
        if learns:
            scale = scale.clamp(min=SMALLEST_SCALE)
        ctx.how = dtype, gradient, gradient_scale, scale.shape, axis
        factor = None
        if weight.is_cuda and _by_rows(weight, axis, fold) and (kernels := _kernels()) is not None:
            made: tuple[Tensor, Tensor] = kernels.weight_forward(weight, scale, fold, dtype)
            y, steps = made
            if learns and fold is not None:
                factor = fold.factor(weight)
        else:
            factor = None if fold is None else fold.factor(weight)
            y, steps = _weight_forward(weight, _spread(scale, weight, axis), factor, dtype)
        undone = torch.where(factor == 0, 0.0, 1 / factor) if learns and factor is not None else None
        ctx.save_for_backward(steps, undone)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, undone = ctx.saved_tensors
        dtype, gradient, gradient_scale, shape, axis = ctx.how
        low, high = (dtype.qmin - 0.5) * _BELOW, dtype.qmax + 0.5
        to_weight = torch.ops.aten.hardtanh_backward(grad, steps, low, high)
        if gradient is ScaleGradient.NONE or not ctx.needs_input_grad[1]:
            return to_weight, None, None, None, None, None, None
        ends = steps.round().clamp_(dtype.qmin, dtype.qmax)
        inside = (steps > low) & (steps < high)
        within = ends - steps if gradient is ScaleGradient.LSQ else torch.zeros_like(ends)
        to_scale = grad * torch.where(inside, within, ends)
        if undone is not None:
            to_scale = to_scale * undone
        others = [d for d in range(steps.dim()) if axis is None or d != axis % steps.dim()]
        return to_weight, to_scale.sum(others).view(shape) * gradient_scale, None, None, None, None, None


def _by_rows(weight: Tensor, axis: int | None, fold: Fold | None) -> bool:
    """Whether what has scales, and what the BatchNorm's channels are, are rows that lie one after the other."""
    rows = axis in (None, 0) and not (fold is not None and fold.transposed)
    return rows and weight.dim() > 0 and weight.is_contiguous()


def _weight_forward(weight: Tensor, scale: Tensor, factor: Tensor | None, dtype: QDType) -> tuple[Tensor, Tensor]:
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


@functools.cache
def _kernels() -> Any:
    """The room with the Triton kernels; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels
