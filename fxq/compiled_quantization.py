"""Fake quantization under torch.compile: plain arithmetic, so that the compiler fuses it into what stands beside it.

What backward needs decides what a step costs. Whether a value was clipped is one comparison of two tensors that
forward computes anyway, ``rounded == held``: the compiler keeps its outcome, one byte an element in the memory format
of the layer beside it, and computes nothing again. A mask that takes two operations is kept in another memory format
than convolutions have, which makes the kernel that writes it several times slower; and what backward computes again may
find running statistics and scales that the same forward has changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fixed", "keep", "learned"]

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


def fixed(x: Tensor, scale: Tensor, factor: Tensor | None, qmin: float, qmax: float) -> Tensor:
    """Quantize and dequantize over a scale that gets no gradient.

    Args:
        x: Float, any shape.
        scale: Positive float32, any shape that broadcasts over x.
        factor: What x is folded with first, and divided by again; float32, likewise. None for nothing.
        qmin: Smallest integer.
        qmax: Largest integer.
    """
    held, inside, _ = _quantized(x, scale, factor, qmin, qmax)
    return _real(held, x, scale, factor) + _only_gradient(torch.where(inside, x, 0.0))


def learned(
    x: Tensor,
    scale: Tensor,
    smallest: float,
    factor: Tensor | None,
    qmin: float,
    qmax: float,
    *,
    errors: bool,
    gradient_scale: float,
) -> Tensor:
    """Quantize and dequantize over a scale that learns.

    Args:
        x: As for :func:`fixed`.
        scale: Likewise.
        smallest: What the scale counts as where it is less; its gradient is as if it were not.
        factor: Likewise.
        qmin: Likewise.
        qmax: Likewise.
        errors: Whether the scale learns from the rounding errors too, beside the ends of what was clipped.
        gradient_scale: What the scale's gradient is multiplied by.
    """
    factor = None if factor is None else keep(factor)
    safe = scale.detach().clamp(min=smallest)
    held, inside, steps = _quantized(x, safe, factor, qmin, qmax)
    slope = torch.where(inside, held - steps if errors else 0.0, held)
    if factor is not None:
        dead = factor == 0
        slope = torch.where(dead, 0.0, slope / torch.where(dead, 1.0, factor))
    y = _real(held, x, safe, factor) + _only_gradient(torch.where(inside, x, 0.0))
    return y + (slope * _only_gradient(scale * gradient_scale)).to(x.dtype)


def _quantized(
    x: Tensor, scale: Tensor, factor: Tensor | None, qmin: float, qmax: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The integers, float32; where nothing was clipped; and the unrounded steps."""
    x = x.detach()
    steps = (x if factor is None else x * factor).float() / scale
    rounded = steps.round()
    held = rounded.clamp(qmin, qmax)
    return held, rounded == held, steps


def _real(held: Tensor, x: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    """The values that integers stand for, unfolded again; where nothing undoes the fold, x itself."""
    if factor is None:
        return (held * scale).to(x.dtype)
    dead = factor == 0
    return torch.where(dead, x.detach(), held * (scale / torch.where(dead, 1.0, factor))).to(x.dtype)


def _only_gradient(x: Tensor) -> Tensor:
    """0 with the gradient of x."""
    return x - x.detach()
