"""Scoring each calibration method on the same statistics."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from toys import image, lenet

import fxq
from fxq.errors import CalibrationError
from fxq.quantizer import quantizers


def test_each_method_is_solved_and_scored() -> None:
    model, x = lenet(), image(16, 1, 28, 28)
    prepared = fxq.prepare(model, x)
    fxq.calibrate(prepared, [x], progress=False)
    scales = {name: q.scale.clone() for name, q in quantizers(prepared).items()}

    def score(quantized: fx.GraphModule) -> float:
        with torch.no_grad():
            return -float((quantized(x) - model(x)).square().mean())

    found = fxq.score_methods(prepared, score, methods=("max", "mse", "percentile"), reference=0.0)
    assert list(found.scores) == ["max", "mse", "percentile"]
    for method, value in found.scores.items():  # by hand
        fxq.solve(prepared, method)
        assert value == score(fxq.convert(prepared))
    assert found.scores[found.best] == max(found.scores.values())
    assert "best" in str(found)
    assert scales.keys() == quantizers(prepared).keys()


def test_the_graph_stays_as_it_is() -> None:
    x = image(8, 1, 28, 28)
    prepared = fxq.prepare(lenet(), x)
    fxq.calibrate(prepared, [x], progress=False)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    fxq.score_methods(prepared, lambda _: 1.0, methods=("max",), batches=[x])
    assert before.keys() == prepared.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())


def test_declined() -> None:
    x = image(8, 1, 28, 28)
    prepared = fxq.prepare(lenet(), x)
    with pytest.raises(CalibrationError, match="no method"):
        fxq.score_methods(prepared, lambda _: 1.0, methods=())
    with pytest.raises(CalibrationError):
        fxq.score_methods(prepared, lambda _: 1.0)
