"""The vectorized solvers give what plain loops over bins and thresholds give."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxq.observing import Histogram, thresholds
from fxq.observing.histogram import BINS
from fxq.qdq import fake_quantize
from fxq.qparams import scale_and_zero_point
from fxq.recipe import Method, QSpec

SPECS = {
    "int8": QSpec("int8", symmetric=True, granularity="per-tensor", method="entropy"),
    "uint8": QSpec("uint8", symmetric=False, granularity="per-tensor", method="entropy"),
    "int4": QSpec("int4", symmetric=True, granularity="per-tensor", method="entropy"),
    "int8 asymmetric": QSpec("int8", symmetric=False, granularity="per-tensor", method="entropy"),
    "float8": QSpec("float8_e4m3fn", symmetric=True, granularity="per-tensor", method="entropy"),
}


def data(name: str) -> Tensor:
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(20000, generator=g)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "relu6": (normal * 3).clamp(0, 6),
        "shifted": normal * 0.5 + 2,
        "negative": -normal.abs() - 0.5,
        "long tail": normal**3,
        "outlier": torch.cat([normal, torch.tensor([60.0])]),
        "sparse": normal[:50],
        "two values": torch.tensor([1.0, 3.0]).repeat(100),
    }[name]


DATA = ["normal", "relu", "relu6", "shifted", "negative", "long tail", "outlier", "sparse", "two values"]


def bins_of(x: Tensor, spec: QSpec) -> tuple[Histogram, thresholds.Bins]:
    observer = Histogram(symmetric=spec.symmetric is not False)
    observer.collect(x)
    observer.flush()
    bins = thresholds.Bins(
        counts=observer.counts[None].double(),
        width=observer.width[None],
        zero=0 if observer.symmetric else BINS,
        amin=observer.amin[None],
        amax=observer.amax[None],
    )
    return observer, bins


def loop_entropy(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """The divergence of one window, step by step as in NVIDIA's pytorch-quantization."""
    inside = counts[start:stop]
    space = np.linspace(0, stop - start, num=levels + 1)
    digitized = np.digitize(range(stop - start), space) - 1
    digitized[inside == 0] = -1
    merged = np.zeros(levels)
    for index, level in enumerate(digitized):
        if level != -1:
            merged[level] += inside[index]
    for level, filled in Counter(digitized.tolist()).items():
        if level != -1:
            merged[level] /= filled
    q = np.array([merged[level] if level != -1 else 0.0 for level in digitized])
    p = inside.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore"):
        return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", ["int8", "uint8", "int4"])
