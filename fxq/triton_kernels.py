"""Fake quantization on a GPU: one kernel each way, with the division and the rounding of :mod:`fxq.qdq`.

Eager PyTorch needs five kernels forward and four backward for the same; memory traffic is what a training step has
least of. Only :mod:`fxq.straight_through` loads this room, and only where Triton is installed. Triton reads a kernel's
annotations itself and knows no types but its own, so kernels have none.
"""

# ruff: noqa: PLR0913, PLR0917 - a kernel takes each pointer and each size by itself
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .folding import Fold
from .qparams import DEAD_SCALE, SMALLEST_NORMAL
from .recipe import QDType

__all__ = ["WIDEST", "average", "backward", "forward", "mask_type", "masked_weight", "weight_forward"]

WIDEST: Final = 1 << 14
"""Elements of the longest row that one program holds."""
_BLOCK: Final = 1024
_PARTIAL_BLOCK: Final = 4096
_GRADIENTS: Final = {"none": 0, "lsq": 1, "pact": 2}


@triton.jit
def _steps(x, scale, low: tl.constexpr, high: tl.constexpr):
    """x / scale, kept within one step of the range, where float32 tells halves apart; NaN stays NaN."""
    steps = tl.div_rn(x, scale)
    steps = tl.maximum(steps, low - 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(steps, high + 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(steps):
    """Half to even, for magnitudes below 2**22: what adding and taking away 1.5 * 2**23 does in float32."""
    return (steps + 12582912.0) - 12582912.0


@triton.jit
def _forward(
    x_ptr, scale_ptr, y_ptr, n, low: tl.constexpr, high: tl.constexpr, least: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    valid = at < n
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.load(scale_ptr), least)
    rounded = _round(_steps(x, scale, low, high))
    rounded = tl.maximum(rounded, low, propagate_nan=tl.PropagateNan.ALL)
    rounded = tl.minimum(rounded, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at, (rounded * scale).to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    grad_ptr,
    x_ptr,
    scale_ptr,
    to_x_ptr,
    partial_ptr,
    n,
    gradient_scale,
    low: tl.constexpr,
    high: tl.constexpr,
    least: tl.constexpr,
    gradient: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    at = program.to(tl.int64) * block + tl.arange(0, block)
    valid = at < n
    grad = tl.load(grad_ptr + at, mask=valid, other=0.0)
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    steps = _steps(x, tl.maximum(tl.load(scale_ptr), least), low, high)
    rounded = _round(steps)
    inside = (rounded >= low) & (rounded <= high)
    tl.store(to_x_ptr + at, tl.where(inside, grad, 0.0).to(to_x_ptr.dtype.element_ty), mask=valid)
    if gradient > 0:
        ends = tl.where(rounded < low, low, high)
        within = rounded - steps if gradient == 1 else 0.0 * steps
        part = grad.to(tl.float32) * tl.where(inside, within, ends)
        tl.store(partial_ptr + program, tl.sum(part, axis=0) * gradient_scale)


@triton.jit
def _scale_of(low, high, qmax: tl.constexpr, tiny: tl.constexpr, dead: tl.constexpr):
    """The symmetric scale of a range, as fxq.qparams takes it."""
    reach = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
    reach = tl.maximum(reach, 0.0, propagate_nan=tl.PropagateNan.ALL)
    scale = (reach.to(tl.float64) / qmax).to(tl.float32)
    return tl.where(scale < tiny, dead, scale)


@triton.jit
def _average(
    low_ptr,
    high_ptr,
    amin_ptr,
    amax_ptr,
    scale_ptr,
    step_ptr,
    momentum,
    qmax: tl.constexpr,
    tiny: tl.constexpr,
    dead: tl.constexpr,
):
    low, high = tl.load(low_ptr).to(tl.float32), tl.load(high_ptr).to(tl.float32)
    held_low, held_high = tl.load(amin_ptr), tl.load(amax_ptr)
    known = (tl.abs(held_low) < float("inf")) & (tl.abs(held_high) < float("inf"))
    low = tl.where(known, held_low + momentum * (low - held_low), low)
    high = tl.where(known, held_high + momentum * (high - held_high), high)
    tl.store(amin_ptr, low)
    tl.store(amax_ptr, high)
    scale = _scale_of(low, high, qmax, tiny, dead)
    tl.store(scale_ptr, scale)
    tl.store(step_ptr, scale)


@triton.jit
def _weight_forward(
    weight_ptr,
    scale_ptr,
    var_ptr,
    gamma_ptr,
    out_ptr,
    more_ptr,
    columns,
    scale_stride,
    eps: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    folds: tl.constexpr,
    scales: tl.constexpr,
    refreshes: tl.constexpr,
    masks: tl.constexpr,
    tiny: tl.constexpr,
    dead: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    valid = column < columns
    at = row * columns + column
    weight = tl.load(weight_ptr + at, mask=valid, other=0.0).to(tl.float32)
    folded = weight
    if folds:
        exact = tl.rsqrt(tl.load(var_ptr + row).to(tl.float64) + eps)
        if scales:
            exact = exact * tl.load(gamma_ptr + row).to(tl.float64)
        factor = exact.to(tl.float32)
        folded = weight * factor
    if refreshes:  # one program sees the whole row
        scale = _scale_of(tl.min(folded, axis=0), tl.max(folded, axis=0), high, tiny, dead)
        tl.store(scale_ptr + row, scale)
    else:
        scale = tl.load(scale_ptr + row * scale_stride)
    real = scale
    if folds:
        real = scale / tl.where(factor == 0.0, 1.0, factor)
    steps = tl.div_rn(folded, scale)
    near = tl.maximum(steps, low - 1.0, propagate_nan=tl.PropagateNan.ALL)
    near = _round(tl.minimum(near, high + 1.0, propagate_nan=tl.PropagateNan.ALL))
    rounded = tl.maximum(near, low, propagate_nan=tl.PropagateNan.ALL)
    rounded = tl.minimum(rounded, high, propagate_nan=tl.PropagateNan.ALL)
    y = rounded * real
    if folds:
        y = tl.where(factor == 0.0, weight, y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=valid)
    if masks:
        inside = (near >= low) & (near <= high)
        tl.store(more_ptr + at, inside.to(more_ptr.dtype.element_ty), mask=valid)
    else:
        tl.store(more_ptr + at, steps, mask=valid)


def _dense(x: Tensor) -> Tensor:
    """x itself if its elements fill their memory in some order of dimensions, else a contiguous copy."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: make it x's."""
    return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device_of(x)


def forward(x: Tensor, scale: Tensor, qmin: float, qmax: float, least: float) -> Tensor:
    """Quantize and dequantize over one scale, [].

    Args:
        x: Float32, float16 or bfloat16, any shape.
        scale: Float32, [].
        qmin: Smallest integer.
        qmax: Largest integer; magnitudes are below 2**22.
        least: What the scale counts as where it is less.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    n = x.numel()
    if n:
        with _on(x):
            _forward[(triton.cdiv(n, _BLOCK),)](x, scale, y, n, float(qmin), float(qmax), least, _BLOCK)
    return y


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, least: float, gradient: str, gradient_scale: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`forward` for x, and unless `gradient` is ``none`` for the scale, float32, [].

    The scale's, times `gradient_scale`, is summed in a fixed order, so that it is the same every time.
    """
    x = _dense(x)
    to_x = torch.empty_like(x, dtype=grad.dtype)
    if grad.stride() != to_x.stride():
        grad = torch.empty_like(to_x).copy_(grad)
    n, kind = x.numel(), _GRADIENTS[gradient]
    block = _PARTIAL_BLOCK if kind else _BLOCK
    programs = triton.cdiv(n, block)
    partial = torch.empty(programs, dtype=torch.float32, device=x.device) if kind else to_x
    if n:
        with _on(x):
            _backward[(programs,)](
                grad, x, scale, to_x, partial, n, float(gradient_scale), float(qmin), float(qmax), least, kind, block
            )
    return to_x, partial.sum() if kind else None


def weight_forward(weight: Tensor, scale: Tensor, fold: Fold | None, dtype: QDType) -> tuple[Tensor, Tensor]:
    """The weight that training computes with, and its unrounded steps, float32; see fake_quantize_weight.

    Args:
        weight: Contiguous, [rows, …].
        scale: Positive float32, [] or [rows].
        fold: The BatchNorm to fold in, whose channels are the rows; None for none.
        dtype: The integer type; magnitudes are below 2**22.
    """
    y, steps = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.float32)
    _launch(weight, scale, fold, dtype, (y, steps), refreshes=False, masks=False)
    return y, steps


def masked_weight(
    weight: Tensor, scale: Tensor, fold: Fold | None, dtype: QDType, compute: torch.dtype, *, refresh: bool
) -> tuple[Tensor, Tensor]:
    """The weight that training computes with, in `compute`, and where nothing was clipped; see :func:`mask_type`.

    Args:
        weight: As for :func:`weight_forward`.
        scale: Likewise; with `refresh`, [rows], and set to the range of each row first.
        fold: Likewise.
        dtype: Likewise.
        compute: The type that the layer computes in.
        refresh: Whether the scale follows the weight; rows have at most :data:`WIDEST` elements then.
    """
    y = torch.empty_like(weight, dtype=compute)
    inside = torch.empty_like(weight, dtype=mask_type(weight.dtype, compute))
    _launch(weight, scale, fold, dtype, (y, inside), refreshes=refresh, masks=True)
    return y, inside


def mask_type(held: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The type of a mask that turns a gradient in `compute` into one in `held` by one multiplication."""
    return torch.bool if held is compute else held


def _launch(
    weight: Tensor,
    scale: Tensor,
    fold: Fold | None,
    dtype: QDType,
    into: tuple[Tensor, Tensor],
    *,
    refreshes: bool,
    masks: bool,
) -> None:
    rows = weight.shape[0]
    columns = weight.numel() // max(rows, 1)
    if not columns:
        return
    gamma = None if fold is None else fold.gamma
    block = triton.next_power_of_2(columns) if refreshes else _BLOCK
    with _on(weight):
        _weight_forward[(rows, triton.cdiv(columns, block))](
            weight, scale, scale if fold is None else fold.var, scale if gamma is None else gamma, *into,
            columns, scale.dim(), 0.0 if fold is None else fold.eps, float(dtype.qmin), float(dtype.qmax),
            fold is not None, gamma is not None, refreshes, masks, SMALLEST_NORMAL, DEAD_SCALE, block,
        )  # fmt: skip


def average(
    low: Tensor, high: Tensor, amin: Tensor, amax: Tensor, scale: Tensor, momentum: float, qmax: float
) -> Tensor:
    """Pull a running range, `amin` and `amax`, towards a batch's, `low` and `high`, and set its scale.

    Args:
        low: The batch's smallest value, float, [].
        high: The batch's largest value, float, [].
        amin: Float32, []; changed. Not finite before the first batch, which is then taken as it is.
        amax: Likewise.
        scale: Float32, []; changed.
        momentum: The batch's share.
        qmax: Largest integer; the scale is symmetric.

    Returns:
        A copy of the scale, for a step's backward to keep.
    """
    copy = torch.empty_like(scale)
    with _on(scale):
        _average[(1,)](low, high, amin, amax, scale, copy, momentum, float(qmax), SMALLEST_NORMAL, DEAD_SCALE)
    return copy
