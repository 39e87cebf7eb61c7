"""The method chooses the observer, and each answers what it can."""

from __future__ import annotations

import pytest
import torch
from observing import KINDS, spec

from fxq.errors import CalibrationError
from fxq.observing import Histogram, MinMax, MovingAverage, Observer, make_observer
from fxq.recipe import METHODS, Method


@pytest.mark.parametrize("kind", list(KINDS))
def test_given_channels_hold_from_the_start(kind: str) -> None:
    made = make_observer(spec("max"), channels=5, axis=0)
    assert made.amin.shape == (5,)
    assert KINDS[kind](0).amin.shape == (0,)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("max", MinMax),
        ("moving-average", MovingAverage),
        ("percentile", Histogram),
        ("entropy", Histogram),
        ("mse", Histogram),
        ("auto", Histogram),
    ],
)
def test_the_method_chooses_the_observer(method: str, kind: type[Observer]) -> None:
    made = make_observer(spec(method, symmetric=False), channels=None, axis=None)
    assert type(made) is kind
    made.collect(torch.randn(3, 40))
    for name in METHODS:
        if name in made.methods:
            amin, amax = made.compute(Method(name), spec(method, symmetric=False))
            assert amin <= amax
        else:
            with pytest.raises(CalibrationError, match=f"cannot answer the method '{name}'.*\n.*prepare with"):
                made.compute(Method(name), spec(method))
    assert method in made.methods
