"""Histograms on a power-of-two grid: counting, growing without losing counts, and which elements to count.

Bins are ``2**e`` wide and begin at 0: :data:`BINS` of them, open at the far end, and as many below 0 if
two-sided. Bins twice as wide are pairs of bins, so a histogram grows, and two of them add up, to exactly the
counts that the wider bins would have had from the start.

A grid is named by its power, the biased float32 exponent E of the largest magnitude that it has room for:
that is less than ``2**(E - 126)``, and the bins are ``2**(E - 137)`` wide.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

__all__ = [
    "BINS",
    "LARGEST_POWER",
    "LEAST_POWER",
    "SAMPLE",
    "UNIT_POWER",
    "bin_width",
    "bins_per_unit",
    "count",
    "count_rows",
    "dense",
    "grid_power",
    "grow",
    "sample",
]

BINS: Final = 2048
"""Bins of a histogram from 0 to the end of its range; a two-sided one has as many again below 0."""

SAMPLE: Final = 1 << 14
"""About how many elements of each sample (index of the first axis) :func:`sample` takes."""

_MANTISSA: Final = 23
_BIAS: Final = 127
_WIDTH_BIAS: Final = _BIAS - 1 + BINS.bit_length() - 1
UNIT_POWER: Final = _BIAS + _WIDTH_BIAS
"""This less a grid's power is the biased float32 exponent of 1 / its bins' width."""
LEAST_POWER: Final = 10
"""The power of the finest grid: 1 / its bins' width is the largest power of two in float32."""
LARGEST_POWER: Final = 254
"""The power of the widest grid: it has room for all of float32."""

_PERIOD: Final = 257  # a prime: runs drift over the rows and columns of any image size
_SHORTEST_RUN: Final = 8  # the float32 elements of a memory sector of a GPU: shorter runs read as much
_EXACT: Final = 1 << 24  # float32 counts are exact up to here


def grid_power(largest: Tensor) -> Tensor:
    """The power of the finest grid that has room for a magnitude, int32.

    Args:
        largest: float32, not negative, any shape. NaN and Inf give some valid power.
    """
    return (largest.view(torch.int32) >> _MANTISSA).clamp_(LEAST_POWER, LARGEST_POWER)


def bins_per_unit(power: Tensor) -> Tensor:
    """1 / the bins' width, float32, exact."""
    return ((UNIT_POWER - power) << _MANTISSA).view(torch.float32)


def bin_width(power: Tensor) -> Tensor:
    """The bins' width, float64, exact."""
    return torch.exp2(power.double() - _WIDTH_BIAS)


def _positions(values: Tensor, per_unit: Tensor, *, symmetric: bool) -> Tensor:
    """`values` in bins from the first bin's left end, float32, in a fresh tensor; their floor is the bin."""
    values = values if values.dtype == torch.float32 else values.float()
    scaled = values * per_unit
    if symmetric:
        return scaled.abs_()
    # Rounded before it is shifted, which would round to nearest; by sign, for tiny values have underflowed to
    # 0.
    return scaled.trunc_().add_(BINS).add_(values < 0, alpha=-1)


def count(values: Tensor, per_unit: Tensor, *, symmetric: bool, out: Tensor) -> None:
    """Count values per bin.

    Args:
        values: Float, any shape, within the grid.
        per_unit: What :func:`bins_per_unit` says of the grid.
        symmetric: Whether magnitudes are counted.
        out: int64, [BINS] or [2 * BINS]; overwritten.
    """
    positions = _positions(values, per_unit, symmetric=symmetric)
    bins = out.shape[0]
    if positions.device.type == "cpu":  # there it is five times as fast; on a GPU it would wait for its own size
        index = positions.to(torch.int32).clamp_(0, bins - 1).flatten()
        out.copy_(torch.bincount(index, minlength=bins))
    else:
        _count_in_parts(positions, out, symmetric=symmetric)


def _count_in_parts(positions: Tensor, out: Tensor, *, symmetric: bool) -> None:
    """Count by histc, whose float32 counts are exact for so many values at a time; changes `positions`.

    The zeros of a ReLU all want the same counter, which makes a GPU's histc seven times slower: of magnitudes
    they are left out, and counted as what is missing in the end.
    """
    bins = out.shape[0]
    if symmetric:
        torch.threshold_(positions, 0, -1)
    first, *rest = torch.split(positions.flatten(), _EXACT)
    out.copy_(torch.histc(first, bins, 0, bins))
    for part in rest:
        out.add_(torch.histc(part, bins, 0, bins).long())
    if symmetric:
        out[:1] += positions.numel() - out.sum()


def count_rows(rows: Tensor, per_unit: Tensor, *, symmetric: bool) -> Tensor:
    """Count each row's values per bin on a grid of its own.

    Args:
        rows: Float, [C, N].
        per_unit: What :func:`bins_per_unit` says of the grids, [C].
        symmetric: Whether magnitudes are counted.

    Returns:
        int64, [C, BINS] or [C, 2 * BINS].
    """
    bins = BINS if symmetric else 2 * BINS
    index = _positions(rows, per_unit.unsqueeze(1), symmetric=symmetric).long().clamp_(0, bins - 1)
    counts = torch.zeros(len(rows), bins, dtype=torch.int64, device=rows.device)
    return counts.scatter_add_(1, index, torch.ones_like(index))


def grow(counts: Tensor, power: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Add up histograms on the widest of their grids.

    Args:
        counts: int64, [..., n, B]: n histograms to be added, for each of the leading indices.
        power: Their grids, int32, [..., n].
        symmetric: Whether they count magnitudes.

    Returns:
        The sums, int64, [..., B], and their grids, int32, [...].
    """
    widest = power.amax(dim=-1)
    shift = (widest.unsqueeze(-1) - power).clamp_(max=31).unsqueeze(-1)
    zero = 0 if symmetric else BINS
    index = (torch.arange(-zero, BINS, device=counts.device) >> shift) + zero
    total = torch.zeros_like(counts[..., 0, :])
    return total.scatter_add_(-1, index.flatten(-2), counts.flatten(-2)), widest


def sample(x: Tensor) -> Tensor:
    """About :data:`SAMPLE` elements of each sample of x, all of them if there are fewer.

    They are short runs that start every 257 elements of a sample, in memory order: which ones depends on
    nothing but the sample's shape and layout, never on the batch.

    Args:
        x: Any shape; the first axis counts samples. With fewer than two axes all of x is taken.

    Returns:
        A view of x, unless its memory has gaps: [samples, length] or [samples, runs, length].
    """
    if x.ndim < 2:
        return x.reshape(1, -1)
    samples = dense(x).reshape(x.shape[0], -1)
    length = samples.shape[1]
    run = max(_SHORTEST_RUN, math.ceil(_PERIOD * SAMPLE / length))
    if run >= _PERIOD:
        return samples
    periods = length // _PERIOD
    return samples[:, : periods * _PERIOD].view(x.shape[0], periods, _PERIOD)[:, :, :run]


def dense(x: Tensor) -> Tensor:
    """x with the axes behind its first one in the order of memory, contiguous: a view where there are no gaps."""
    if x.is_contiguous():
        return x
    order = sorted(range(1, x.ndim), key=x.stride, reverse=True)
    return x.permute(0, *order).contiguous() if x.ndim else x
