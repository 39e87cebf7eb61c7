"""What every observer does: the exact range, the first bad batch, state, merging, and never a wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from observing import KINDS, MAX, collected, same, spec
from torch import Tensor

from fxq.errors import CalibrationError
from fxq.observing import NEVER, Histogram, MinMax, MovingAverage, Observer


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
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 1])
def test_a_gpu_gives_the_same_statistics_without_a_wait(kind: str, axis: int | None) -> None:
    parts = [torch.randn(4, 3, 20_000) * 3**i for i in range(-5, 6)]
    observer = KINDS[kind](axis)
    there = [part.cuda() for part in parts]
    observer.collect(there[0])  # which moves the observer
    try:
        torch.cuda.set_sync_debug_mode("error")
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


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("held", [1, 3])
def test_a_copy_goes_on_by_itself(kind: str, axis: int | None, held: int) -> None:
    parts = [torch.randn(2, 3, 4) * (i + 1) for i in range(12)]
    one = collected(kind, parts[:held], axis)
    twin = copy.deepcopy(one)
    for part in parts[held:]:
        twin.collect(part)
    same(twin, collected(kind, parts, axis))
    same(one, collected(kind, parts[:held], axis))
