"""The exponential moving average of each batch's range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..recipe import Method, QSpec
from .base import Observer

__all__ = ["MovingAverage"]


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
