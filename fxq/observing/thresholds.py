"""From a histogram to the range to quantize over: percentile, entropy and mean squared error.

Every solver answers for all channels at once and loops over neither bins nor candidate thresholds. Candidates
of entropy and MSE are windows [-t, t], cut to what was seen: of a one-sided tensor only the far end moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ..qparams import scale_and_zero_point
from ..recipe import Method, QDType, QSpec

__all__ = ["Bins", "entropy", "least_error", "mse", "percentile", "squared_error"]

_FIRST: Final = 128  # TensorRT's calibrators start with this many bins
_OCTAVES: Final = 10
_PER_OCTAVE: Final = 24
_CHUNK: Final = 1 << 22  # elements of a solver's temporaries
_STANDARD_ERRORS: Final = 2  # an excess of less than so many is no evidence: 95% of chance's are


@dataclass(frozen=True)
class Bins:
    """Histograms over the same number of bins, one per channel.

    Attributes:
        counts: float64, [C, B], on the host.
        width: Of one bin, float64, [C].
        zero: The bin that begins at 0: 0 in a histogram of magnitudes, B / 2 in a two-sided one.
        amin: The exact minimum, float32, [C].
        amax: The exact maximum, float32, [C].
    """

    counts: Tensor
    width: Tensor
    zero: int
    amin: Tensor
    amax: Tensor

    @property
    def reach(self) -> Tensor:
        """The largest magnitude, float64, [C]."""
        return torch.maximum(self.amin.abs(), self.amax.abs()).double()

    def within(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The seen range cut to [-threshold, threshold], float32, of the threshold's shape [..., C]."""
        t = threshold.float()
        low = torch.maximum(self.amin, -t)
        return low, torch.maximum(low, torch.minimum(self.amax, t))

    def without_zeros(self) -> Bins:
        """A copy where the bin of 0 counts no more than the bins beside it.

        Zeros quantize without error, so the heap of them that a ReLU leaves must not steer a threshold.
        """
        counts = self.counts.clone()
        near = counts[:, self.zero + 1]
        if self.zero:
            near = torch.maximum(near, counts[:, self.zero - 1])
        counts[:, self.zero] = torch.minimum(counts[:, self.zero], near)
        return replace(self, counts=counts)

    def channels(self, count: int) -> list[Bins]:
        """These histograms in groups of `count` channels."""
        parts = zip(*(torch.split(t, count) for t in (self.counts, self.width, self.amin, self.amax)), strict=True)
        return [Bins(counts, width, self.zero, amin, amax) for counts, width, amin, amax in parts]


