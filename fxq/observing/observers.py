"""What calibration remembers of a tensor: statistics that can be collected, merged, and solved afterwards.

Each kind has a room of its own; here they are chosen.
"""

from __future__ import annotations

from ..recipe import QSpec
from .base import NEVER, Observer
from .histogram_observer import Histogram
from .moving_average import MovingAverage

__all__ = ["NEVER", "Histogram", "MinMax", "MovingAverage", "Observer", "make_observer"]


class MinMax(Observer):
    """The exact minimum and maximum."""


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