def test_entropy_equals_a_plain_loop(name: str, kind: str) -> None:
    spec = SPECS[kind]
    observer, bins = bins_of(data(name), spec)
    counts = bins.without_zeros().counts[0].numpy()
    width, zero = float(observer.width), bins.zero
    levels = {"int8": 128, "uint8": 256, "int4": 8}[kind]
    least, best = np.inf, np.inf
    step = 7  # every candidate would take minutes: the solver's own winner is checked against these and itself
    low_bin = min(int(np.floor(float(observer.amin) / width)), 0) + zero if zero else 0
    reach = float(torch.maximum(observer.amax, -observer.amin)) if not zero else float(observer.amax)
    high_bin = max(int(np.floor(reach / width)) + 1, 0) + zero

    def at(side: int) -> float:
        start, stop = max(zero - side, low_bin), min(zero + side, high_bin)
        kept = float(counts[start:stop].sum())
        if stop - start < levels or kept == 0 or counts.sum() - kept > counts.sum() / levels:
            return np.inf
        return loop_entropy(counts, start, stop, levels)

    for side in range(BINS, 127, -step):
        value = at(side)
        if value < least:
            least, best = value, side
    amin, amax = observer.compute(Method("entropy"), spec)
    if best == np.inf:
        assert (amin, amax) == (observer.amin, observer.amax)
        return
    threshold = max(-float(amin), float(amax))
    if threshold == max(-float(observer.amin), float(observer.amax)):
        found = min(at(BINS), at(round(np.ceil(threshold / width))))
    else:
        found = at(round(threshold / width))
    assert found <= least + 1e-12


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", list(SPECS))
def test_divergence_of_each_window_equals_the_loop(name: str, kind: str) -> None:
    _, bins = bins_of(data(name), SPECS[kind])
    counts = bins.without_zeros().counts
    levels = {"int8": 128, "int4": 8}.get(kind, 256)
    cells = torch.arange(levels + 1, dtype=torch.float64) / levels
    starts = torch.tensor([[bins.zero] * 5 + [max(0, bins.zero - 700)]])
    stops = starts + torch.tensor([[levels, 300, 999, 1500, 2048, 1300]])
    found = thresholds._divergence(counts, starts, stops, cells)[0]
    for index in range(6):
        start, stop = int(starts[0, index]), int(stops[0, index])
        kept = counts[0, start:stop].sum()
        if counts.sum() - kept > counts.sum() / levels or kept == 0:
            assert not bool(found[index].isfinite())
        else:
            wanted = loop_entropy(counts[0].numpy(), start, stop, levels)
            assert float(found[index]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_entropy_cuts_an_outlier_and_not_a_dense_range() -> None:
    observer, _ = bins_of(data("outlier"), SPECS["int8"])
    amax = float(observer.compute(Method("entropy"), SPECS["int8"])[1])
    assert 3 < amax < 6
    uniform, _ = bins_of(torch.rand(50000), SPECS["int8"])
    assert float(uniform.compute(Method("entropy"), SPECS["int8"])[1]) > 0.98


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("share", [99.0, 99.9, 60.0])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_percentile_is_within_a_bin_of_the_sorted_values(name: str, share: float, kind: str) -> None:
    x = data(name)
    observer, _ = bins_of(x, SPECS[kind])
    amin, amax = observer.compute(Method("percentile", percentile=share), SPECS[kind])
    width = float(observer.width)
    if kind == "int8":
        order = x.abs().double().sort().values
        exact = float(order[int(np.ceil(share / 100 * len(x) - 1e-6)) - 1])
        reached = float(torch.maximum(-amin, amax))
        assert exact <= reached + 1e-6
        assert reached <= exact + width + 1e-6
        return
    order, cut = x.double().sort().values, (100 - share) / 200
    top = float(order[int(np.ceil((1 - cut) * len(x) - 1e-6)) - 1])
    bottom = float(order[int(np.floor(cut * len(x) + 1e-6))])
    assert top <= float(amax) + 1e-6 <= top + width + 2e-6
    assert bottom >= float(amin) - 1e-6 >= bottom - width - 2e-6


def test_percentile_100_is_the_exact_range() -> None:
    x = torch.randn(3, 100_000)
    observer, _ = bins_of(x, SPECS["int8"])
    amin, amax = observer.compute(Method("percentile", percentile=100), SPECS["int8"])
    assert (amin, amax) == (x.min(), x.max())


def expected_error(bins: thresholds.Bins, spec: QSpec, share: float) -> float:
    """The squared error over the histogram by sampling 64 points in each bin and quantizing them."""
    points = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    edges = (torch.arange(bins.counts.shape[1]) - bins.zero) * bins.width[0]
    x = edges[:, None] + points * bins.width[0]
    t = float(bins.reach[0]) * share
    low = torch.clamp(bins.amin[0], min=-t)
    scale, zero_point = scale_and_zero_point(low, torch.maximum(low, torch.clamp(bins.amax[0], max=t)), spec)
    error = (fake_quantize(x, scale, zero_point, None, spec.qdtype.name) - x) ** 2
    return float((error.mean(1) * bins.counts[0]).sum())


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", list(SPECS))
def test_expected_error_equals_quantizing_points_of_each_bin(name: str, kind: str) -> None:
    spec = SPECS[kind]
    _, bins = bins_of(data(name), spec)
    shares = torch.tensor([1.0, 0.83, 0.5, 0.21], dtype=torch.float64)
    found = thresholds._expected_error(bins, shares, spec)[0]
    for share, error in zip(shares.tolist(), found.tolist(), strict=True):
        assert error == pytest.approx(expected_error(bins, spec, share), rel=0.02)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", list(SPECS))
def test_mse_is_as_good_as_any_threshold_on_the_data_itself(name: str, kind: str) -> None:
    spec, x = SPECS[kind], data(name)
    observer, bins = bins_of(x, spec)
    if spec.symmetric:
        x = x.abs()  # a histogram of magnitudes knows no qmin

    def error(amin: Tensor, amax: Tensor) -> float:
        scale, zero_point = scale_and_zero_point(amin, amax, spec)
        return float(((fake_quantize(x, scale, zero_point, None, spec.qdtype.name) - x).double() ** 2).mean())

    shares = torch.linspace(0.01, 1, 100)
    best = min(error(low, high) for low, high in zip(*bins.within(shares * bins.reach), strict=True))
    found = error(*observer.compute(Method("mse"), spec))
    floor = (float(observer.width) / 8) ** 2 / 12  # what the histogram cannot resolve
    assert found <= best * (1.15 if name == "sparse" else 1.06) + floor


def test_int8_mse_of_a_normal_is_where_theory_puts_it() -> None:
    x = torch.randn(4_000_000)  # the optimal clip of 256 levels of a normal is 3.92 sigma
    observer, _ = bins_of(x, SPECS["int8"])
    amax = float(observer.compute(Method("mse"), SPECS["int8"])[1])
    assert 3.7 < amax < 4.2


def test_zeros_do_not_steer() -> None:
    dense = torch.randn(20000).relu()
    padded = torch.cat([dense, torch.zeros(200_000)])
    for method in ("entropy", "mse"):
        ranges = [bins_of(x, SPECS["int8"])[0].compute(Method(method), SPECS["int8"]) for x in (dense, padded)]
        assert ranges[0] == ranges[1]


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize("factor", [2.0**-70, 0.25, 2.0**60])
def test_powers_of_two_scale_exactly(method: str, kind: str, factor: float) -> None:
    spec = SPECS[kind]
    x = data("long tail")
    one = bins_of(x, spec)[0].compute(Method(method), spec)
    other = bins_of(x * factor, spec)[0].compute(Method(method), spec)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a * factor, b)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_other_factors_scale_within_a_step_of_the_search(method: str, kind: str) -> None:
    spec, x = SPECS[kind], data("normal")
    one = float(bins_of(x, spec)[0].compute(Method(method), spec)[1])
    other = float(bins_of(x * 1.7, spec)[0].compute(Method(method), spec)[1])
    assert other / 1.7 == pytest.approx(one, rel=0.1 if method == "entropy" else 0.05)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("kind", list(SPECS))
