"""Bias correction: what it measures, where it keeps still, and what it does to a network."""

from __future__ import annotations

import pytest
import torch
from networks import sqnr_db
from torch import Tensor, fx, nn
from torch.nn import functional as F
from toys import basic_net, bottleneck_net, image, seeded

import fxq
from fxq.batches import Inputs
from fxq.bias_correction import CORRECTIONS, Sampler, correct_biases
from fxq.graph import state
from fxq.quantizer import Mode, quantizers


def calibrated(model: nn.Module, x: Tensor) -> fx.GraphModule:
    prepared = fxq.prepare(model, x[:2])
    fxq.calibrate(prepared, x.split(8), progress=False, bias_correction=False)
    return prepared


def mean_error(model: nn.Module, prepared: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return (model(x) - fxq.convert(prepared)(x)).mean(0)


def test_one_layer_is_corrected_by_its_mean_error() -> None:
    """Of one layer, the correction is the mean difference between float and quantized outputs, exactly."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 4)))
    x = torch.rand(512, 8)
    prepared = calibrated(model, x)
    found = correct_biases(prepared, [Inputs((part,), {}) for part in x.split(100)])
    for quantizer in quantizers(prepared).values():
        quantizer.mode = Mode.QUANTIZE
    with torch.inference_mode():
        errors = model(x) - prepared(x)
    significant = errors.mean(0).abs() > 2 * errors.std(0) / 512**0.5
    assert significant.any()
    expected = torch.where(significant, errors.mean(0), torch.zeros(4))
    torch.testing.assert_close(found["_0"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("build", [basic_net, bottleneck_net])
def test_a_network_comes_out_with_less_mean_error_and_no_less_quality(build: object) -> None:
    model = seeded(build)  # type: ignore[arg-type]
    x, fresh = image(256, 3, 16, 16, seed=1), image(256, 3, 16, 16, seed=2)
    prepared = calibrated(model, x)
    before = mean_error(model, prepared, fresh).square().mean()
    plain = fxq.convert(prepared)
    fxq.calibrate(prepared, x.split(8), progress=False)
    after = mean_error(model, prepared, fresh).square().mean()
    assert after < 0.5 * before
    with torch.inference_mode():
        reference = model(fresh)
        assert sqnr_db(reference, fxq.convert(prepared)(fresh)) > sqnr_db(reference, plain(fresh))


def test_calibrating_again_replaces_corrections_and_leaves_the_biases_alone() -> None:
    model = seeded(basic_net)
    x = image(64, 3, 16, 16)
    prepared = fxq.prepare(model, x[:2])
    biases = {k: v.clone() for k, v in prepared.named_parameters()}
    fxq.calibrate(prepared, x.split(8), progress=False)
    first = dict(getattr(prepared, CORRECTIONS).named_buffers())
    assert any(c.any() for c in first.values())
    fxq.calibrate(prepared, x.split(8), progress=False)
    again = dict(getattr(prepared, CORRECTIONS).named_buffers())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(torch.equal(biases[k], v) for k, v in prepared.named_parameters())
    fxq.calibrate(prepared, x.split(8), progress=False, bias_correction=False)
    assert not dict(getattr(prepared, CORRECTIONS).named_buffers())


def test_one_sample_is_no_ground_for_a_correction() -> None:
    prepared = calibrated(seeded(basic_net), image(8, 3, 16, 16))
    assert correct_biases(prepared, [Inputs((image(1, 3, 16, 16),), {})]) == {}


def test_float_layers_are_left_alone() -> None:
    recipe = fxq.Recipe([fxq.Rule("fc", None)])
    x = image(32, 3, 16, 16)
    prepared = fxq.prepare(seeded(basic_net), x[:2], recipe=recipe)
    fxq.calibrate(prepared, x.split(8), progress=False)
    names = {name for name, _ in getattr(prepared, CORRECTIONS).named_buffers()}
    assert "fc" not in names
    assert "blocks_0_bn1" in names


class CosineAttention(nn.Module):
    """Keys whose bias is held at 0 and that are normalized, over tokens of which the last ones are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.layer.bias.clone()
        bias[:16].zero_()
        both = F.linear(F.pad(x, (0, 0, 0, 12)), self.layer.weight, bias)
        keys, values = F.normalize(both[..., :16], dim=-1), both[..., 16:]
        return self.last(keys + values)


def test_a_bias_that_is_computed_is_not_corrected_nor_taken_for_corrected() -> None:
    """The layers behind it are corrected for what it gives, not for what a correction would make of it."""
    model = seeded(CosineAttention)
    x, fresh = torch.rand(64, 4, 16), torch.rand(64, 4, 16)
    prepared = calibrated(model, x)
    plain = fxq.convert(prepared)
    fxq.calibrate(prepared, x.split(8), progress=False)
    assert set(dict(getattr(prepared, CORRECTIONS).named_buffers())) <= {"last"}
    corrected = fxq.convert(prepared)
    assert [n.text for n in state(corrected).notes if n.rule == "correct-biases"] == [
        "its bias is computed in the graph, so it is not corrected"
    ]
    with torch.inference_mode():
        reference = model(fresh)
        assert sqnr_db(reference, corrected(fresh)) > sqnr_db(reference, plain(fresh)) - 0.1
        padded = (reference - corrected(fresh))[:, 4:]
    assert float(padded.abs().max()) < 0.02


def test_the_sampler_hands_everything_through_and_keeps_what_fits() -> None:
    prepared = calibrated(seeded(basic_net), image(8, 3, 16, 16))
    batches = [image(100, 3, 16, 16, seed=s) for s in range(8)]
    sampler = Sampler(prepared, batches)
    assert len(sampler) == 8
    assert all(a is b for a, b in zip(sampler, batches, strict=True))
    assert len(sampler.kept) == 6  # 512 samples, in whole batches
    assert [a is b for a, b in zip(sampler.kept, batches, strict=False)] == [True] * 6
    with pytest.raises(TypeError):
        len(Sampler(prepared, iter(batches)))
