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

import functools
import importlib.util
from typing import Any, Final

import torch
from torch import Tensor

from . import compiled_quantization, plain_quantization
from .folding import Fold
from .plain_quantization import ScaleGradient
from .recipe import QDType
from .weight_batch import Made, WeightBatch, WeightRequest

__all__ = [
    "SMALLEST_SCALE",
    "ScaleGradient",
    "averages",
    "fake_quantize",
    "fake_quantize_weight",
    "refreshes",
]

SMALLEST_SCALE: Final = 2.0**-100
"""What a learned scale counts as where an optimizer drove it below; its gradient is as if it were not."""


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
        return _traced(x, scale, None, dtype, gradient, gradient_scale)
    if gradient is ScaleGradient.NONE:
        scale = scale.detach()
        if x.is_cuda:  # PyTorch's own kernel and gradient; it multiplies by the reciprocal of the scale
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, int(dtype.qmin), int(dtype.qmax))
    result: Tensor = _PerTensor.apply(  # type: ignore[no-untyped-call]
        x, scale, dtype, gradient, gradient_scale
    )
    return result


def fake_quantize_weight(  # noqa: PLR0913 - what a weight may be quantized with
    weight: Tensor,
    scale: Tensor,
    dtype: QDType,
    axis: int | None,
    *,
    fold: Fold | None = None,
    refresh: bool = False,
    gradient: ScaleGradient = ScaleGradient.NONE,
    gradient_scale: float = 1.0,
    batch: tuple[WeightBatch, int] | None = None,
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
        batch: The weights that it may be quantized together with, and what tells it apart among them.
    """
    if gradient is ScaleGradient.NONE and scale.requires_grad:
        scale = scale.detach()
    if torch.compiler.is_compiling():
        factor = None if fold is None else fold.factor(weight)
        return _traced(weight, _spread(scale, weight, axis), factor, dtype, gradient, gradient_scale)
    by_rows = weight.is_cuda and _by_rows(weight, axis, fold)
    if by_rows and batch is not None and _may_wait(weight, scale) and _kernels() is not None:
        mode = "max" if refresh else "fixed" if gradient is ScaleGradient.NONE else "learned"
        request = WeightRequest(weight, scale, fold, dtype.qmin, dtype.qmax, mode, _compute_type(weight, fold))
        made = batch[0].take(batch[1], request, _weight_table)
        if made is not None:
            return _with_gradient(weight, scale, made, dtype, gradient, gradient_scale)
    if gradient is ScaleGradient.NONE and by_rows and (kernels := _kernels()) is not None:
        y, inside = kernels.masked_weight(weight, scale, fold, dtype, _compute_type(weight, fold), refresh=refresh)
        return _with_gradient(weight, scale, Made(y, inside, None), dtype, gradient, gradient_scale)
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


def _traced(
    x: Tensor,
    scale: Tensor,
    factor: Tensor | None,
    dtype: QDType,
    gradient: ScaleGradient,
    gradient_scale: float,
) -> Tensor:
    """Fake quantization for the compiler, over any scale that broadcasts."""
    if gradient is ScaleGradient.NONE:
        return compiled_quantization.fixed(x, scale.detach(), factor, dtype.qmin, dtype.qmax)
    return compiled_quantization.learned(
        x, scale, SMALLEST_SCALE, factor, dtype.qmin, dtype.qmax,
        errors=gradient is ScaleGradient.LSQ, gradient_scale=gradient_scale,
    )  # fmt: skip


class _PerTensor(torch.autograd.Function):
    """One scale for the whole tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, dtype: QDType, gradient: ScaleGradient, gradient_scale: float
    ) -> Tensor:
        least = 0.0 if gradient is ScaleGradient.NONE else SMALLEST_SCALE
        ctx.save_for_backward(x, scale)
        ctx.how = dtype, gradient, gradient_scale, least
        if x.is_cuda and (kernels := _kernels()) is not None:
            y: Tensor = kernels.forward(x, scale, dtype.qmin, dtype.qmax, least)
            return y
        return plain_quantization.forward(x, scale.clamp(min=least) if least else scale, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors
        dtype, gradient, gradient_scale, least = ctx.how
        if not ctx.needs_input_grad[1]:
            gradient = ScaleGradient.NONE
        if x.is_cuda and (kernels := _kernels()) is not None:
            how = gradient.value, gradient_scale
            to_x, to_scale = kernels.backward(grad, x, scale, dtype.qmin, dtype.qmax, least, *how)
        else:
            safe = scale.clamp(min=least) if least else scale
            to_x, to_scale = plain_quantization.backward(grad, x, safe, dtype, gradient)
            to_scale = None if to_scale is None else (to_scale * gradient_scale).reshape(scale.shape)
        return to_x, to_scale, None, None, None


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
            y, steps = plain_quantization.weight_forward(weight, _spread(scale, weight, axis), factor, dtype)
        undone = torch.where(factor == 0, 0.0, 1 / factor) if learns and factor is not None else None
        ctx.save_for_backward(steps, undone)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, undone = ctx.saved_tensors
        dtype, gradient, gradient_scale, shape, axis = ctx.how
        if gradient is ScaleGradient.NONE or not ctx.needs_input_grad[1]:
            low, high = plain_quantization.inside_bounds(dtype)
            return torch.ops.aten.hardtanh_backward(grad, steps, low, high), None, None, None, None, None, None
        to_weight, to_scale = plain_quantization.weight_backward(grad, steps, undone, dtype, gradient)
        others = [d for d in range(steps.dim()) if axis is None or d != axis % steps.dim()]
        return to_weight, to_scale.sum(others).view(shape) * gradient_scale, None, None, None, None, None


class _Masked(torch.autograd.Function):
    """A weight that a kernel has quantized already, over a scale that gets no gradient."""

    @staticmethod
    def forward(ctx: Any, _weight: Tensor, made: Made) -> Tensor:
        ctx.save_for_backward(made.rest)
        return made.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


class _MadeLearned(torch.autograd.Function):
    """Likewise, over a scale that learns."""

    @staticmethod
    def forward(
        ctx: Any, _weight: Tensor, scale: Tensor, made: Made, dtype: QDType, errors: bool, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(made.rest, made.undone)
        ctx.how = dtype, errors, gradient_scale, scale.shape
        return made.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        steps, undone = ctx.saved_tensors
        dtype, errors, gradient_scale, shape = ctx.how
        to_weight, rows = _weight_kernels().weight_backward(
            grad, steps, undone, dtype.qmin, dtype.qmax, errors=errors, gradient_scale=gradient_scale
        )
        return to_weight, rows if shape else rows.sum(), None, None, None, None


def _by_rows(weight: Tensor, axis: int | None, fold: Fold | None) -> bool:
    """Whether what has scales, and what the BatchNorm's channels are, are rows that lie one after the other."""
    rows = axis in (None, 0) and not (fold is not None and fold.transposed)
    return rows and weight.dim() > 0 and weight.is_contiguous()


def _compute_type(weight: Tensor, fold: Fold | None) -> torch.dtype:
    """The type that autocast would give the weight for its layer, which has a BatchNorm, so is in autocast's list."""
    lowered = fold is not None and weight.dtype is torch.float32 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if lowered else weight.dtype


def _may_wait(weight: Tensor, scale: Tensor) -> bool:
    """Whether the weight is one that training has in each step, in the types that the common kernel takes."""
    trains = weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()
    return trains and weight.numel() > 0 and weight.dtype is torch.float32 and scale.dtype is torch.float32


def _weight_table(requests: list[WeightRequest]) -> Any:
    return _weight_kernels().WeightTable(requests, SMALLEST_SCALE)


def _with_gradient(
    weight: Tensor, scale: Tensor, made: Made, dtype: QDType, gradient: ScaleGradient, gradient_scale: float
) -> Tensor:
    if gradient is ScaleGradient.NONE:
        held: Tensor = _Masked.apply(weight, made)  # type: ignore[no-untyped-call]
        return held
    errors = gradient is ScaleGradient.LSQ
    learned: Tensor = _MadeLearned.apply(  # type: ignore[no-untyped-call]
        weight, scale, made, dtype, errors, gradient_scale
    )
    return learned


@functools.cache
def _kernels() -> Any:
    """The room with the Triton kernels; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import triton_kernels

    return triton_kernels


def _weight_kernels() -> Any:
    """The room with the kernels for weights that are quantized together; only where :func:`_kernels` is."""
    from . import triton_weights

    return triton_weights
