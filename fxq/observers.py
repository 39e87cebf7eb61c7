"""What calibration remembers of a tensor: statistics that can be collected, merged, and solved afterwards.

An observer lives on the device of the tensor it watches and never makes the host wait: batches go into a
short ring of per-batch results, which is folded into the statistics when it is full or when somebody looks.
Whatever the split into batches, their order, or a merge of several observers, the minimum, the maximum and
the histogram come out the same.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from . import histogram, thresholds
from .errors import CalibrationError
from .histogram import BINS, LEAST_POWER
from .recipe import Method, QSpec

__all__ = ["NEVER", "Histogram", "MinMax", "MovingAverage", "Observer", "make_observer"]

NEVER: Final = torch.iinfo(torch.int64).max
"""The value of :attr:`Observer.bad` while all is well."""

_RING: Final = 8
_BY_HISTOGRAM: Final = {
    "percentile": thresholds.percentile,
    "entropy": thresholds.entropy,
    "mse": thresholds.mse,
}


class FlexibleState(nn.Module):
    """A module whose buffers keep their dtype in ``half()`` and the like, and take the shapes of loaded
    state.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and buffer is not None and found.shape != buffer.shape:
                self._buffers[name] = torch.empty(found.shape, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Observer(FlexibleState):
    """Collects the exact minimum and maximum; the other observers add to it.

    The attributes are as of the last :meth:`flush`, which everything that answers a question begins with.

    Args:
        channels: How many ranges, per-channel; None takes it from the first tensor.
        axis: The per-channel axis, or None for one range in all.

    Attributes:
        amin: Smallest value so far, float32, [] or [channels]; inf before any.
        amax: Largest value so far, likewise; -inf before any.
        batches: How many tensors were collected, int64 [].
        bad: Index of the first tensor that held NaN or Inf, int64 []; the largest int64 if none did.
        shared: Whether every process of a group holds these same statistics, so that they count once.
    """

    amin: Tensor
    amax: Tensor
    batches: Tensor
    bad: Tensor
    _recent: Tensor

    def __init__(self, *, channels: int | None = None, axis: int | None = None) -> None:
        super().__init__()
        self.axis = axis
        shape = () if axis is None else (channels or 0,)
        self._held = 0
        self.shared = False
        self._alive: Tensor | None = None
        self.register_buffer("amin", torch.full(shape, torch.inf))
        self.register_buffer("amax", torch.full(shape, -torch.inf))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bad", torch.full((), NEVER))
        self.register_buffer("_recent", torch.empty(2, _RING, *shape), persistent=False)

    @property
    def _kernels(self) -> ModuleType | None:
        """The GPU kernels, if they are what collects here."""
        return _kernels(self.amin.device.type) if self.axis is None else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.flush()
        super()._apply(fn, recurse)
        self._make_ring()
        return self

    @property
    def fed(self) -> bool:
        """Whether anything was collected."""
        return self._held > 0 or int(self.batches) > 0

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the calibration methods that these statistics can answer."""
        return ("max",)

    def collect(self, x: Tensor) -> None:
        """Take in one tensor; never waits for the device.

        Args:
            x: Float, any shape; the first axis counts samples. An empty tensor says nothing and is left out.

        Raises:
            CalibrationError: x is not floating point.
        """
        if not x.is_floating_point():
            raise CalibrationError(
                f"cannot calibrate a tensor of {x.dtype}",
                hint="give this edge no spec: it holds no real values",
            )
        if x.numel() == 0:
            return
        x = x.detach()
        self._fit(x)
        self._collect(x, self._held)
        if self._held == 0 and self.axis is None and x.ndim in (2, 4, 5):
            self._look_at_channels(x)
        self._held += 1
        if self._held == _RING:
            self.flush()

    def _collect(self, x: Tensor, slot: int) -> None:
        low, high = self._recent[0, slot], self._recent[1, slot]
        if self.axis is None:
            kernels = self._kernels
            if kernels is not None:
                kernels.collect_range(histogram.dense(x), low, high)
            elif x.dtype == low.dtype:
                torch.aminmax(x, out=(low, high))
            else:
                found = x.aminmax()
                low.copy_(found.min)
                high.copy_(found.max)
            return
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        low.copy_(x.amin(others))
        high.copy_(x.amax(others))

    def _fit(self, x: Tensor) -> None:
        """Put the buffers on x's device and, per channel, give them as many rows as x has."""
        if x.device != self.amin.device:
            with torch.inference_mode(mode=False):  # buffers outlive the inference mode that calibration runs in
                self.to(x.device)
        if self.axis is None:
            return
        count = x.shape[self.axis]
        if self.amin.shape[0] == 0:
            self._resize(count)
        elif self.amin.shape[0] != count:
            raise CalibrationError(
                f"a tensor has {count} channels on axis {self.axis}, earlier ones had {self.amin.shape[0]}",
                hint="quantize this tensor per-tensor, or choose an axis whose length does not change",
            )

    def _look_at_channels(self, x: Tensor) -> None:
        """Note which channels (axis 1) are not zero throughout: a hint for people, so of few batches only."""
        alive = x.abs().amax([d for d in range(x.ndim) if d != 1]) > 0
        seen = self._alive
        same = seen is not None and (seen.shape, seen.device) == (alive.shape, alive.device)
        self._alive = alive | seen if same and seen is not None else alive

    @property
    def dead_channels(self) -> int:
        """How many channels (axis 1) were zero throughout every batch looked at: one in eight."""
        return 0 if self._alive is None else int((~self._alive).sum())

    def _make_ring(self) -> None:
        """Fit the ring, which is empty, to the statistics' shape and device; on a GPU with an axis of parts."""
        parts = () if self._kernels is None else (self._kernels.PARTS,)
        self._recent = torch.empty(2, _RING, *parts, *self.amin.shape, device=self.amin.device)

    def _resize(self, channels: int) -> None:
        """Make room for `channels` ranges where there are none yet."""
        with torch.inference_mode(mode=False):  # as above
            for name, buffer in self._buffers.items():
                if buffer is not None and 0 in buffer.shape:
                    shape = [d or channels for d in buffer.shape]
                    self._buffers[name] = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
        self.reset()

    def flush(self) -> None:
        """Fold the ring of recent batches into the statistics."""
        if self._held:
            rows = self._recent[:, : self._held]
            if rows.ndim > self.amin.ndim + 2:  # of parts
                rows = torch.stack([rows[0].amin(dim=-1), rows[1].amax(dim=-1)])
            self._fold(rows)
            self.batches += self._held
            self._held = 0

    def _fold(self, rows: Tensor) -> None:
        """Fold the [2, n, ...] minima and maxima of n batches into the statistics."""
        low, high = rows
        bad = ~(low.isfinite() & high.isfinite()).reshape(len(low), -1).all(dim=1)
        index = self.batches + torch.arange(len(low), device=low.device)
        torch.minimum(self.bad, torch.where(bad, index, NEVER).amin(), out=self.bad)
        torch.minimum(self.amin, low.amin(dim=0), out=self.amin)
        torch.maximum(self.amax, high.amax(dim=0), out=self.amax)

    def merge(self, other: Observer) -> None:
        """Take in what `other` collected, as if it had come after what this one did.

        Raises:
            CalibrationError: The two are of different kinds or shapes.
        """
        if type(other) is not type(self) or other.axis != self.axis:
            raise CalibrationError(
                f"cannot merge {other} into {self}",
                hint="give tensors that share a scale one calibration method",
            )
        if not other.fed:
            return
        self.flush()
        other.flush()
        if self.axis is not None and self.amin.shape[0] == 0:
            self._resize(other.amin.shape[0])
        if self.amin.shape != other.amin.shape:
            raise CalibrationError(f"cannot merge ranges of {len(other.amin)} channels into {len(self.amin)}")
        self._merge(other)

    def _merge(self, other: Any) -> None:
        device = self.amin.device
        torch.minimum(self.amin, other.amin.to(device), out=self.amin)
        torch.maximum(self.amax, other.amax.to(device), out=self.amax)
        torch.minimum(self.bad, other.bad.to(device), out=self.bad)
        self.batches += other.batches.to(device)

    def reset(self) -> None:
        """Forget everything."""
        self._held = 0
        self.shared = False
        self._alive = None
        self.amin.fill_(torch.inf)
        self.amax.fill_(-torch.inf)
        self.batches.zero_()
        self.bad.fill_(NEVER)

    def compute(self, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:
        """The range to quantize over.

        Args:
            method: How to take it; see :attr:`methods` for what these statistics can answer.
            spec: A complete spec, the one the observer was made for.

        Returns:
            amin and amax, float32, [] or [channels], on the statistics' device.

        Raises:
            CalibrationError: Nothing was collected, or these statistics cannot answer the method.
        """
        if not self.fed:
            raise CalibrationError("nothing was collected", hint="run fxq.calibrate with batches that reach it")
        if method.name not in self.methods:
            raise CalibrationError(
                f"{type(self).__name__} statistics cannot answer the method {method.name!r}",
                hint=f"solve with {' or '.join(self.methods)}, or prepare with QSpec(method={method.name!r})",
            )
        self.flush()
        return self._compute(method, spec)

    def _compute(self, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:
        return self.amin.clone(), self.amax.clone()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.flush()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._held = 0
        super()._load_from_state_dict(*args)
        self._make_ring()

    def extra_repr(self) -> str:
        """The axis, for printed modules."""
        return "" if self.axis is None else f"axis={self.axis}"


class MinMax(Observer):
    """The exact minimum and maximum."""


class MovingAverage(Observer):
    """The exponential moving average of each batch's minimum and maximum, beside the exact ones.

    The average starts at the first batch, as in Jacob et al. (2018). It is held as a decayed sum and the
    first batch, so that merged observers give what one that saw all batches in that order would give.

    Args:
        momentum: The weight of the newest batch, in (0, 1].
        channels: As for :class:`Observer`.
        axis: As for :class:`Observer`.

    Attributes:
        total: Sum over batches of ``momentum * (1 - momentum)**age * (min, max)``, float64, [2] or [2,
            channels].
        first: Minimum and maximum of the first batch, float64, likewise; NaN before any.
    """

    total: Tensor
    first: Tensor

    def __init__(self, momentum: float, *, channels: int | None = None, axis: int | None = None) -> None:
        super().__init__(channels=channels, axis=axis)
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(2, *self.amin.shape, dtype=torch.float64))
        self.register_buffer("first", torch.full_like(self.total, torch.nan))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the calibration methods that these statistics can answer."""
        return ("max", "moving-average")

    def _fold(self, rows: Tensor) -> None:
        super()._fold(rows)
        count = rows.shape[1]
        keep = 1 - self.momentum
        age = torch.arange(count - 1, -1, -1, dtype=torch.float64, device=rows.device)
        total = torch.einsum("kn...,n->k...", rows.double(), self.momentum * keep**age)
        self._append(total, rows[:, 0], keep**count)

    def _append(self, total: Tensor, first: Tensor, decay: float | Tensor) -> None:
        self.total.mul_(decay).add_(total)
        torch.where(self.first.isnan(), first.double(), self.first, out=self.first)

    def _merge(self, other: Any) -> None:
        device = self.amin.device
        decay = (1 - self.momentum) ** other.batches.to(device)
        super()._merge(other)
        self._append(other.total.to(device), other.first.to(device), decay)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.total.zero_()
        self.first.fill_(torch.nan)

    def _compute(self, method: Method, spec: QSpec) -> tuple[Tensor, Tensor]:
        if method.name == "max":
            return super()._compute(method, spec)
        average = self.total + (1 - self.momentum) ** self.batches * self.first
        return average[0].float(), average[1].float()


class Histogram(Observer):
    """A histogram of the values, or of their magnitudes for symmetric specs, beside the exact minimum and
    maximum.

    The grid (:mod:`fxq.histogram`) is the finest that has room for the largest magnitude so far. It grows
    without losing counts, so the result depends on neither batch sizes nor order nor merges.

    Per tensor, those elements are counted that :func:`fxq.histogram.sample` chooses; per channel, all.

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
        self._make_ring()

    def _make_ring(self) -> None:
        super()._make_ring()
        device, bins, kernels = self.counts.device, self.counts.shape[-1], self._kernels
        shape, dtype = [_RING, bins], torch.int64
        if kernels is not None:
            shape, dtype = [_RING, kernels.COPIES, bins], torch.int32
        self._recent_counts = torch.zeros(shape, dtype=dtype, device=device)
        self._recent_counted = torch.zeros(_RING, dtype=torch.int64, device=device)
        self._recent_power = torch.zeros(_RING, dtype=torch.int32, device=device)

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
        low, high = self._recent[0, slot], self._recent[1, slot]
        self._elements += x.numel()
        kernels = self._kernels
        if kernels is not None:
            counts, power = self._recent_counts[slot], self._recent_power[slot]
            counted = self._recent_counted[slot]
            chosen = histogram.sample(x)
            kernels.collect_histogram(chosen, low, high, counts, power, counted, zero=self._zero)
            return
        power = histogram.grid_power(torch.maximum(low.neg(), high))
        per_unit = histogram.bins_per_unit(power)
        if self.axis is None:
            self._recent_power[slot] = power
            chosen = histogram.sample(x)
            histogram.count(chosen, per_unit, symmetric=self.symmetric, out=self._recent_counts[slot])
            return
        rows = x.movedim(self.axis, 0).flatten(1)
        self._add(histogram.count_rows(rows, per_unit, symmetric=self.symmetric).unsqueeze(1), power.unsqueeze(1))

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
            method = self.best(spec)
        if method.name == "max":
            return super()._compute(method, spec)
        device = self.amin.device
        amin, amax = _BY_HISTOGRAM[method.name](self._bins(), method, spec)
        return amin.to(device).reshape(self.amin.shape), amax.to(device).reshape(self.amax.shape)

    def best(self, spec: QSpec) -> Method:
        """The method whose ranges give the least squared quantization error over all that was counted.

        Args:
            spec: A complete spec, the one the observer was made for.
        """
        self.flush()
        bins = self._bins()
        methods = [Method(name) for name in ("mse", "entropy", "percentile")]
        ranges = [_BY_HISTOGRAM[m.name](bins, m, spec) for m in methods] + [(bins.amin, bins.amax)]
        low, high = (torch.stack(ends, dim=1) for ends in zip(*ranges, strict=True))
        error = thresholds.squared_error(bins.without_zeros(), low, high, spec).sum(dim=0)
        return [*methods, Method("max")][int(error.argmin())]

    def _bins(self) -> thresholds.Bins:
        return thresholds.Bins(
            counts=self.counts.cpu().double().reshape(-1, self.counts.shape[-1]),
            width=self.width.cpu().reshape(-1),
            zero=self._zero,
            amin=self.amin.cpu().reshape(-1),
            amax=self.amax.cpu().reshape(-1),
        )


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """The GPU kernels, or None where there are none."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from . import observer_kernels

    return observer_kernels


def make_observer(spec: QSpec, *, channels: int | None, axis: int | None) -> Observer:
    """The observer that collects what the spec's method needs.

    ``max`` gives :class:`MinMax`, ``moving-average`` :class:`MovingAverage`, the others :class:`Histogram`,
    which all but ``moving-average`` can be solved from.

    Args:
        spec: A complete spec.
        channels: How many ranges, per-channel; None takes it from the first tensor.
        axis: The per-channel axis, or None for one range in all.
    """
    method = spec.calibration
    if method.name == "max":
        return MinMax(channels=channels, axis=axis)
    if method.name == "moving-average":
        return MovingAverage(method.momentum, channels=channels, axis=axis)
    return Histogram(symmetric=spec.symmetric is not False, channels=channels, axis=axis)
