"""The observer that counts values in a histogram, from which thresholds are solved afterwards."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..recipe import Method, QSpec
from . import histogram, thresholds
from .base import RING, Observer
from .histogram import BINS, LEAST_POWER

__all__ = ["Histogram"]

_BY_HISTOGRAM: Final = {
    "percentile": thresholds.percentile,
    "entropy": thresholds.entropy,
    "mse": thresholds.mse,
}


class Histogram(Observer):
    """A histogram of the values, or of their magnitudes for symmetric specs, beside the exact minimum and
    maximum.

    The grid (:mod:`fxq.observing.histogram`) is the finest that has room for the largest magnitude so far. It grows
    without losing counts, so the result depends on neither batch sizes nor order nor merges.

    Per tensor, those elements are counted that :func:`fxq.observing.histogram.sample` chooses; per channel, all.

    Args:
        symmetric: Whether to count magnitudes.
        channels: As for :class:`Observer`.
        axis: As for :class:`Observer`.

    Attributes:
        counts: int64, [BINS] or [channels, BINS]; twice as many bins if two-sided.
        power: The grid, int32 [] or [channels].
        elements: How many elements were seen, counted or not, int64 [].
    """

    counts: Tensor
    power: Tensor
    elements: Tensor
    _recent_counts: Tensor
    _recent_counted: Tensor
    _recent_power: Tensor

    def __init__(self, *, symmetric: bool, channels: int | None = None, axis: int | None = None) -> None:
        super().__init__(channels=channels, axis=axis)
        self.symmetric = symmetric
        self._elements = 0
        bins = BINS if symmetric else 2 * BINS
        shape = self.amin.shape
        self.register_buffer("counts", torch.zeros(*shape, bins, dtype=torch.int64))
        self.register_buffer("power", torch.full(shape, LEAST_POWER, dtype=torch.int32))
        self.register_buffer("elements", torch.zeros((), dtype=torch.int64))
        for name in ("counts", "counted", "power"):
            self.register_buffer(f"_recent_{name}", torch.empty(0), persistent=False)

    def _make_ring(self) -> None:
        device, bins, kernels = self.counts.device, self.counts.shape[-1], self._kernels
        shape, dtype = [RING, bins], torch.int64
        if kernels is not None:
            shape, dtype = [RING, kernels.COPIES, bins], torch.int32
        with torch.inference_mode(mode=False):  # as in the base
            self._recent_counts = torch.zeros(shape, dtype=dtype, device=device)
            self._recent_counted = torch.zeros(RING, dtype=torch.int64, device=device)
            self._recent_power = torch.zeros(RING, dtype=torch.int32, device=device)
        super()._make_ring()

    def _views(self) -> list[tuple[Tensor, ...]]:
        own = (t.unbind() for t in (self._recent_counts, self._recent_counted, self._recent_power))
        return [(*ends, *more) for ends, *more in zip(super()._views(), *own, strict=True)]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the calibration methods that these statistics can answer."""
        return ("max", *_BY_HISTOGRAM, "auto")

    @property
    def _zero(self) -> int:
        """The bin that begins at 0."""
        return 0 if self.symmetric else BINS

    @property
    def fraction(self) -> float:
        """The share of the seen elements that were counted; 1 before any."""
        self.flush()
        seen = int(self.elements)
        return int(self.counts.sum()) / seen if seen else 1.0

    @property
    def width(self) -> Tensor:
        """The width of a bin, float64, [] or [channels]."""
        self.flush()
        return histogram.bin_width(self.power)

    def _collect(self, x: Tensor, slot: int) -> None:
        super()._collect(x, slot)
        low, high, counts, counted, power = self._slots[slot]
        self._elements += x.numel()
        kernels = self._kernels
        if kernels is not None:
            chosen = histogram.sample(x)
            kernels.collect_histogram(chosen, low, high, counts, power, counted, zero=self._zero)
            return
        grid = histogram.grid_power(torch.maximum(low.neg(), high))
        per_unit = histogram.bins_per_unit(grid)
        if self.axis is None:
            power.copy_(grid)
            chosen = histogram.sample(x)
            histogram.count(chosen, per_unit, symmetric=self.symmetric, out=counts)
            return
        rows = x.movedim(self.axis, 0).flatten(1)
        self._add(histogram.count_rows(rows, per_unit, symmetric=self.symmetric).unsqueeze(1), grid.unsqueeze(1))

    def _fold(self, rows: Tensor) -> None:
        super()._fold(rows)
        self.elements += self._elements
        self._elements = 0
        if self.axis is None:
            count = rows.shape[1]
            counts = self._recent_counts[:count]
            if counts.ndim == 3:  # of copies, without the bin of 0
                counts = counts.sum(dim=1)
                counts[:, self._zero] += self._recent_counted[:count] - counts.sum(dim=1)
                self._recent_counts.zero_()
            self._add(counts, self._recent_power[:count])

    def _add(self, counts: Tensor, power: Tensor) -> None:
        """Add n histograms, [n, bins] or [channels, n, bins], with `power` [n] or [channels, n], growing as
        needed.
        """
        counts = torch.cat([self.counts.unsqueeze(-2), counts], dim=-2)
        power = torch.cat([self.power.unsqueeze(-1), power], dim=-1)
        counts, power = histogram.grow(counts, power, symmetric=self.symmetric)
        self.counts.copy_(counts)
        self.power.copy_(power)

    def _merge(self, other: Any) -> None:
        if other.symmetric != self.symmetric:
            raise CalibrationError(
                "cannot merge a symmetric and an asymmetric histogram",
                hint="give tensors that share a scale the same spec",
            )
        device = self.amin.device
        super()._merge(other)
        self.elements += other.elements.to(device)
        self._add(other.counts.unsqueeze(-2).to(device), other.power.unsqueeze(-1).to(device))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._elements = 0
        self._recent_counts.zero_()
        self.counts.zero_()
        self.power.fill_(LEAST_POWER)
        self.elements.zero_()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._elements = 0
        super()._load_from_state_dict(*args)

    def _compute(self, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:
        if method.name == "auto":
            _, amin, amax = self.best(spec)
            return amin, amax
        if method.name == "max":
            return super()._compute(method, spec)
        return self._shaped(*_BY_HISTOGRAM[method.name](self._bins(), method, spec))

    def _shaped(self, amin: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
        """A solver's [C] ranges as the statistics have them."""
        device = self.amin.device
        return amin.to(device).reshape(self.amin.shape), amax.to(device).reshape(self.amax.shape)

    def best(self, spec: QSpec) -> tuple[Method, Tensor, Tensor]:
        """The method whose ranges give the least squared quantization error over all that was counted, and the range.

        Of methods that so many values cannot tell apart it is the one with the widest ranges: see
        :func:`fxq.observing.thresholds.least_error`.

        Args:
            spec: A complete spec, the one the observer was made for.

        Returns:
            The method, and as :meth:`compute` gives them amin and amax.
        """
        self.flush()
        bins = self._bins()
        methods = [Method(name) for name in ("mse", "entropy", "percentile")]
        ranges = [_BY_HISTOGRAM[m.name](bins, m, spec) for m in methods] + [(bins.amin, bins.amax)]
        low, high = (torch.stack(ends, dim=1) for ends in zip(*ranges, strict=True))
        index = thresholds.least_error(bins.without_zeros(), low, high, spec)
        return [*methods, Method("max")][index], *self._shaped(low[:, index], high[:, index])

    def _bins(self) -> thresholds.Bins:
        return thresholds.Bins(
            counts=self.counts.cpu().double().reshape(-1, self.counts.shape[-1]),
            width=self.width.cpu().reshape(-1),
            zero=self._zero,
            amin=self.amin.cpu().reshape(-1),
            amax=self.amax.cpu().reshape(-1),
        )
