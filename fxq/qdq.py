"""The two operators that every quantized graph is made of, and the fake quantizer that trains.

``fxq::quantize`` and ``fxq::dequantize`` are torch custom operators: one node each in FX graphs, in
torch.export and under torch.compile. They compute what ONNX's QuantizeLinear and DequantizeLinear compute
(R10, R11)::

    quantize:   clamp(round_half_even(x / scale) + zero_point, qmin, qmax)
    dequantize: (q - zero_point) * scale

The arithmetic is float32 whatever the types of x and scale (float64 for a float64 x), as in ONNX Runtime:
16-bit inputs are widened first, and the division is a division; a product with the reciprocal differs in
about one integer of a thousand.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from .errors import RecipeError
from .recipe import DTYPES, QDType

__all__ = ["DEQUANTIZE", "QUANTIZE", "dequantize", "fake_quantize", "quantize"]

_COMPUTE: Final = (torch.float32, torch.float64)
_EXACT: Final = 1 << 23
"""Up to here float32 holds every integer and every half between two."""


def _dtype(name: str) -> QDType:
    try:
        return DTYPES[name]
    except KeyError:
        raise RecipeError(f"unknown dtype {name!r}", hint=f"use one of {', '.join(DTYPES)}") from None


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`values`, one number or one per index of `axis`, in a shape that broadcasts over x.

    One number becomes a tensor without dimensions on x's device, never a Python or host number: dividing by
    those, CUDA kernels multiply by the reciprocal.
    """
    if values.device != x.device:
        values = values.to(x.device)
    if axis is None:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _before_clamp(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, to: QDType) -> Tensor:
    """x / scale, for integers rounded and with the zero point added, in a fresh float tensor.

    Adding the zero point also turns -0.0, which integers do not have, into 0.0.
    """
    steps = x.float() if x.dtype not in _COMPUTE else x
    steps = steps / _along(scale, x, axis).to(steps.dtype)
    if to.floating:
        return steps
    steps.round_()
    if to.qmax > _EXACT:
        steps = steps.double()
    return steps.add_(_along(zero_point, x, axis))


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: str) -> Tensor:
    to = _dtype(dtype)
    return _before_clamp(x, scale, zero_point, axis, to).clamp_(to.qmin, to.qmax).to(to.storage)


def _dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    work = torch.float64 if scale.dtype == torch.float64 else torch.float32
    if q.dtype == torch.int32:
        steps = (q - _along(zero_point, q, axis)).to(work)
    else:
        steps = q.to(work)
        if not q.dtype.is_floating_point:
            steps.sub_(_along(zero_point, q, axis))
    return steps.mul_(_along(scale, q, axis).to(work)).to(scale.dtype)


torch.library.define("fxq::quantize", "(Tensor x, Tensor scale, Tensor zero_point, int? axis, str dtype) -> Tensor")
torch.library.define("fxq::dequantize", "(Tensor q, Tensor scale, Tensor zero_point, int? axis) -> Tensor")
# CompositeExplicitAutograd: this Python code serves CPU and CUDA tensors, and tracers keep the operator whole.
torch.library.impl("fxq::quantize", "CompositeExplicitAutograd", _quantize)
torch.library.impl("fxq::dequantize", "CompositeExplicitAutograd", _dequantize)


@torch.library.impl("fxq::quantize", "Meta")
def _quantized_shape(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: str) -> Tensor:
    """The result without data. Tracers and exporters ask for it often, and the arithmetic takes them a third of
    their time.
    """
    del scale, zero_point, axis
    return torch.empty_like(x, dtype=_dtype(dtype).storage)


@torch.library.impl("fxq::dequantize", "Meta")
def _dequantized_shape(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    del zero_point, axis
    return torch.empty_like(q, dtype=scale.dtype)


QUANTIZE: Final = torch.ops.fxq.quantize.default
"""The quantize operator, as FX call_function target."""
DEQUANTIZE: Final = torch.ops.fxq.dequantize.default
"""The dequantize operator, as FX call_function target."""


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: str) -> Tensor:
    """Quantize x (R10).

    Args:
        x: Float, any shape.
        scale: Positive float: one value (shape [] or [1]) if axis is None, else [x.shape[axis]].
        zero_point: int32, the scale's shape; ignored for floating-point dtypes, which have none.
        axis: The per-channel axis, or None.
        dtype: A name in :data:`fxq.recipe.DTYPES`.

    Returns:
        Integers, or FP8 values, in the dtype's storage type and x's shape, saturated at the dtype's ends. No
        gradient flows through: :func:`fake_quantize` has one.

    Raises:
        RecipeError: No such dtype.
    """
    result: Tensor = QUANTIZE(x, scale, zero_point, axis, dtype)
    return result


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """The real values that quantized ones stand for.

    Args:
        q: What :func:`quantize` gave.
        scale: As given to it.
        zero_point: As given to it.
        axis: As given to it.

    Returns:
        ``(q - zero_point) * scale`` in q's shape and the scale's dtype.
    """
    result: Tensor = DEQUANTIZE(q, scale, zero_point, axis)
    return result


def _real(steps: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, to: QDType) -> Tensor:
    """Clamp `steps` in place and turn them into real values of x's dtype, as dequantize would."""
    steps.clamp_(to.qmin, to.qmax)
    if to.qmax > _EXACT:
        return _dequantize(steps.to(to.storage), scale, zero_point, axis).to(x.dtype)
    held = steps.to(to.storage).to(steps.dtype) if to.floating else steps.sub_(_along(zero_point, x, axis))
    return held.mul_(_along(scale, x, axis).to(held.dtype)).to(scale.dtype).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is 1 inside the range and 0 outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: str) -> Tensor:
        to = DTYPES[dtype]
        steps = _before_clamp(x, scale, zero_point, axis, to)
        ctx.save_for_backward((steps >= to.qmin) & (steps <= to.qmax))
        return _real(steps, x, scale, zero_point, axis, to)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, dtype: str) -> Tensor:
    """What x becomes when it is quantized and dequantized, with a gradient that training can use.

    The values are those of ``dequantize(quantize(x, ...), ...)`` bit for bit, given in x's dtype. The
    gradient is the straight-through estimate clipped outside the range (Jacob et al., 2018): 1 where the
    rounded value lies within [qmin, qmax], else 0. The scale gets none.

    Args:
        x: Float, any shape.
        scale: As for :func:`quantize`.
        zero_point: As for :func:`quantize`.
        axis: As for :func:`quantize`.
        dtype: As for :func:`quantize`.

    Raises:
        RecipeError: No such dtype.
    """
    to = _dtype(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _StraightThrough.apply(x, scale, zero_point, axis, dtype)  # type: ignore[no-untyped-call]
        return result
    return _real(_before_clamp(x, scale, zero_point, axis, to), x, scale, zero_point, axis, to)
