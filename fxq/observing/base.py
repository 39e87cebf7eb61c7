"""What every observer does: collect the exact range without making the host wait, merge, and answer.

An observer lives on the device of the tensor it watches: batches go into a short ring of per-batch results, which
is folded into the statistics when it is full or when somebody looks. Whatever the split into batches, their order,
or a merge of several observers, the minimum and the maximum come out the same.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, Self

import torch
from torch import Tensor

from ..buffers import FlexibleState
from ..errors import CalibrationError
from ..recipe import Method, QSpec
from . import histogram

__all__ = ["NEVER", "RING", "Observer"]

NEVER: Final = torch.iinfo(torch.int64).max
"""The value of :attr:`Observer.bad` while all is well."""

RING: Final = 8
"""How many batches are collected before they are folded into the statistics."""


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
        self._slots: list[tuple[Tensor, ...]] = []
        self.register_buffer("amin", torch.full(shape, torch.inf))
        self.register_buffer("amax", torch.full(shape, -torch.inf))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bad", torch.full((), NEVER))
        self.register_buffer("_recent", torch.empty(0), persistent=False)

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
        if not self._slots:
            self._make_ring()
        self._collect(x, self._held)
        if self._held == 0 and self.axis is None and x.ndim in (2, 4, 5):
            self._look_at_channels(x)
        self._held += 1
        if self._held == RING:
            self.flush()

    def _collect(self, x: Tensor, slot: int) -> None:
        low, high, *_ = self._slots[slot]
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
        with torch.inference_mode(mode=False):  # buffers outlive the inference mode that calibration runs in
            self._recent = torch.empty(2, RING, *parts, *self.amin.shape, device=self.amin.device)
            self._slots = self._views()

    def _views(self) -> list[tuple[Tensor, ...]]:
        """The ring's places, one by one: the same for every batch, and a view costs a host as much as a kernel."""
        return list(zip(self._recent[0].unbind(), self._recent[1].unbind(), strict=True))

    def _resize(self, channels: int) -> None:
        """Make room for `channels` ranges where there are none yet."""
        with torch.inference_mode(mode=False):  # as above
            for name, buffer in self._buffers.items():
                if buffer is not None and 0 in buffer.shape:
                    shape = [d or channels for d in buffer.shape]
                    self._buffers[name] = torch.empty(shape, dtype=buffer.dtype, device=buffer.device)
        self.reset()
        self._make_ring()

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


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """The GPU kernels, or None where there are none."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from . import kernels

    return kernels
