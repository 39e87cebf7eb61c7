"""Histograms on a power-of-two grid count exactly, grow without loss, and sample by position alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fxq.observing import histogram
from fxq.observing.histogram import (
    BINS,
    LEAST_POWER,
    SAMPLE,
    bin_width,
    bins_per_unit,
    count,
    count_rows,
    grid_power,
    grow,
    sample,
)

VALUES = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def reference(x: np.ndarray, power: int, *, symmetric: bool) -> np.ndarray:
    """Counts by exact float64 arithmetic."""
    x = x.astype(np.float64)
    index = np.floor(np.abs(x) / 2.0 ** (power - 137)).astype(np.int64)
    if not symmetric:
        index = np.where(x < 0, -1 - index, index)
    return np.bincount(index + (0 if symmetric else BINS), minlength=BINS if symmetric else 2 * BINS)


def counted(x: Tensor, power: Tensor, *, symmetric: bool) -> Tensor:
    out = torch.full((BINS if symmetric else 2 * BINS,), -1)
    count(x, bins_per_unit(power), symmetric=symmetric, out=out)
    return out


@given(VALUES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_counts_equal_exact_arithmetic(symmetric: bool, x: np.ndarray) -> None:
    values = torch.from_numpy(x)
    power = grid_power(values.abs().max())
    wanted = reference(x, int(power), symmetric=symmetric)
    assert len(wanted) == (BINS if symmetric else 2 * BINS)  # everything has room
    np.testing.assert_array_equal(counted(values, power, symmetric=symmetric).numpy(), wanted)
    rows = count_rows(values[None], bins_per_unit(power)[None], symmetric=symmetric)
    np.testing.assert_array_equal(rows[0].numpy(), wanted)


@given(VALUES)
def test_the_grid_is_the_finest_with_room(x: np.ndarray) -> None:
    largest = torch.from_numpy(x).abs().max()
    power = grid_power(largest)
    width = bin_width(power)
    assert float(largest) < BINS * float(width)
    assert int(power) == LEAST_POWER or float(largest) >= BINS * float(width) / 2
    assert float(bins_per_unit(power).double() * width) == 1.0


@given(VALUES, VALUES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_growing_equals_counting_on_the_wide_grid(symmetric: bool, x: np.ndarray, y: np.ndarray) -> None:
    parts = [torch.from_numpy(x), torch.from_numpy(y)]
    powers = [grid_power(part.abs().max()) for part in parts]
    counts = [counted(part, power, symmetric=symmetric) for part, power in zip(parts, powers, strict=True)]
    total, power = grow(torch.stack(counts), torch.stack(powers), symmetric=symmetric)
    assert power == max(powers)
    wanted = counted(torch.cat(parts), power, symmetric=symmetric)
    assert torch.equal(total, wanted)


def test_growing_rows_is_growing_each() -> None:
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 100, (3, 4, BINS), generator=g)
    power = torch.randint(100, 110, (3, 4), generator=g, dtype=torch.int32)
    total, wide = grow(counts, power, symmetric=True)
    for row in range(3):
        one, one_power = grow(counts[row], power[row], symmetric=True)
        assert torch.equal(total[row], one)
        assert wide[row] == one_power
    assert torch.equal(total.sum(1), counts.sum((1, 2)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exact", [1 << 24, 64])
def test_both_ways_of_counting_agree(symmetric: bool, exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, 1000)[:, :99]
    x[x.abs() < 0.3] = 0
    x[0, :3] = torch.tensor([1e-45, -1e-45, -0.0])
    power = grid_power(x.abs().max())
    wanted = counted(x, power, symmetric=symmetric)
    assert wanted.sum() == x.numel()
    monkeypatch.setattr(histogram, "_EXACT", exact)  # with 64, in parts
    out = torch.full_like(wanted, -1)
    positions = histogram._positions(x, bins_per_unit(power), symmetric=symmetric)
    histogram._count_in_parts(positions, out, symmetric=symmetric)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("value", [0.0, 1e-45, 2.0**-126, 1.0, 2.0, 3.4e38])
def test_extremes_have_a_bin(value: float) -> None:
    x = torch.tensor([value, -value])
    counts = counted(x, grid_power(x.max()), symmetric=True)
    assert counts.sum() == 2
    assert counted(x, grid_power(x.max()), symmetric=False).sum() == 2


def test_nan_and_inf_do_not_stop_the_count() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    power = grid_power(x.max())
    assert counted(x, power, symmetric=True).sum() == 4
    assert count_rows(x[None], bins_per_unit(power)[None], symmetric=False).sum() == 4


@pytest.mark.parametrize("shape", [(4, 3, 224, 224), (4, 64, 112, 112), (4, 256, 56, 56), (4, 700_001)])
def test_a_sample_is_bounded_and_the_same_in_any_batch(shape: tuple[int, ...]) -> None:
    x = torch.arange(shape[0] * int(np.prod(shape[1:]))).reshape(shape)
    whole = sample(x)
    per_sample = whole[0].numel()
    assert 0.99 * SAMPLE <= per_sample < 2 * SAMPLE
    assert whole.data_ptr() == x.data_ptr()  # a view
    for index in range(shape[0]):
        assert torch.equal(sample(x[index : index + 1])[0], whole[index])


def test_small_samples_are_taken_whole() -> None:
    for shape in ((5,), (), (2, 3), (8, 256, 8, 8), (2, SAMPLE)):
        x = torch.randn(shape)
        assert torch.equal(sample(x).flatten(), x.flatten())


def test_sampled_positions_spread_over_rows_and_columns() -> None:
    for side in (32, 56, 64, 112, 128, 224):
        hits = torch.zeros(64 * side * side)
        hits[sample(torch.arange(64 * side * side)[None]).flatten()] = 1
        share = hits.mean()
        image = hits.view(64, side, side).mean(0)
        for line in (image.mean(0), image.mean(1)):
            assert float((line / share - 1).abs().max()) < 0.25


def test_channels_last_is_sampled_without_a_copy() -> None:
    x = torch.randn(4, 64, 56, 56).to(memory_format=torch.channels_last)
    chosen = sample(x)
    assert chosen.data_ptr() == x.data_ptr()
    physical = x.permute(0, 2, 3, 1)
    assert torch.equal(chosen, sample(physical.contiguous()))
    assert torch.equal(sample(x[1:2])[0], chosen[1])


def test_gaps_in_memory_are_copied() -> None:
    x = torch.randn(4, 8, 10, 10)[:, ::2]
    assert torch.equal(sample(x).flatten(), x.flatten())
