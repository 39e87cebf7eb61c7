"""Signal-to-quantization-noise ratio: how loud a tensor is beside the error that quantization makes in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ErrorSums", "decibels"]


def decibels(signal: float, noise: float) -> float:
    """SQNR in dB: 10 log10 of signal over noise; infinite without noise, minus infinite for noise without a signal.

    Args:
        signal: Power: sum of squares of the float values.
        noise: Power of the difference.
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


class ErrorSums:
    """How far a tensor is from the one that it should be, summed over batches in float64.

    Attributes:
        signal: Power of the wanted tensor: sum of squares.
        noise: Power of the difference.
        largest: Largest absolute difference.
    """

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = 0.0
        self._other = self._product = 0.0

    def add(self, wanted: Tensor, value: Tensor) -> None:
        """Take in one batch: two tensors of one shape on one device."""
        real, ours = wanted.double(), value.double()
        off = real - ours
        powers = torch.stack((real.square().sum(), ours.square().sum(), off.square().sum(), (real * ours).sum()))
        signal, other, noise, product = powers.tolist()
        self.signal, self._other = self.signal + signal, self._other + other
        self.noise, self._product = self.noise + noise, self._product + product
        self.largest = max(self.largest, float(off.abs().max()) if off.numel() else 0.0)

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB."""
        return decibels(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, in [-1, 1]."""
        lengths = math.sqrt(self.signal * self._other)
        return max(-1.0, min(1.0, self._product / lengths)) if lengths else float(self.signal == self._other)
