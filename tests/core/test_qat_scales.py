"""What moves a scale in training: calibration, a moving average, gradients; what specs train."""

from __future__ import annotations

import copy

import pytest
import torch
from placing import STUDY
from torch import nn
from toys import basic_net
from training import POLICIES, batch, prepared, trained

import fxq
from fxq import qat
from fxq.errors import CalibrationError, RecipeError
from fxq.fake_quantizers import FakeQuantizer
from fxq.quantizer import quantizers


def test_fixed_scales_ask_for_calibration() -> None:
    gm = fxq.prepare_qat(basic_net(), batch())
    with pytest.raises(CalibrationError, match="has no scale"):
        gm(batch())


def test_fixed_scales_do_not_move() -> None:
    gm = prepared()
    before = {n: q.scale.clone() for n, q in quantizers(gm).items()}
    trained(gm)
    assert all(torch.equal(q.scale, before[n]) for n, q in quantizers(gm).items())


def test_a_moving_average_starts_at_the_first_batch_and_follows() -> None:
    gm = fxq.prepare_qat(basic_net(), batch(), scales=qat.ScalePolicy("moving-average", "max", momentum=0.25))
    first, second = batch(seed=3), 2 * batch(seed=4)
    gm(first)
    top = float(first.abs().max())
    assert float(quantizers(gm)["x"].scale) == pytest.approx(top / 127)
    gm(second)
    low = torch.lerp(first.min(), second.min(), 0.25)
    high = torch.lerp(first.max(), second.max(), 0.25)
    assert float(quantizers(gm)["x"].scale) == pytest.approx(float(torch.maximum(-low, high)) / 127)
    gm.eval()
    held = quantizers(gm)["x"].scale.clone()
    gm(100 * second)
    assert torch.equal(quantizers(gm)["x"].scale, held)


@pytest.mark.parametrize("scales", POLICIES)
def test_tensors_that_are_tied_share_one_scale(scales: str) -> None:
    gm = prepared("tied", scales)
    names = [name for name, q in quantizers(gm).items() if q.tie is not None]
    assert names == ["relu", "cat"]
    trained(gm)
    for moved in (gm, copy.deepcopy(gm), copy.deepcopy(gm).double().float()):
        first, second = (quantizers(moved)[name] for name in names)
        assert first.scale is second.scale
        assert torch.equal(first.scale, quantizers(gm)["relu"].scale)
    state = gm.state_dict()
    assert torch.equal(state["quantizers.relu.scale"], state["quantizers.cat.scale"])
    if scales == "moving-average":
        tops = [max(-float(q.observer.amin), float(q.observer.amax)) for q in map(quantizers(gm).get, names)]  # type: ignore[union-attr]
        assert tops[1] > tops[0]
        assert float(quantizers(gm)["relu"].scale) == pytest.approx(tops[1] / 127)


def test_learned_scales_begin_as_published() -> None:
    gm = fxq.prepare_qat(basic_net(), batch(), scales="learned")
    x = batch(seed=3)
    gm(x)
    found = quantizers(gm)["x"]
    assert isinstance(found.scale, nn.Parameter)
    assert float(found.scale.detach()) == pytest.approx(float(2 * x.abs().mean() / 127**0.5))
    held = found.scale.clone()
    gm(2 * x)
    assert torch.equal(found.scale, held)
    weight = gm.get_parameter("fc.weight").detach()
    torch.testing.assert_close(
        quantizers(gm)["fc_weight"].scale.detach(), 2 * weight.abs().mean(1) / 127**0.5, rtol=1e-6, atol=0
    )


def test_learned_scales_get_the_published_gradient_scale() -> None:
    """1 / sqrt(N qmax), N being the elements of one sample that share the scale."""
    gm = prepared("lenet", "learned")
    found = quantizers(gm)["x"]
    x = batch((4, 1, 28, 28), 5)
    gm(x).square().mean().backward()
    scaled = found.scale.grad
    found._learning = lambda _: {"gradient": fxq.straight_through.ScaleGradient.LSQ}  # type: ignore[method-assign,attr-defined]
    gm.zero_grad()
    gm(x).square().mean().backward()
    torch.testing.assert_close(scaled, found.scale.grad / (28 * 28 * 127) ** 0.5, rtol=1e-4, atol=0)  # type: ignore[operator]


def test_pact_learns_the_upper_end_behind_relu_and_nowhere_else() -> None:
    gm = prepared("basic", "pact")
    kinds = {name: q.policy for name, q in quantizers(gm).items() if isinstance(q, FakeQuantizer)}
    assert kinds["stem_2"] == "pact"
    assert kinds["x"] == "moving-average"
    assert kinds["fc_weight"] == "max"
    relu = quantizers(gm)["blocks_0_relu"]
    with torch.no_grad():
        relu.scale.mul_(0.5)  # so that something is clipped
    gm(batch(seed=3)).square().mean().backward()
    assert relu.scale.grad is not None
    assert float(relu.scale.grad.abs()) > 0


@pytest.mark.parametrize("name", ["int4", "int2", "uint4"])
@pytest.mark.parametrize("scales", POLICIES)
def test_fewer_bits_train_and_convert(name: str, scales: str) -> None:
    recipe = fxq.Recipe([fxq.Rule("blocks.*", fxq.QSpec(name, symmetric=True))])
    gm = trained(prepared("basic", scales, recipe=recipe)).eval()
    with torch.no_grad():
        assert torch.equal(gm(batch(seed=5)), fxq.convert(gm)(batch(seed=5)))


@pytest.mark.parametrize("spec", [fxq.QSpec("uint8", symmetric=False), fxq.QSpec("float8_e4m3fn")], ids=str)
def test_other_arithmetic_trains_by_the_general_way(spec: fxq.QSpec) -> None:
    recipe = fxq.Recipe([fxq.Rule("*", fxq.EdgeSpecs(input=spec, weight=spec))])
    for scales in ("fixed", "moving-average"):
        gm = trained(prepared("basic", scales, recipe=recipe, target=STUDY)).eval()
        with torch.no_grad():
            assert torch.equal(gm(batch(seed=5)), fxq.convert(gm)(batch(seed=5)))
    with pytest.raises(RecipeError, match="cannot be learned"):
        fxq.prepare_qat(basic_net(), batch(), scales="learned", recipe=recipe, target=STUDY)
