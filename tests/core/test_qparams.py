"""Ranges become scales: the formulas, their edges, and the search over a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxq import qparams
from fxq.errors import CalibrationError, RecipeError
from fxq.qdq import fake_quantize, quantize
from fxq.qparams import DEAD_SCALE, scale_and_zero_point, weight_range
from fxq.recipe import DTYPES, QSpec


def spec(dtype: str = "int8", *, symmetric: bool = True, method: str = "max") -> QSpec:
    return QSpec(dtype=dtype, symmetric=symmetric, granularity="per-tensor", method=method)


def solved(amin: float, amax: float, of: QSpec) -> tuple[float, int]:
    scale, zero_point = scale_and_zero_point(torch.tensor(amin), torch.tensor(amax), of)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape == ()
    return scale.item(), zero_point.item()


def f32(x: float) -> float:
    return float(np.float32(x))


@pytest.mark.parametrize(
    ("dtype", "qmax"), [("int8", 127), ("uint8", 255), ("int4", 7), ("int2", 1), ("float8_e4m3fn", 448)]
)
def test_symmetric_scale_is_amax_over_qmax(dtype: str, qmax: int) -> None:
    assert solved(-3.0, 2.0, spec(dtype)) == (f32(3 / qmax), 0)
    assert solved(0.5, 2.0, spec(dtype)) == (f32(2 / qmax), 0)


def test_asymmetric_range_includes_zero() -> None:
    of = spec("uint8", symmetric=False)
    assert solved(-1.0, 1.55, of) == (f32(np.float64(f32(1.55) + 1) / 255), 100)
    assert solved(1.0, 5.1, of) == (f32(f32(5.1) / 255), 0)
    assert solved(-5.1, -1.0, of) == (f32(f32(5.1) / 255), 255)
    assert solved(-1.0, 3.0, spec("int8", symmetric=False)) == (f32(4 / 255), -64)


def test_vectors_are_solved_one_by_one() -> None:
    amin, amax = torch.tensor([-1.0, 0.0, -4.0]), torch.tensor([0.5, 2.0, 8.0])
    for of in (spec("int8"), spec("uint8", symmetric=False)):
        scale, zero_point = scale_and_zero_point(amin, amax, of)
        one = [solved(low, high, of) for low, high in zip(amin.tolist(), amax.tolist(), strict=True)]
        assert list(zip(scale.tolist(), zero_point.tolist(), strict=True)) == one


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 1e-36])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dead_range_gets_a_scale_that_float16_holds(amax: float, symmetric: bool) -> None:
    scale, zero_point = solved(0.0, amax, spec("int8", symmetric=symmetric))
    assert scale == DEAD_SCALE
    assert torch.tensor(scale).half().item() == scale
    q = quantize(torch.tensor([amax]), torch.tensor(scale), torch.tensor(zero_point), None, "int8")
    assert q.item() == zero_point


def test_small_and_huge_ranges_keep_their_scale() -> None:
    assert solved(-1e-30, 1e-30, spec())[0] == pytest.approx(1e-30 / 127, rel=1e-6)
    largest = torch.finfo(torch.float32).max
    assert solved(-largest, largest, spec("uint8", symmetric=False))[0] == pytest.approx(2 * largest / 255)


@given(low=st.floats(-1e6, 1e6, width=32), width=st.floats(0, 1e6, width=32), dtype=st.sampled_from(list(DTYPES)))
def test_zero_is_exact_and_the_range_is_covered(low: float, width: float, dtype: str) -> None:
    to = DTYPES[dtype]
    for symmetric in {True, to.floating}:
        of = spec(dtype, symmetric=symmetric)
        amin, amax = torch.tensor(low), torch.tensor(low) + torch.tensor(width)
        scale, zero_point = scale_and_zero_point(amin, amax, of)
        assert scale > 0
        assert to.qmin <= zero_point <= to.qmax or to.floating
        zero = fake_quantize(torch.zeros(1), scale, zero_point, None, dtype)
        assert zero.item() == 0


@given(low=st.floats(-1e6, 0, width=32), high=st.floats(0, 1e6, width=32))
def test_asymmetric_ends_move_by_half_a_step_at_most(low: float, high: float) -> None:
    of = spec("uint8", symmetric=False)
    ends = torch.tensor([low, high])
    scale, zero_point = scale_and_zero_point(ends[0], ends[1], of)
    back = fake_quantize(ends, scale, zero_point, None, "uint8")
    assert float((back - ends).abs().max()) <= float(scale) * 0.5001


@pytest.mark.parametrize(
    ("amin", "amax"),
    [(0.0, torch.inf), (torch.nan, 1.0), (-torch.inf, 0.0), (1.0, -1.0)],
)
def test_a_broken_range_is_refused(amin: float, amax: float) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        solved(amin, amax, spec())


def test_shapes_must_agree() -> None:
    with pytest.raises(CalibrationError, match=r"\(2,\).*\(3,\)"):
        scale_and_zero_point(torch.zeros(2), torch.zeros(3), spec())


def test_floating_types_have_no_zero_point() -> None:
    with pytest.raises(RecipeError, match="float8_e4m3fn has no zero point"):
        solved(-1.0, 1.0, spec("float8_e4m3fn", symmetric=False))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("method", ["max", "entropy", "percentile", "moving-average"])
def test_weight_range_is_each_channels_own(axis: int, method: str) -> None:
    weight = torch.randn(4, 3, 2, 5)
    amin, amax = weight_range(weight, spec(method=method), axis)
    for index in range(weight.shape[axis]):
        channel = weight.select(axis, index)
        assert (amin[index], amax[index]) == (channel.min(), channel.max())
    amin, amax = weight_range(weight, spec(method=method), None)
    assert (amin, amax) == (weight.min(), weight.max())
    assert amin.shape == ()


def squared_error(weight: Tensor, amin: Tensor, amax: Tensor, of: QSpec, axis: int | None) -> Tensor:
    scale, zero_point = scale_and_zero_point(amin, amax, of)
    error = (fake_quantize(weight, scale, zero_point, axis, of.qdtype.name) - weight).double() ** 2
    return error.sum([d for d in range(weight.ndim) if d != axis])


@pytest.mark.parametrize(
    ("dtype", "symmetric"),
    [("int8", True), ("int4", True), ("uint4", False), ("int2", True), ("float8_e4m3fn", True)],
)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_mse_takes_the_best_of_its_candidates(
    dtype: str, symmetric: bool, axis: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.distributions.Laplace(0.1, 1).sample((6, 5, 40))
    of = spec(dtype, symmetric=symmetric, method="mse")
    full = weight_range(weight, spec(dtype, symmetric=symmetric), axis)
    ratios = torch.linspace(1.0, qparams._SMALLEST_RATIO, qparams._RATIOS)
    errors = torch.stack([squared_error(weight, full[0] * r, full[1] * r, of, axis) for r in ratios])
    for chunk in (1 << 18, 64):  # rows in one block, and cut into columns
        monkeypatch.setattr(qparams, "_CHUNK", chunk)
        amin, amax = weight_range(weight, of, axis)
        found = squared_error(weight, amin, amax, of, axis)
        torch.testing.assert_close(found, errors.min(dim=0).values, rtol=1e-6, atol=1e-9)
    if dtype == "int4":
        assert bool((found < errors[0]).all())  # clipping pays


def test_mse_of_a_dead_channel_is_dead() -> None:
    weight = torch.randn(3, 8)
    weight[1] = 0
    amin, amax = weight_range(weight, spec(method="mse"), 0)
    assert (amin[1], amax[1]) == (0, 0)


def test_weights_without_a_range_are_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        weight_range(torch.tensor([1.0, torch.nan]), spec(), None)
    with pytest.raises(CalibrationError, match="no range"):
        weight_range(torch.empty(0, 3), spec(), 0)


def test_half_weights_are_measured_in_float32() -> None:
    weight = torch.randn(4, 9).half()
    amin, amax = weight_range(weight, spec(), 0)
    assert amin.dtype == amax.dtype == torch.float32
    assert torch.equal(amax, weight.float().amax(1))
