"""The moving average equals a loop over the batches, also when observers are merged."""

from __future__ import annotations

import pytest
import torch
from observing import MAX, collected, spec
from torch import Tensor

from fxq.observing import MovingAverage
from fxq.recipe import Method


def loop_average(rows: list[Tensor], momentum: float) -> tuple[float, float]:
    low, high = float(rows[0].min()), float(rows[0].max())
    for row in rows[1:]:
        low += momentum * (float(row.min()) - low)
        high += momentum * (float(row.max()) - high)
    return low, high


@pytest.mark.parametrize("count", [1, 2, 8, 9, 30])
@pytest.mark.parametrize("momentum", [0.01, 0.3, 1.0])
def test_moving_average_equals_a_loop_also_when_merged(count: int, momentum: float) -> None:
    rows = [torch.randn(4, 5) * (i + 1) for i in range(count)]
    method = Method("moving-average", momentum=momentum)
    for cut in {0, count // 2, count}:
        one, two = MovingAverage(momentum), MovingAverage(momentum)
        for row in rows[:cut]:
            one.collect(row)
        for row in rows[cut:]:
            two.collect(row)
        one.merge(two)
        low, high = one.compute(method, spec())
        assert (float(low), float(high)) == pytest.approx(loop_average(rows, momentum), rel=1e-5)
        assert one.compute(MAX, spec()) == (torch.cat(rows).min(), torch.cat(rows).max())


def test_moving_average_per_channel_is_each_channels_own() -> None:
    rows = [torch.randn(4, 3, 5) for _ in range(11)]
    together = collected("average", rows, axis=1)
    method = Method("moving-average", momentum=0.1)
    amin, amax = together.compute(method, spec())
    for c in range(3):
        alone = collected("average", [row[:, c] for row in rows]).compute(method, spec())
        torch.testing.assert_close((amin[c], amax[c]), alone, rtol=1e-6, atol=0)
