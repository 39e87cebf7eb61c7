"""Signal-to-quantization-noise ratio: how loud a tensor is beside the error that quantization makes in it."""

from __future__ import annotations

import math

__all__ = ["decibels"]


def decibels(signal: float, noise: float) -> float:
    """SQNR in dB: 10 log10 of signal over noise; infinite without noise, minus infinite for noise without a signal.

    Args:
        signal: Power: sum of squares of the float values.
        noise: Power of the difference.
    """
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
