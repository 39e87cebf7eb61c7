"""From a range of real values to a scale and a zero point: pure maths over tensors.

Rule R10 gives the arithmetic, ``q = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)``, and R9 the
symmetric case, where the zero point is 0 and ``scale = amax / qmax`` (amax / 127 for INT8, amax / 448 for
FP8).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .errors import CalibrationError, RecipeError
from .recipe import QDType, QSpec

__all__ = [
    "DEAD_SCALE",
    "SMALLEST_NORMAL",
    "scale_and_zero_point",
    "unchecked_scale_and_zero_point",
    "weight_range",
]

DEAD_SCALE: Final = 2.0**-14
"""The scale of a dead range: the smallest normal float16, so it stays positive whatever float type holds it.

A range is dead when it is zero, or so small (amax about 1e-36) that its scale would be subnormal in float32,
which GPUs may flush to zero. All of its values quantize to the zero point under this scale.
"""

SMALLEST_NORMAL: Final = torch.finfo(torch.float32).tiny
_RATIOS: Final = 65
_SMALLEST_RATIO: Final = 0.2
_CHUNK: Final = 1 << 18
"""Elements of the temporaries in the weight search: 1 MiB of float32, which stays in a core's cache."""


def scale_and_zero_point(amin: Tensor, amax: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point for the ranges [amin, amax].

    Symmetric specs, and floating-point types always, use ``max(|amin|, |amax|) / qmax`` and zero point 0
    (R9). Asymmetric ones widen the range so that it includes 0, which must quantize without error (paddings
    and ReLU give exact zeros), and spread it over [qmin, qmax].

    Args:
        amin: Smallest values, float, shape [] or [C].
        amax: Largest values, same shape.
        spec: A complete spec; its dtype and symmetry are read.

    Returns:
        Scale, float32, strictly positive (:data:`DEAD_SCALE` for dead ranges), and zero point, int32, both of
        amin's shape and on its device.

    Raises:
        CalibrationError: The shapes differ, or a bound is NaN or infinite, or amin > amax.
        RecipeError: The spec is asymmetric over a floating-point type.
    """
    if amin.shape != amax.shape:
        raise CalibrationError(f"amin has shape {tuple(amin.shape)} and amax {tuple(amax.shape)}")
    if not bool((amin.isfinite() & amax.isfinite() & (amin <= amax)).all()):
        raise CalibrationError(
            "a range is not finite, or its ends are swapped",
            hint="look for NaN or Inf in the calibration data",
        )
    return unchecked_scale_and_zero_point(amin, amax, spec)


def unchecked_scale_and_zero_point(amin: Tensor, amax: Tensor, spec: QSpec) -> tuple[Tensor, Tensor]:
    """As :func:`scale_and_zero_point`, unchecked. Float64 inside: amax - amin may exceed float32."""
    dtype = spec.qdtype
    if dtype.floating and spec.symmetric is False:
        raise RecipeError(f"{dtype.name} has no zero point", hint="use symmetric=True")
    low, high = amin.double().clamp(max=0), amax.double().clamp(min=0)
    symmetric = spec.symmetric is not False
    width = torch.maximum(-low, high) / dtype.qmax if symmetric else (high - low) / (dtype.qmax - dtype.qmin)
    scale = width.float()
    scale = torch.where(scale < SMALLEST_NORMAL, DEAD_SCALE, scale)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = (dtype.qmin - low / scale).round_().clamp_(dtype.qmin, dtype.qmax)
    return scale, zero_point.to(torch.int32)


def weight_range(weight: Tensor, spec: QSpec, axis: int | None) -> tuple[Tensor, Tensor]:
    """The range that a weight is quantized over, taken from the weight itself.

    The spec's methods ``mse`` and ``auto`` search, for each channel, the share of the full range with the least squared
    error between the weight and its quantized values; all others take the full range, because they need the
    statistics of many batches and a weight is but one tensor.

    Args:
        weight: Float, any shape.
        spec: A complete spec.
        axis: The axis with one range per index (R16), or None for one range in all.

    Returns:
        amin and amax, float32, shape [weight.shape[axis]], or [] if axis is None.

    Raises:
        CalibrationError: The weight is empty, or holds NaN or Inf.
    """
    weight = weight.detach()
    if weight.numel() == 0:
        raise CalibrationError(f"a weight of shape {tuple(weight.shape)} has no range")
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1).reshape(weight.shape[axis], -1)
    rows = rows.float()
    amin, amax = rows.amin(dim=1), rows.amax(dim=1)  # aminmax along an axis takes ten times as long on a CPU
    if not bool((amin.isfinite() & amax.isfinite()).all()):
        raise CalibrationError("a weight holds NaN or Inf", hint="check the checkpoint the model was loaded from")
    if spec.calibration.name in ("mse", "auto"):
        ratio = _best_ratio(rows, amin, amax, spec)
        amin, amax = amin * ratio, amax * ratio
    return (amin[0], amax[0]) if axis is None else (amin, amax)


def _best_ratio(rows: Tensor, amin: Tensor, amax: Tensor, spec: QSpec) -> Tensor:
    """For each row of [C, N] the share of [amin, amax] with the least squared error, shape [C].

    The candidates are tried one after the other over blocks of whole rows and columns that fit a cache.
    """
    ratios = torch.linspace(1.0, _SMALLEST_RATIO, _RATIOS, device=rows.device)
    channels, length = rows.shape
    error = torch.zeros(_RATIOS, channels, dtype=torch.float64, device=rows.device)
    columns = min(length, _CHUNK)
    step = max(1, _CHUNK // columns)
    scales, zero_points = unchecked_scale_and_zero_point(ratios[:, None] * amin, ratios[:, None] * amax, spec)
    for first in range(0, channels, step):
        block = slice(first, first + step)
        for part in torch.split(rows[block], columns, dim=1):
            for k in range(_RATIOS):
                error[k, block] += _squared_error(
                    part, scales[k, block, None], zero_points[k, block, None], spec.qdtype
                )
    return ratios[error.argmin(dim=0)]  # the first of equals: the widest range


def _squared_error(rows: Tensor, scale: Tensor, zero_point: Tensor, dtype: QDType) -> Tensor:
    """Sum over each row of the squared quantization error, float64, shape [C]."""
    if dtype.floating:
        held = (rows / scale).clamp_(dtype.qmin, dtype.qmax).to(dtype.storage).to(rows.dtype)
    else:
        low, high = dtype.qmin - zero_point, dtype.qmax - zero_point
        held = torch.minimum(torch.maximum((rows / scale).round_(), low), high)
    return held.mul_(scale).sub_(rows).square_().sum(dim=1, dtype=torch.float64)
