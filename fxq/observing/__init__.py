"""Statistics of tensors: collected, merged, and solved for ranges."""

from __future__ import annotations

from .observers import NEVER, Histogram, MinMax, MovingAverage, Observer, make_observer

__all__ = ["NEVER", "Histogram", "MinMax", "MovingAverage", "Observer", "make_observer"]
