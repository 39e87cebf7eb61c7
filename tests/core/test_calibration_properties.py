"""Properties that hold for any data: of splits, orders, merges, factors and degenerate values."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from observing import EXACT, collected, same, spec

from fxq.observing import Histogram, MovingAverage, histogram, make_observer
from fxq.qdq import fake_quantize
from fxq.qparams import scale_and_zero_point
from fxq.recipe import METHODS, Method, QSpec

DATA = hnp.arrays(
    np.float32,
    st.tuples(st.integers(2, 24), st.just(3), st.integers(1, 4)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(x=DATA, cuts=st.lists(st.integers(0, 23), max_size=12), order=st.randoms(use_true_random=False))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("axis", [None, 1])
def test_any_split_and_order_gives_the_same(
    kind: str, axis: int | None, x: np.ndarray, cuts: list[int], order: random.Random
) -> None:
    whole = torch.from_numpy(x)
    parts = [p for p in torch.tensor_split(whole, sorted(c for c in cuts if c < len(whole))) if len(p)]
    order.shuffle(parts)
    same(collected(kind, parts, axis), collected(kind, [whole], axis))


@given(x=DATA, cut=st.integers(0, 23))
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("axis", [None, 1])
def test_merging_equals_collecting_all(kind: str, axis: int | None, x: np.ndarray, cut: int) -> None:
    samples = list(torch.from_numpy(x).split(1))
    one, two = collected(kind, samples[:cut], axis), collected(kind, samples[cut:], axis)
    one.merge(two)
    whole = collected(kind, samples, axis)
    same(one, whole)
    assert one.batches == len(samples)


@given(x=DATA, cuts=st.lists(st.integers(0, 24), max_size=5), data=st.data())
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("axis", [None, 1])
def test_any_partition_merges_in_any_order_to_the_same(
    kind: str, axis: int | None, x: np.ndarray, cuts: list[int], data: st.DataObject
) -> None:
    """Parts may be empty, and pairs merge in whatever order they come."""
    whole = torch.from_numpy(x)
    parts = torch.tensor_split(whole, sorted(min(cut, len(whole)) for cut in cuts))
    observers = [collected(kind, list(part.split(1)), axis) for part in parts]
    while len(observers) > 1:
        one = observers.pop(data.draw(st.integers(0, len(observers) - 1)))
        observers[data.draw(st.integers(0, len(observers) - 1))].merge(one)
    same(observers[0], collected(kind, [whole], axis))


@given(cuts=st.lists(st.integers(0, 9), max_size=4), order=st.randoms(use_true_random=False), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["magnitudes", "two-sided"])
def test_a_sampled_histogram_counts_the_same_of_any_split(
    kind: str, cuts: list[int], order: random.Random, seed: int
) -> None:
    """Which elements are counted depends on their place in a sample alone."""
    whole = torch.randn(10, 2, 700, generator=torch.Generator().manual_seed(seed))
    parts = [part for part in torch.tensor_split(whole, sorted(cuts)) if len(part)]
    order.shuffle(parts)
    with mock.patch.object(histogram, "SAMPLE", 100):
        split, at_once = collected(kind, parts), collected(kind, [whole])
        same(split, at_once)
    assert isinstance(at_once, Histogram)
    assert at_once.fraction < 0.1


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    momentum=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_moving_average_merged_in_rank_order_is_that_of_all_batches(
    lengths: list[int], momentum: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ranks = [[torch.randn(3, 4, generator=generator) for _ in range(length)] for length in lengths]
    method = Method("moving-average", momentum=momentum)
    merged, alone = MovingAverage(momentum), MovingAverage(momentum)
    for batches in ranks:
        rank = MovingAverage(momentum)
        for batch in batches:
            rank.collect(batch)
            alone.collect(batch)
        merged.merge(rank)
    torch.testing.assert_close(merged.compute(method, spec()), alone.compute(method, spec()), rtol=1e-6, atol=1e-7)


MODERATE = hnp.arrays(
    np.float32,
    st.integers(2, 300),
    elements=st.floats(-1000, 1000, width=32).map(lambda v: v if abs(v) > 2.0**-20 else 0.0),
)


@settings(max_examples=40)
@given(x=MODERATE, power=st.integers(-60, 60), symmetric=st.booleans())
@pytest.mark.parametrize("method", METHODS)
def test_powers_of_two_scale_ranges_exactly(method: str, symmetric: bool, x: np.ndarray, power: int) -> None:
    values = torch.from_numpy(x)
    low, high = solved(values, method, symmetric=symmetric)
    scaled = solved(values * 2.0**power, method, symmetric=symmetric)
    assert scaled == (low * 2.0**power, high * 2.0**power)


@given(x=MODERATE, factor=st.floats(2.0**-7, 128, width=32), symmetric=st.booleans())
@pytest.mark.parametrize("method", ["max", "percentile"])
def test_other_factors_scale_ranges_within_a_bin(method: str, symmetric: bool, x: np.ndarray, factor: float) -> None:
    values = torch.from_numpy(x)
    one = torch.stack(solved(values, method, symmetric=symmetric)) * factor
    other = torch.stack(solved(values * factor, method, symmetric=symmetric))
    width = max(factor * bin_of(values, symmetric=symmetric), bin_of(values * factor, symmetric=symmetric))
    exact = 1e-6 * float(values.abs().max()) * factor
    assert float((one - other).abs().max()) <= exact + (0 if method == "max" else width)


@settings(max_examples=40)
@given(x=MODERATE, factor=st.floats(2.0**-7, 128, width=32), symmetric=st.booleans())
def test_any_factor_leaves_the_least_error_where_it_is(symmetric: bool, x: np.ndarray, factor: float) -> None:
    """Of two ranges that are equally good either may win, so it is their errors that scale, within a bin."""
    values = torch.from_numpy(x)
    width = bin_of(values, symmetric=symmetric)
    one = solved(values, "mse", symmetric=symmetric)
    other = tuple(end / factor for end in solved(values * factor, "mse", symmetric=symmetric))
    errors = [rounding(values, *ends, symmetric=symmetric) for ends in (one, other)]
    assert abs(errors[0] ** 0.5 - errors[1] ** 0.5) <= width


def solved(x: torch.Tensor, method: str, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    made = spec(method, symmetric=symmetric)
    observer = make_observer(made, channels=None, axis=None)
    observer.collect(x)
    return observer.compute(Method(method), made)


def bin_of(x: torch.Tensor, *, symmetric: bool) -> float:
    observer = Histogram(symmetric=symmetric)
    observer.collect(x)
    return float(observer.width)


def rounding(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, *, symmetric: bool) -> float:
    """The mean squared error of quantizing over a range, of the values that are not 0."""
    made = spec("mse", symmetric=symmetric)
    scale, zero_point = scale_and_zero_point(low, high, made)
    x = x[x != 0].abs() if symmetric else x[x != 0]
    error = fake_quantize(x, scale, zero_point, None, "int8") - x
    return float(error.double().square().mean()) if len(x) else 0.0


ANY = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 30), st.just(3)),
    elements=st.floats(-(2.0**127), 2.0**127, width=32),  # of a wider range the largest level may overflow
)


@settings(max_examples=15)
@given(x=ANY, dead=st.integers(0, 3), symmetric=st.booleans())
@example(x=np.zeros((4, 3), np.float32), dead=0, symmetric=True)
@example(x=np.full((4, 3), 2.5, np.float32), dead=1, symmetric=True)
@example(x=np.full((4, 3), -1e-45, np.float32), dead=1, symmetric=True)
@example(x=np.array([[3.4e38, -3.4e38, 1e-45]], np.float32), dead=3, symmetric=True)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [None, 1])
def test_any_finite_data_has_a_range_inside_of_what_was_seen(
    method: str,
    symmetric: bool,
    axis: int | None,
    x: np.ndarray,
    dead: int,
) -> None:
    """Constants, channels of zeros, denormals and the largest float32 among them."""
    values = torch.from_numpy(x.copy())
    if dead:
        values[:, dead - 1] = 0
    made = QSpec("int8", symmetric, "per-tensor" if axis is None else "per-channel", method)
    observer = make_observer(made, channels=None, axis=axis)
    observer.collect(values)
    low, high = observer.compute(Method(method), made)
    seen = (values.amin(0), values.amax(0)) if axis == 1 else (values.min(), values.max())
    assert bool((seen[0] <= low).all() and (low <= high).all() and (high <= seen[1]).all())
    scale, zero_point = scale_and_zero_point(low, high, made)
    assert bool((scale > 0).all() and scale.isfinite().all())
    assert bool(fake_quantize(values, scale, zero_point, axis, "int8").isfinite().all())