def percentile(bins: Bins, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The range that holds a share of the values, to the outer edge of a bin.

    For magnitudes the share is that of ``|x| <= t``; of a two-sided histogram half of the rest is cut at each
    end.

    Args:
        bins: The histograms.
        method: Its ``percentile``; 100 gives the exact range.
        spec: Not read.

    Returns:
        amin and amax, float32, [C].
    """
    if method.percentile == 100:
        return bins.amin.clone(), bins.amax.clone()
    below = bins.counts.cumsum(dim=1)
    total = below[:, -1:]
    cut = (1 - method.percentile / 100) / (2 if bins.zero else 1)
    # A count is a whole number: the tolerance only keeps 0.9999 * 10000 from becoming 9999.000000000002.
    upper = torch.searchsorted(below, total * (1 - cut) - 1e-6).clamp_(max=below.shape[1] - 1)
    amax = ((upper[:, 0] + 1 - bins.zero) * bins.width).float()
    if not bins.zero:
        return bins.within(amax)
    lower = torch.searchsorted(below, total * cut + 1e-6, right=True).clamp_(max=below.shape[1] - 1)
    amin = ((lower[:, 0] - bins.zero) * bins.width).float()
    return torch.maximum(bins.amin, amin), torch.minimum(bins.amax, amax)


def entropy(bins: Bins, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The range with the least information lost: the Kullback-Leibler calibration of TensorRT.

    For every window of whole bins (from 128 a side on) the reference is the histogram inside it, with what
    lies outside added to its end bins; the candidate is the histogram inside merged into as many cells as the
    type has levels (128 magnitudes for INT8) and spread evenly over each cell's non-empty bins. The window
    with the least KL divergence wins, of equals the widest. Beyond TensorRT's algorithm, windows that lose
    more than one level's even share of the values (1 / 128 for INT8) are left out: thinly filled histograms
    fool it. See Migacz, "8-bit Inference with TensorRT", GTC 2017.

    Args:
        bins: The histograms; see :meth:`Bins.without_zeros`.
        method: Not read.
        spec: Its type says how many levels there are.

    Returns:
        amin and amax, float32, [C]; the seen range where no window is wider than there are levels.
    """
    cells = _cells(spec.qdtype, symmetric=bins.zero == 0)
    sides = torch.arange(_FIRST, bins.counts.shape[1] - bins.zero + 1)
    step = max(1, _CHUNK // (len(sides) * len(cells)))
    side = torch.cat([_least_divergent(part, sides, cells) for part in bins.without_zeros().channels(step)])
    return bins.within(side * bins.width)


def _cells(dtype: QDType, *, symmetric: bool) -> Tensor:
    """Where each level's cell begins, and the last one ends, as shares of the window, [levels + 1]."""
    if dtype.floating:
        levels = _magnitudes(dtype)
        inner = (levels[1:] + levels[:-1]) / (2 * levels[-1])
        return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
    count = int(dtype.qmax - (0 if symmetric else dtype.qmin)) + 1
    return torch.arange(count + 1, dtype=torch.float64) / count  # exact: the count is a power of two


def _magnitudes(dtype: QDType) -> Tensor:
    """The values from 0 up that an 8-bit floating-point type holds, float64."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype.storage).double()
    return values[values.isfinite()]


def _least_divergent(bins: Bins, sides: Tensor, cells: Tensor) -> Tensor:
    """For each channel the side, in bins, of the window with the least divergence, float64, [C]; inf if none
    is valid.
    """
    edge, last = torch.floor(bins.amin / bins.width).long(), torch.floor(bins.amax / bins.width).long() + 1
    start = torch.maximum(-sides, edge.clamp(max=0)[:, None]).clamp(min=-bins.zero) + bins.zero
    if not bins.zero:
        last = torch.floor(bins.reach / bins.width).long() + 1
    stop = torch.minimum(sides, last.clamp(min=0)[:, None]) + bins.zero
    divergence = _divergence(bins.counts, start, stop, cells)
    divergence[(stop - start < len(cells) - 1) | divergence.isnan()] = torch.inf
    least, index = divergence.flip(1).min(dim=1)
    return torch.where(least.isfinite(), sides.flip(0)[index].double(), torch.inf)


def _divergence(counts: Tensor, start: Tensor, stop: Tensor, cells: Tensor) -> Tensor:
    """KL divergence of the windows [start, stop) of counts [C, B] from what `cells` levels keep of them, [C,
    K].

    With P the counts inside, outliers added to the end bins, and Q the even spread S / n over a cell's n
    non-empty bins, ``sum P log(P / Q)`` needs only the cells' sums of P and the window's sum of P log P:
    running sums give both.
    """
    edges = start[..., None] + torch.ceil((stop - start)[..., None] * cells).long()
    total = counts.sum(dim=1, keepdim=True)
    sums, filled, logs = (
        _running(counts),
        _running((counts > 0).double()),
        _running(torch.xlogy(counts, counts)),
    )
    inside = _at(sums, edges).diff(dim=-1)
    spread = inside / _at(filled, edges).diff(dim=-1).clamp_(min=1)
    own = _at(logs, stop) - _at(logs, start)
    first, last = _at(counts, start), _at(counts, (stop - 1).clamp(min=0))
    before, after = _at(sums, start), total - _at(sums, stop)
    own += torch.xlogy(first + before, first + before) - torch.xlogy(first, first)
    own += torch.xlogy(last + after, last + after) - torch.xlogy(last, last)
    kept = inside.sum(dim=-1)
    inside[..., 0] += before
    inside[..., -1] += after
    divergence = (own - torch.xlogy(inside, spread).sum(dim=-1)) / total - total.log() + kept.log()
    # No candidate: P > 0 where Q = 0, or too much lost. Q is normalized, so a window of a few values with all
    # others outside it would diverge least of all.
    impossible = ((first == 0) & (before > 0)) | ((last == 0) & (after > 0))
    impossible |= total - kept > total / (len(cells) - 1)
    return divergence.masked_fill_(impossible, torch.inf)


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... B of [C, B] values, [C, B + 1]."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[c, index[c, ...]], of the index's shape."""
    return values.gather(1, index.flatten(1).clamp(max=values.shape[1] - 1)).reshape(index.shape)


def mse(bins: Bins, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """The range with the least expected squared quantization error.

    Candidates are the seen range cut at 24 thresholds an octave, ten octaves down; their errors are those of
    :func:`squared_error`.

    Args:
        bins: The histograms; see :meth:`Bins.without_zeros`.
        method: Not read.
        spec: How the range would be quantized.

    Returns:
        amin and amax, float32, [C].
    """
    shares = torch.exp2(-torch.arange(_OCTAVES * _PER_OCTAVE + 1, dtype=torch.float64) / _PER_OCTAVE)
    step = max(1, _CHUNK // (len(shares) * bins.counts.shape[1]))
    error = torch.cat([_expected_error(part, shares, spec) for part in bins.without_zeros().channels(step)])
    return bins.within(shares[error.argmin(dim=1)] * bins.reach)  # the first of equals: the widest


def _expected_error(bins: Bins, shares: Tensor, spec: QSpec) -> Tensor:
    """The summed squared error over each histogram if its range is cut to each share of its reach, [C, K]."""
    threshold = (bins.reach[:, None] * shares).float()
    low = torch.maximum(bins.amin[:, None], -threshold)
    high = torch.maximum(low, torch.minimum(bins.amax[:, None], threshold))
    return squared_error(bins, low, high, spec)


def squared_error(bins: Bins, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
    """The expected squared quantization error, summed over each histogram.

    The error of a bin is the integral of ``(x - dequantize(quantize(x)))**2`` over it, values taken as evenly
    spread inside: rounding noise and clipping error in one exact formula, also where a step is finer than a
    bin.

    Args:
        bins: The histograms; see :meth:`Bins.without_zeros`.
        low: Where the ranges to quantize over begin, [C, K].
        high: Where they end, likewise.
        spec: How they are quantized.

    Returns:
        float64, [C, K].
    """
    return (_error_per_value(bins, low, high, spec) @ bins.counts[..., None])[..., 0]


def _error_per_value(bins: Bins, low: Tensor, high: Tensor, spec: QSpec) -> Tensor:
    """The mean squared error of a value in each bin, [C, K, B]."""
    scale, zero_point = scale_and_zero_point(low, high, spec)
    edges = torch.arange(-bins.zero, bins.counts.shape[1] - bins.zero + 1) * bins.width[:, None]
    steps = edges[:, None, :] / scale[..., None]
    integral = _error_integral(steps, zero_point[..., None], spec.qdtype)
    return integral.diff(dim=-1) * (scale.double() ** 3 / bins.width[:, None])[..., None]


def least_error(bins: Bins, low: Tensor, high: Tensor, spec: QSpec) -> int:
    """Which of K ways to take the ranges has the least squared error, as far as so many values can tell.

    Few values in a tail say little of it, and what calibration did not see lies beyond it. So of all ways whose
    error exceeds the least by no more than two standard errors of the difference, values taken as independent,
    the widest is chosen: as with the one-standard-error rule of Breiman et al. (1984), the cautious one of those
    that the data cannot tell apart. With many values that is the least error itself.

    Args:
        bins: The histograms; see :meth:`Bins.without_zeros`.
        low: Where each channel's ranges begin, [C, K].
        high: Where they end, likewise.
        spec: How they are quantized.

    Returns:
        The way's index, 0 to K - 1, for all channels together; of equals the first.
    """
    errors = _error_per_value(bins, low, high, spec)
    counts = bins.counts[..., None]
    best = int((errors @ counts).sum(dim=0).argmin())
    more = errors - errors[:, best : best + 1]
    excess, variance = ((m @ counts)[..., 0].sum(dim=0) for m in (more, more**2))
    width = (high.double() - low.double()).sum(dim=0)
    return int(width.masked_fill(excess > _STANDARD_ERRORS * variance.sqrt(), -1).argmax())


def _error_integral(steps: Tensor, zero_point: Tensor, dtype: QDType) -> Tensor:
    """The integral from 0 to `steps` of the squared error, all in units of the scale.

    Around the integer n it is ``n / 12 + (steps - n)**3 / 3``: each whole cell before adds 1 / 12. Beyond the
    last level n stays and the cube grows: the clipping error. Other grids add their cells' own integrals.
    """
    if not dtype.floating:
        nearest = torch.minimum(torch.maximum(steps.round(), dtype.qmin - zero_point), dtype.qmax - zero_point)
        return nearest / 12 + (steps - nearest) ** 3 / 3
    levels = _magnitudes(dtype)
    half = levels.diff() / 2
    before = torch.nn.functional.pad((2 * half**3 / 3).cumsum(0), (1, 0))
    nearest = torch.searchsorted(levels[:-1] + half, steps.abs())
    magnitude = before[nearest] + (steps.abs() - levels[nearest]) ** 3 / 3
    return torch.copysign(magnitude, steps)
