"""What calibration reports: marks, the table, the method that auto chose, pictures."""

from __future__ import annotations

import re

import pytest
import torch
from calibrating import batch, equal, prepared, scales
from torch import Tensor

from fxq.calibration import calibrate, solve
from fxq.errors import CalibrationError
from fxq.quantizer import Mode, quantizers


def test_marks_say_what_is_odd() -> None:
    gm = prepared("entropy")
    x, y = batch(4000)
    x[0, 0] = 1000.0
    row = calibrate(gm, [(x, y)]).rows[0]
    assert row.marks == ("outlier",)
    assert row.counted == 1.0
    rows = calibrate(gm, [(torch.zeros(4, 3), y[:4])]).rows
    assert [row.marks for row in rows] == [("all-zero",)] * 3


def test_the_report_prints_as_a_table() -> None:
    text = str(calibrate(prepared(), [batch()] * 2))
    assert text.startswith("calibrated on 2 batches")
    assert "net.relu" in text
    assert "scale" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 118


def errors_by_method(x: Tensor) -> dict[str, float]:
    """The summed squared error of quantizing x by each method's scale."""
    gm = prepared("mse")
    calibrate(gm, [(x, torch.rand(len(x), 4) + 0.5)])
    quantizer = quantizers(gm)["x"]

    def error(method: str) -> float:
        solve(gm, method)
        quantizer.mode = Mode.QUANTIZE
        try:
            return float((quantizer(x) - x).square().sum())
        finally:
            quantizer.mode = Mode.OBSERVE

    return {method: error(method) for method in ("max", "percentile", "entropy", "mse", "auto")}


def test_auto_takes_the_least_error_of_all_methods() -> None:
    errors = errors_by_method(torch.cat([torch.randn(20_000, 3), 30 * torch.randn(40, 3)]))
    assert errors["auto"] <= 1.001 * min(errors.values())
    assert errors["max"] > 1.03 * errors["auto"]


def test_auto_is_cautious_where_few_values_tell_methods_apart() -> None:
    errors = errors_by_method(torch.cat([torch.randn(2000, 3), 30 * torch.randn(4, 3)]))
    assert min(errors.values()) < errors["auto"] == errors["max"]


def test_auto_says_what_it_chose() -> None:
    gm = prepared("mse")
    calibrate(gm, [batch(500)])
    assert re.fullmatch(r"auto \((mse|entropy|percentile|max)\)", solve(gm, "auto").rows[0].method)


def test_auto_needs_histograms() -> None:
    gm = prepared("max")
    calibrate(gm, [batch()])
    before = scales(gm)
    with pytest.raises(CalibrationError, match="cannot answer the method 'auto'"):
        solve(gm, "auto")
    assert equal(scales(gm), before)


def test_saturating_tensors_are_marked() -> None:
    gm = prepared("mse")
    x, y = batch(4000)
    assert calibrate(gm, [(x, y)]).rows[0].marks == ()
    assert calibrate(gm, [(x.clamp(-0.5, 0.5), y)]).rows[0].marks == ("saturating",)


def test_dead_channels_are_marked() -> None:
    gm = prepared()
    data = [batch() for _ in range(3)]
    for x, _ in data:
        x[:, 1] = 0
    assert calibrate(gm, data).rows[0].marks == ("1 dead channel",)
    data[0][0][0, 1] = 1.0
    assert calibrate(gm, data).rows[0].marks == ()


def test_a_picture_shows_the_histogram_and_every_methods_end() -> None:
    report = calibrate(prepared("mse"), [batch(4000)])
    figure = report.plot("x")
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == ["max", "percentile", "entropy", "mse", "in"]
    heights = axes.patches[0].get_data().values
    assert heights.sum() == 12_000
    assert "100% of 12000 values" in axes.get_title()
    with pytest.raises(CalibrationError, match="no calibrated tensor is called 'z'"):
        report.plot("z")
    with pytest.raises(CalibrationError, match="has no histogram"):
        calibrate(prepared("max"), [batch()]).plot("x")
