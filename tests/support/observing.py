"""Observers of every kind, fed for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxq.observing import Histogram, MinMax, MovingAverage, Observer
from fxq.recipe import Method, QSpec

KINDS: dict[str, Callable[[int | None], Observer]] = {
    "minmax": lambda axis: MinMax(axis=axis),
    "average": lambda axis: MovingAverage(0.1, axis=axis),
    "magnitudes": lambda axis: Histogram(symmetric=True, axis=axis),
    "two-sided": lambda axis: Histogram(symmetric=False, axis=axis),
}
EXACT = ["minmax", "magnitudes", "two-sided"]
"""The kinds whose statistics depend on nothing but the values that were seen."""
MAX = Method("max")


def spec(method: str = "max", *, symmetric: bool = True) -> QSpec:
    """An INT8 spec with one scale for the tensor."""
    return QSpec("int8", symmetric, "per-tensor", method)


def state(observer: Observer) -> dict[str, Tensor]:
    """The statistics without the number of batches, which a split changes."""
    return {k: v for k, v in observer.state_dict().items() if k != "batches"}


def collected(kind: str, parts: list[Tensor], axis: int | None = None) -> Observer:
    observer = KINDS[kind](axis)
    for part in parts:
        observer.collect(part)
    return observer


def same(a: Observer, b: Observer) -> None:
    for name, value in state(a).items():
        assert torch.equal(value, state(b)[name]), name
