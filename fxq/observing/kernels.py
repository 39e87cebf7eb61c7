"""Collecting on a GPU: one read for minimum and maximum, one sparse read for the histogram.

Eager PyTorch needs twenty kernels for the same, most of them for single numbers, and its histogram writes its
sample out three times. Only :mod:`fxq.observing.base` loads this room, and only where Triton is installed. Triton
reads a kernel's annotations itself and knows no types but its own, so kernels have none.
"""

# mypy: disable-error-code="import-not-found,no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from .histogram import LARGEST_POWER, LEAST_POWER, UNIT_POWER

__all__ = ["COPIES", "PARTS", "collect_histogram", "collect_range"]

PARTS: Final = 1024
"""Into how many minima and maxima :func:`collect_range` divides a tensor: enough to fill a GPU."""

COPIES: Final = 32
"""Among how many histograms :func:`collect_histogram` divides its counts, so that few wait for one counter."""

_RANGE_BLOCK: Final = 4096
_COUNT_BLOCK: Final = 1024
_NARROW: Final = 1 << 30  # more elements are counted in 64 bits


@triton.jit
def _lesser(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _range(
    x_ptr,
    low_ptr,
    high_ptr,
    n,
    wide: tl.constexpr,
    parts: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * block if wide else program * block
    low = tl.full([block], float("inf"), tl.float32)
    high = tl.full([block], float("-inf"), tl.float32)
    # From the end: that is what the tensor's maker left in the cache, and its beginning is what a reader wants next.
    steps = tl.cdiv(n, parts * block)
    for step in range(steps):
        at = first + (steps - 1 - step) * (parts * block) + tl.arange(0, block)
        valid = at < n
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        low = _lesser(low, tl.where(valid, x, float("inf")))
        high = _greater(high, tl.where(valid, x, float("-inf")))
    tl.store(low_ptr + program, tl.reduce(low, 0, _lesser))
    tl.store(high_ptr + program, tl.reduce(high, 0, _greater))


@triton.jit
def _histogram(  # noqa: PLR0913, PLR0917 - a kernel has no objects to bundle its arguments in
    x_ptr,
    low_ptr,
    high_ptr,
    counts_ptr,
    power_ptr,
    counted_ptr,
    n,
    per_sample,
    run,
    sample_stride,
    run_stride,
    wide: tl.constexpr,
    least: tl.constexpr,
    largest: tl.constexpr,
    unit: tl.constexpr,
    bins: tl.constexpr,
    zero: tl.constexpr,
    copies: tl.constexpr,
    parts: tl.constexpr,
    block: tl.constexpr,
):
    program = tl.program_id(0)
    each = tl.arange(0, parts)
    reach = tl.maximum(tl.max(-tl.load(low_ptr + each)), tl.max(tl.load(high_ptr + each)))
    power = tl.minimum(tl.maximum(reach.to(tl.int32, bitcast=True) >> 23, least), largest)
    if program == 0:
        tl.store(power_ptr, power)
        tl.store(counted_ptr, n)
    first = program.to(tl.int64) * block if wide else program * block
    index = first + tl.arange(0, block)
    valid = index < n
    sample = index // per_sample
    rest = index - sample * per_sample
    at = sample.to(tl.int64) * sample_stride + (rest // run).to(tl.int64) * run_stride + rest % run
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    scaled = x * ((unit - power) << 23).to(tl.float32, bitcast=True)
    if zero == 0:
        at_bin = tl.abs(scaled).to(tl.int32)
    else:  # by the bits: a tiny value's product is 0, and it still belongs below 0
        bits = x.to(tl.int32, bitcast=True)
        at_bin = scaled.to(tl.int32) + zero - tl.where((bits < 0) & (bits & 0x7FFFFFFF != 0), 1, 0)
    at_bin = tl.minimum(tl.maximum(at_bin, 0), bins - 1)
    # Most of a ReLU's values want the bin of 0: it gets what is missing in the end.
    own = counts_ptr + program % copies * bins
    tl.atomic_add(own + at_bin, tl.full([block], 1, tl.int32), mask=valid & (at_bin != zero), sem="relaxed")


def collect_range(x: Tensor, low: Tensor, high: Tensor) -> None:
    """Minima and maxima of the parts of a tensor; one of a part with NaN is NaN.

    Args:
        x: Float, contiguous, not empty.
        low: float32, [PARTS]; overwritten, infinite for parts without elements.
        high: float32, likewise.
    """
    _range[(PARTS,)](x, low, high, x.numel(), x.numel() > _NARROW, PARTS, _RANGE_BLOCK, num_warps=4)


def collect_histogram(
    x: Tensor, low: Tensor, high: Tensor, counts: Tensor, power: Tensor, counted: Tensor, *, zero: int
) -> None:
    """Count values per bin on the grid for [min(low), max(high)] (see :mod:`fxq.observing.histogram`).

    Args:
        x: Float, [N, length] or [N, runs, length] whose last axis is contiguous: what
            :func:`fxq.observing.histogram.sample` gives.
        low: What :func:`collect_range` says of all values, [PARTS].
        high: Likewise.
        counts: int32, [COPIES, bins]; added to, all but the bin of 0.
        power: int32 []; overwritten with the grid's power.
        counted: int64 []; overwritten with x's number of elements.
        zero: The bin that begins at 0: 0 counts magnitudes.
    """
    n, run = x.numel(), x.shape[-1]
    run_stride = x.stride(1) if x.ndim == 3 else run
    _histogram[(triton.cdiv(n, _COUNT_BLOCK),)](
        x, low, high, counts, power, counted, n, n // len(x), run, x.stride(0), run_stride,
        wide=n > _NARROW, least=LEAST_POWER, largest=LARGEST_POWER, unit=UNIT_POWER, bins=counts.shape[1],
        zero=zero, copies=COPIES, parts=PARTS, block=_COUNT_BLOCK, num_warps=8,
    )  # fmt: skip
