"""Observers remember the same whatever the split, the order or the merge, and never wait for the device."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from fxq.errors import CalibrationError
from fxq.histogram import BINS, SAMPLE
from fxq.observers import NEVER, Histogram, MinMax, MovingAverage, Observer, make_observer
from fxq.recipe import METHODS, Method, QSpec

KINDS: dict[str, Callable[[int | None], Observer]] = {
    "minmax": lambda axis: MinMax(axis=axis),
    "average": lambda axis: MovingAverage(0.1, axis=axis),
    "magnitudes": lambda axis: Histogram(symmetric=True, axis=axis),
    "two-sided": lambda axis: Histogram(symmetric=False, axis=axis),
}
EXACT = ["minmax", "magnitudes", "two-sided"]
MAX = Method("max")


def spec(method: str = "max", *, symmetric: bool = True) -> QSpec:
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


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_range_is_exact(kind: str, axis: int | None) -> None:
    parts = [torch.randn(6, 4, 5) * 10**i for i in (-3, 0, 2, -2)]
    amin, amax = collected(kind, parts, axis).compute(MAX, spec())
    whole = torch.stack(parts)
    if axis is None:
        assert (amin, amax) == (whole.min(), whole.max())
        assert amin.shape == ()
        return
    others = [d for d in range(4) if d != (axis % 3) + 1]
    assert torch.equal(amin, whole.amin(others))
    assert torch.equal(amax, whole.amax(others))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 5).to(dtype)
    one, other = collected(kind, [x]), collected(kind, [x.float()])
    same(one, other)
    assert one.amin.dtype == torch.float32


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_first_bad_batch_is_remembered(kind: str) -> None:
    good = torch.randn(2, 5)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for index in (0, 5, 8, 13):
            parts = [good.clone() for _ in range(20)]
            parts[index][1, 2] = bad
            parts[17][0, 0] = torch.nan
            observer = collected(kind, parts)
            observer.flush()
            assert observer.bad == index
    assert collected(kind, [good] * 9).bad == NEVER


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 1])
def test_state_loads_into_a_fresh_observer_and_goes_on(kind: str, axis: int | None) -> None:
    parts = [torch.randn(2, 3, 4) * i for i in range(13)]
    saved = collected(kind, parts[:7], axis).state_dict()
    assert all(isinstance(v, Tensor) for v in saved.values())
    fresh = KINDS[kind](axis)
    fresh.collect(torch.randn(2, 3, 4))  # what loading must wipe out
    fresh.load_state_dict(saved, strict=True)
    for part in parts[7:]:
        fresh.collect(part)
    whole = collected(kind, parts, axis)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 1])
def test_reset_forgets_everything(kind: str, axis: int | None) -> None:
    parts = [torch.randn(2, 3, 4) for _ in range(11)]
    observer = collected(kind, [p * 100 for p in parts], axis)
    observer.reset()
    assert not observer.fed
    for part in parts:
        observer.collect(part)
    same(observer, collected(kind, parts, axis))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 1])
def test_statistics_outlive_inference_mode(kind: str, axis: int | None) -> None:
    observer = KINDS[kind](axis)
    with torch.inference_mode():
        for _ in range(9):
            observer.collect(torch.randn(2, 3, 4))
        observer.flush()
    assert not any(buffer.is_inference() for buffer in observer.buffers())
    observer.collect(torch.randn(2, 3, 4))  # outside, in place
    twin = copy.deepcopy(observer)
    same(twin, observer)
    twin.collect(torch.full((2, 3, 4), 1e3))
    assert observer.compute(MAX, spec())[1].max() < 1e3


@pytest.mark.parametrize("kind", list(KINDS))
def test_casting_a_model_keeps_statistics_whole(kind: str) -> None:
    observer = collected(kind, [torch.randn(2, 5) * 1e6])
    before = {k: v.clone() for k, v in observer.state_dict().items()}
    observer.half().double()
    for name, value in observer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_histogram_counts_what_it_samples_and_says_how_much() -> None:
    small, large = torch.randn(4, 1000), torch.randn(4, 8 * SAMPLE)
    observer = Histogram(symmetric=True)
    assert observer.fraction == 1
    observer.collect(small)
    assert observer.fraction == 1
    assert observer.counts.sum() == 4000
    observer.collect(large)
    observer.flush()
    assert observer.elements == small.numel() + large.numel()
    assert observer.counts.sum() - 4000 == pytest.approx(4 * SAMPLE, rel=0.05)
    assert observer.fraction == int(observer.counts.sum()) / (4000 + 32 * SAMPLE)


def test_an_outlier_outside_the_sample_still_is_the_maximum() -> None:
    x = torch.randn(1, 8 * SAMPLE)
    x[0, 200] = 1e4  # position 200 of a period of 257 is not sampled
    observer = collected("magnitudes", [x])
    assert observer.compute(MAX, spec())[1] == 1e4
    assert isinstance(observer, Histogram)
    assert int(observer.counts[BINS // 4 :].sum()) == 0


def test_a_wider_batch_folds_the_counts() -> None:
    observer = Histogram(symmetric=True)
    observer.collect(torch.tensor([[0.1, 0.2, 0.3]]))
    first = float(observer.width)
    observer.collect(torch.tensor([[1000.0]]))
    observer.flush()
    assert float(observer.width) == first * 2**11  # from [0.25, 0.5) to [512, 1024)
    assert observer.counts.sum() == 4
    assert observer.counts[0] == 3
    assert observer.counts[int(1000 / float(observer.width))] == 1


def test_empty_tensors_say_nothing() -> None:
    observer = collected("minmax", [torch.empty(0, 4)])
    assert not observer.fed
    observer.collect(torch.ones(1, 4))
    observer.collect(torch.empty(0, 4))
    assert observer.state_dict()["batches"] == 1


def test_channels_are_taken_from_the_first_tensor_and_must_stay() -> None:
    observer = MinMax(axis=1)
    observer.collect(torch.randn(2, 3))
    assert observer.amin.shape == (3,)
    with pytest.raises(CalibrationError, match=r"4 channels on axis 1.*had 3"):
        observer.collect(torch.randn(2, 4))


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


def test_nothing_collected_is_nothing_to_solve() -> None:
    with pytest.raises(CalibrationError, match=r"nothing was collected\n.*fxq.calibrate"):
        MinMax().compute(MAX, spec())


def test_integers_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"torch.int64"):
        MinMax().collect(torch.arange(3))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (MinMax(), MovingAverage(0.1)),
        (MinMax(), MinMax(axis=0)),
        (Histogram(symmetric=True), Histogram(symmetric=False)),
        (MinMax(axis=0, channels=2), MinMax(axis=0, channels=3)),
    ],
)
def test_unlike_observers_do_not_merge(one: Observer, two: Observer) -> None:
    for observer in (one, two):
        observer.collect(torch.randn(observer.amin.shape or (2,)))
    with pytest.raises(CalibrationError, match="cannot merge"):
        one.merge(two)


def test_collecting_never_reads_a_value_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"the host waited for {args}")

    observers = [collected(kind, [torch.randn(2, 3, 4)], axis) for kind in KINDS for axis in (None, 1)]
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    for observer in observers:
        for _ in range(20):  # over the end of the ring
            observer.collect(torch.randn(2, 3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 1])
def test_a_gpu_gives_the_same_statistics_without_a_wait(kind: str, axis: int | None) -> None:
    parts = [torch.randn(4, 3, 20_000) * 3**i for i in range(-5, 6)]
    observer = KINDS[kind](axis)
    there = [part.cuda() for part in parts]
    observer.collect(there[0])  # which moves the observer
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in there[1:]:
            observer.collect(part)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert observer.amin.is_cuda
    here = collected(kind, parts, axis)
    for name, value in here.state_dict().items():
        torch.testing.assert_close(observer.state_dict()[name].cpu(), value, rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(KINDS))
def test_statistics_moved_in_inference_mode_outlive_it(kind: str) -> None:
    observer = KINDS[kind](None)
    with torch.inference_mode():
        observer.collect(torch.randn(2, 3, device="cuda"))
    assert not any(buffer.is_inference() for buffer in observer.buffers())
    observer.flush()
    assert observer.batches == 1