def test_channels_are_solved_as_if_alone(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[kind]
    rows = [data(name)[:200].repeat(4)[:200] for name in DATA]
    together = Histogram(symmetric=spec.symmetric is not False, axis=1)
    together.collect(torch.stack(rows, 1))
    monkeypatch.setattr(thresholds, "_CHUNK", 1)  # one channel at a time must not change anything either
    split = together.compute(Method(method), spec)
    monkeypatch.undo()
    amin, amax = together.compute(Method(method), spec)
    assert torch.equal(split[0], amin)
    assert torch.equal(split[1], amax)
    for index, row in enumerate(rows):
        alone = bins_of(row, spec)[0].compute(Method(method), spec)
        assert (amin[index], amax[index]) == alone


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize("values", [[0.0] * 9, [3.0] * 9, [-2.0] * 9, [1e-40] * 9, [3e38, -3e38], [1.0]])
def test_degenerate_data_keeps_its_range(method: str, kind: str, values: list[Any]) -> None:
    spec = SPECS[kind]
    x = torch.tensor(values)
    observer, _ = bins_of(x, spec)
    amin, amax = observer.compute(Method(method), spec)
    assert x.min() <= amin <= amax <= x.max()
    reach = float(torch.maximum(amin.abs(), amax.abs()))
    assert reach == pytest.approx(float(x.abs().max()), rel=2e-3)
    scale_and_zero_point(amin, amax, spec)


def loop_least(bins: thresholds.Bins, ends: list[tuple[Tensor, Tensor]], spec: QSpec) -> int:
    """The widest way whose error is within two standard errors of the least, value by value of the histogram."""
    middle = (torch.arange(bins.counts.shape[1]) - bins.zero + 0.5) * bins.width[0]
    filled = bins.counts[0] > 0
    x, count = middle[filled].repeat_interleave(64), bins.counts[0][filled].repeat_interleave(64) / 64
    x = x + ((torch.arange(64) + 0.5) / 64 - 0.5).repeat(int(filled.sum())) * bins.width[0]
    per_bin = []
    for low, high in ends:
        error = (fake_quantize(x, *scale_and_zero_point(low, high, spec), None, spec.qdtype.name) - x) ** 2
        per_bin.append((error * count).view(-1, 64).sum(1) / bins.counts[0][filled])
    weight = bins.counts[0][filled]
    best = min(range(len(ends)), key=lambda k: float((per_bin[k] * weight).sum()))
    chosen, widest = best, -1.0
    for k, (low, high) in enumerate(ends):
        more = per_bin[k] - per_bin[best]
        told = float((more * weight).sum()) > 2 * float((more**2 * weight).sum()) ** 0.5
        if not told and float(high - low) > widest:
            chosen, widest = k, float(high - low)
    return chosen


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", list(SPECS))
def test_the_least_error_equals_a_loop_over_values(name: str, kind: str) -> None:
    spec = SPECS[kind]
    chosen = set()
    for count in (50, 500, 20000):
        bins = bins_of(data(name)[:count], spec)[1].without_zeros()
        ends = [bins.within(share * bins.reach) for share in (1.0, 0.97, 0.9, 0.7, 0.4)]
        low, high = (torch.stack(side, dim=1) for side in zip(*ends, strict=True))
        found = thresholds.least_error(bins, low, high, spec)
        assert found == loop_least(bins, [(lo[0], hi[0]) for lo, hi in ends], spec)
        chosen.add(found)
    if name == "normal" and kind == "int4":
        assert len(chosen) > 1  # more values tell more apart


def test_one_way_is_chosen_for_all_channels_together() -> None:
    spec = SPECS["int4"]
    rows = torch.stack([torch.randn(20000), torch.randn(20000) ** 3], dim=1)
    observer = Histogram(symmetric=True, axis=1)
    observer.collect(rows)
    observer.flush()
    bins = observer._bins().without_zeros()
    ends = [bins.within(share * bins.reach) for share in (1.0, 0.25)]
    low, high = (torch.stack(side, dim=1) for side in zip(*ends, strict=True))
    errors = thresholds.squared_error(bins, low, high, spec)
    assert errors[0, 0] < errors[0, 1]  # the first channel alone would take all
    assert errors[1, 0] > errors[1, 1]
    assert thresholds.least_error(bins, low, high, spec) == int(errors.sum(dim=0).argmin()) == 1
