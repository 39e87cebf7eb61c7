"""A quantizer observes, stands aside or fake-quantizes, and its state travels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxq.errors import CalibrationError
from fxq.qdq import fake_quantize
from fxq.quantizer import Mode, Quantizer, quantizers, solve_all, tie_groups
from fxq.recipe import METHODS, Method, QSpec


def make(
    name: str = "x", *, method: str = "max", axis: int | None = None, tie: str | None = None,
    dtype: str = "int8", symmetric: bool = True, weight: bool = False,
) -> Quantizer:  # fmt: skip
    spec = QSpec(dtype, symmetric, "per-tensor" if axis is None else "per-channel", method)
    return Quantizer(spec, tensor=name, axis=axis, tie=tie, weight=weight)


def fed(quantizer: Quantizer, *values: Tensor) -> Quantizer:
    for x in values:
        quantizer(x)
    return quantizer


def test_observing_hands_on_the_very_tensor() -> None:
    quantizer, x = make(), torch.randn(3, 4)
    assert quantizer.mode is Mode.OBSERVE
    assert not quantizer.fed
    assert quantizer(x) is x
    assert quantizer.fed
    assert not quantizer.solved


def test_off_does_nothing() -> None:
    quantizer, x = make(), torch.randn(3, 4)
    quantizer.mode = Mode.OFF
    assert quantizer(x) is x
    assert not quantizer.fed


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(
    ("dtype", "symmetric"), [("int8", True), ("uint8", False), ("int4", True), ("float8_e4m3fn", True)]
)
@pytest.mark.parametrize("method", METHODS)
def test_quantizing_is_fake_quantization_by_the_solved_scale(
    axis: int | None, dtype: str, symmetric: bool, method: str
) -> None:
    quantizer, x = make(axis=axis, dtype=dtype, symmetric=symmetric, method=method), torch.randn(40, 3, 5)
    fed(quantizer, x, x * 0.5).solve()
    assert quantizer.solved
    assert quantizer.scale.shape == quantizer.zero_point.shape == (() if axis is None else (3,))
    assert (quantizer.scale.dtype, quantizer.zero_point.dtype) == (torch.float32, torch.int32)
    quantizer.mode = Mode.QUANTIZE
    y = quantizer(x)
    assert torch.equal(y, fake_quantize(x, quantizer.scale, quantizer.zero_point, axis, dtype))
    assert 0 < float((y - x).abs().mean()) < (0.5 if dtype == "int4" else 0.1)


def test_quantizing_without_a_scale_is_refused() -> None:
    quantizer = make("layer1_conv")
    quantizer.mode = Mode.QUANTIZE
    with pytest.raises(CalibrationError, match=r"layer1_conv has no scale[\s\S]*calibrate"):
        quantizer(torch.randn(3))


def test_solving_unfed_names_the_tensor() -> None:
    with pytest.raises(CalibrationError, match="layer1_conv: nothing was collected"):
        make("layer1_conv").solve()


def test_solving_again_by_another_method() -> None:
    x = torch.randn(8, 1000)
    x[0, 0] = 30
    quantizer = fed(make(method="entropy"), x)
    quantizer.solve()
    by_spec = quantizer.scale.clone()
    quantizer.solve("max")
    assert quantizer.scale == 30 / torch.tensor(127.0)
    assert quantizer.scale > 3 * by_spec
    quantizer.solve(Method("percentile", percentile=99))
    assert quantizer.scale < by_spec
    quantizer.solve()
    assert quantizer.scale == by_spec


@pytest.mark.parametrize("method", METHODS)
def test_ties_solve_over_the_merged_statistics(method: str) -> None:
    x, y = torch.randn(4, 300), torch.randn(4, 300) * 3 - 1
    one, two = fed(make("a", method=method, tie="t"), x), fed(make("b", method=method, tie="t"), y)
    before = copy.deepcopy(two.observer)
    one.solve(others=[one, two])
    both = fed(make(method=method), x, y)
    both.solve()
    assert one.scale == both.scale
    assert before is not None
    assert two.observer is not None
    for name, value in before.state_dict().items():
        assert (
            torch.equal(
                two.observer.state_dict()[name],
                value,
            )
            or value.isnan().any()
        )


def test_ties_of_unlike_observers_are_refused_by_name() -> None:
    one, two = fed(make("a"), torch.randn(3)), fed(make("b", method="entropy"), torch.randn(3))
    with pytest.raises(CalibrationError, match="a: cannot merge Histogram"):
        one.solve(others=[two])


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("method", ["max", "mse", "entropy"])
def test_weights_solve_themselves(axis: int | None, method: str) -> None:
    weight = torch.randn(6, 5, 3)
    quantizer = make("w", axis=axis, method=method, weight=True)
    assert quantizer.weight
    assert not quantizer.fed
    assert quantizer(weight) is weight
    assert not quantizer.fed
    quantizer.solve_weight(weight)
    assert quantizer.fed
    assert quantizer.scale.numel() == (1 if axis is None else weight.shape[axis])
    if method != "mse":
        amax = weight.abs().amax([d for d in range(3) if d != axis])
        torch.testing.assert_close(quantizer.scale, amax / 127)
    with pytest.raises(CalibrationError, match="w is a weight"):
        quantizer.solve()


def test_being_a_weight_can_be_decided_later() -> None:
    quantizer = make(method="entropy")
    quantizer.weight = True
    assert quantizer.observer is None
    quantizer.weight = False
    assert not fed(quantizer, torch.randn(5)).weight
    assert quantizer.fed


def test_a_broken_weight_names_the_tensor() -> None:
    with pytest.raises(CalibrationError, match="conv_weight: a weight holds NaN"):
        make("conv_weight", weight=True).solve_weight(torch.tensor([torch.nan]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [None, 1])
def test_state_travels_strictly(method: str, axis: int | None) -> None:
    x = torch.randn(8, 3, 40)
    quantizer = fed(make(method=method, axis=axis), x)
    quantizer.solve()
    fresh = make(method=method, axis=axis)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert fresh.solved
    assert fresh.fed
    assert torch.equal(fresh.scale, quantizer.scale)
    fed(fresh, x * 2).solve()
    fed(quantizer, x * 2).solve()
    assert torch.equal(fresh.scale, quantizer.scale)
    empty = make(method=method, axis=axis)  # and back to unsolved
    fresh.load_state_dict(empty.state_dict(), strict=True)
    assert not fresh.solved
    assert not fresh.fed


def test_weight_state_has_no_observer() -> None:
    quantizer = make(weight=True, axis=0)
    quantizer.solve_weight(torch.randn(4, 3))
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}
    fresh = make(weight=True, axis=0)
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh.scale, quantizer.scale)


def test_scales_stay_float32_when_a_model_is_cast() -> None:
    quantizer = fed(make(), torch.randn(5))
    quantizer.solve()
    before = quantizer.scale.clone()
    quantizer.half()
    assert torch.equal(quantizer.scale, before)
    quantizer.mode = Mode.QUANTIZE
    assert quantizer(torch.randn(5).half()).dtype == torch.float16


def test_scales_solved_in_inference_mode_can_be_trained_with() -> None:
    quantizer = make()
    with torch.inference_mode():
        fed(quantizer, torch.randn(5)).solve()
    quantizer.mode = Mode.QUANTIZE
    x = torch.randn(5, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None


def test_copies_are_independent() -> None:
    quantizer = fed(make(), torch.ones(3))
    quantizer.solve()
    twin = copy.deepcopy(quantizer)
    fed(twin, torch.full((3,), 50.0)).solve()
    assert quantizer.scale * 50 == twin.scale
    quantizer.set_parameters(twin.scale, twin.zero_point)
    twin.scale.zero_()
    assert quantizer.scale > 0


def container(**found: Quantizer) -> nn.Module:
    model = nn.Module()
    model.quantizers = nn.Module()
    for name, quantizer in found.items():
        model.quantizers.add_module(name, quantizer)
    return model


def test_quantizers_are_found_by_tensor() -> None:
    a, b = make("a"), make("b")
    model = container(a=a, b=b)
    model.quantizers.add_module("converted", nn.Identity())
    assert quantizers(model) == {"a": a, "b": b}
    assert quantizers(nn.Linear(1, 1)) == {}


def test_solve_all_keeps_ties_together() -> None:
    x = torch.randn(4, 100)
    a, b, c = make("a", tie="t"), make("b"), make("c", tie="t")
    w = make("w", weight=True)
    for quantizer, factor in ((a, 1.0), (b, 2.0), (c, 5.0)):
        fed(quantizer, x * factor)
    assert tie_groups([a, b, c]) == [[a, c], [b]]
    solve_all(container(a=a, b=b, c=c, w=w))
    assert a.scale == c.scale == (x * 5).abs().max() / 127
    assert b.scale == (x * 2).abs().max() / 127
    assert not w.solved


def test_solve_all_names_every_problem_and_changes_nothing() -> None:
    a, b, c = (make(name) for name in "abc")
    fed(a, torch.randn(5))
    with pytest.raises(CalibrationError, match=r"2 quantizers cannot be solved: b, c: nothing"):
        solve_all(container(a=a, b=b, c=c))
    assert not a.solved


def test_printed_modules_say_what_they_quantize() -> None:
    text = repr(make("relu_1", axis=1, tie="concat", method="mse"))
    assert "relu_1, int8 per-channel" in text
    assert "tie=concat, observe" in text


@pytest.mark.gpu
def test_a_quantizer_follows_its_tensor_to_the_gpu() -> None:
    quantizer = fed(make(method="mse"), torch.randn(5, 100).cuda())
    quantizer.solve()
    assert quantizer.scale.is_cuda
    quantizer.mode = Mode.QUANTIZE
    assert quantizer(torch.randn(3).cuda()).is_cuda
