"""Quantization-aware training: what training simulates is what convert gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import basic_net, lenet, seeded
from training import NETS, POLICIES, batch, integers, prepared, trained

import fxq
from fxq import qat
from fxq.batch_norm import batch_norms
from fxq.errors import CalibrationError
from fxq.fake_quantizers import FakeQuantizer
from fxq.quantizer import Mode, quantized_nodes, quantizers


@pytest.mark.parametrize("net", NETS)
def test_quantizers_stand_where_prepare_puts_them_under_the_same_keys(net: str) -> None:
    build, shape = NETS[net]
    plain, gm = fxq.prepare(build(), batch(shape)), fxq.prepare_qat(build(), batch(shape))
    assert list(quantizers(gm)) == list(quantizers(plain))
    for name, mine in quantizers(gm).items():
        theirs = quantizers(plain)[name]
        assert isinstance(mine, FakeQuantizer)
        assert (mine.spec, mine.axis, mine.tie, mine.weight) == (theirs.spec, theirs.axis, theirs.tie, theirs.weight)
        assert mine.state_dict().keys() == theirs.state_dict().keys()
    readers = {n: {u.name for u in node.users} for n, node in quantized_nodes(plain).items()}
    assert {n: node.name for n, node in quantized_nodes(gm).items()}.keys() == readers.keys()


@pytest.mark.parametrize("net", NETS)
def test_the_model_keeps_its_keys(net: str) -> None:
    build, shape = NETS[net]
    model = build()
    mine = fxq.prepare_qat(model, batch(shape)).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(mine[key], value), key
    assert {k for k in mine if not k.startswith("quantizers.")} == set(model.state_dict())


@pytest.mark.parametrize("scales", POLICIES)
@pytest.mark.parametrize("net", NETS)
def test_eval_mode_gives_what_convert_gives_to_the_last_bit(net: str, scales: str) -> None:
    shape = NETS[net][1]
    gm = trained(prepared(net, scales), shape).eval()
    converted = fxq.convert(gm)
    with torch.no_grad():
        assert torch.equal(gm(batch(shape, 5)), converted(batch(shape, 5)))
    assert not [n for n in converted.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("scales", POLICIES)
@pytest.mark.parametrize("net", ["basic", "odd layers"])
def test_training_simulates_the_very_integers_that_convert_stores(net: str, scales: str) -> None:
    gm = trained(prepared(net, scales), NETS[net][1])
    seen: dict[str, Tensor] = {}
    for name, quantizer in quantizers(gm).items():
        if quantizer.weight:
            quantizer.register_forward_hook(lambda _, args, y, name=name: seen.update({name: (args[0], y)}))
    norms = {name: copy.deepcopy(q.folded) for name, q in quantizers(gm).items()}  # type: ignore[attr-defined]
    expected = integers(fxq.convert(gm))
    gm(batch(NETS[net][1], 7))
    assert seen.keys() == expected.keys()
    for name, (weight, effective) in seen.items():
        quantizer, into = quantizers(gm)[name], norms[name]
        factor = torch.ones(1) if into is None else into.fold().factor(weight)
        scale = quantizer.scale.detach()
        if quantizer.axis is not None:
            scale = scale.view([-1 if d == quantizer.axis else 1 for d in range(weight.dim())])
        simulated = effective.detach() * torch.where(factor == 0, 0.0, factor) / scale
        torch.testing.assert_close(simulated, expected[name].float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("net", ["basic", "bottleneck", "pre-activation", "odd layers"])
def test_with_quantizers_off_training_is_float_training(net: str) -> None:
    """Losses, gradients and running statistics: BatchNorm in the graph is the user's BatchNorm."""
    build, shape = NETS[net]
    model = build().train()
    gm = fxq.prepare_qat(model, batch(shape)).train()
    x = batch(shape, 3)
    with qat.disable_quantizers(gm):
        mine = gm(x)
    theirs = model(x)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    mine.square().mean().backward()
    theirs.square().mean().backward()
    parameters = dict(gm.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    buffers = dict(gm.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-5)


def test_calibration_finds_the_scales_of_post_training_quantization() -> None:
    data = [batch(seed=1), batch(seed=2)]
    plain = fxq.prepare(basic_net(), batch())
    fxq.calibrate(plain, data, progress=False)
    gm = fxq.prepare_qat(basic_net(), batch())
    fxq.calibrate(gm, data, progress=False)
    loaded = fxq.prepare_qat(basic_net(), batch())
    qat.load_scales(loaded, plain)
    for name, quantizer in quantizers(plain).items():
        torch.testing.assert_close(quantizers(gm)[name].scale, quantizer.scale, rtol=1e-4, atol=0)
        assert torch.equal(quantizers(loaded)[name].scale, quantizer.scale)
    assert gm.training
    assert all(q.mode is Mode.QUANTIZE for q in quantizers(gm).values())


def test_load_scales_names_what_is_missing_and_changes_nothing() -> None:
    gm, plain = prepared(), fxq.prepare(lenet(), batch((4, 1, 28, 28)))
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    with pytest.raises(CalibrationError, match="find no scale: x, stem_0_weight"):
        qat.load_scales(gm, plain)
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items() if v.isfinite().all())


def test_layers_that_stay_float_fold_their_norm_all_the_same() -> None:
    recipe = fxq.Recipe([fxq.Rule("blocks.0.conv1", None)])
    gm = trained(prepared("basic", recipe=recipe)).eval()
    with torch.no_grad():
        assert torch.equal(gm(batch(seed=5)), fxq.convert(gm)(batch(seed=5)))


def test_frozen_norms_train_with_the_deployed_arithmetic() -> None:
    gm = trained(prepared())
    statistics = {n: b.clone() for n, b in gm.named_buffers() if "running" in n}
    qat.freeze_bn(gm)
    x = batch(seed=6)
    torch.testing.assert_close(gm(x), copy.deepcopy(gm).eval()(x), rtol=1e-6, atol=1e-6)
    trained(gm)
    assert all(torch.equal(gm.get_buffer(n), b) for n, b in statistics.items())
    assert all(norm.weight is not None and norm.weight.grad is not None for norm in batch_norms(gm).values())
    qat.unfreeze_bn(gm, "stem.*")
    gm(x)
    moved = {n for n, b in statistics.items() if not torch.equal(gm.get_buffer(n), b)}
    assert moved == {"stem.1.running_mean", "stem.1.running_var"}


def test_frozen_gradients_are_those_of_the_folded_layer() -> None:
    """gamma, beta and the weight learn through the fold; checked against autograd through plain operations."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    gm = fxq.prepare_qat(seeded(lambda: model), torch.randn(2, 2, 4, 4))
    x = torch.randn(2, 2, 4, 4)
    qat.freeze_bn(gm)
    with qat.disable_quantizers(gm):
        gm(x).square().sum().backward()
    plain = copy.deepcopy(model).eval()
    plain(x).square().sum().backward()
    for (name, mine), theirs in zip(gm.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_folded_first_has_the_keys_of_prepare() -> None:
    plain = fxq.prepare(basic_net(), batch())
    fxq.calibrate(plain, [batch(seed=1)], progress=False, bias_correction=False)
    gm = fxq.prepare_qat(basic_net(), batch(), batch_norm="fold")
    gm.load_state_dict(plain.state_dict(), strict=True)
    assert not batch_norms(gm)
    assert all(p.requires_grad for p in gm.parameters())
    trained(gm).eval()
    with torch.no_grad():
        assert torch.equal(gm(batch(seed=5)), fxq.convert(gm)(batch(seed=5)))


def test_parameters_that_the_user_froze_stay_frozen() -> None:
    model = basic_net()
    model.stem.requires_grad_(requires_grad=False)  # type: ignore[union-attr]
    gm = fxq.prepare_qat(model, batch())
    assert {n for n, p in gm.named_parameters() if not p.requires_grad} == {
        "stem.0.weight",
        "stem.1.weight",
        "stem.1.bias",
    }


class Dropouts(nn.Module):
    """Dropout as a module and as a function, behind a ReLU and read beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        y = self.drop(x)
        x = self.fc2(y) + y
        return F.dropout(x, 0.25, training=self.training)


def test_dropout_follows_the_mode_and_is_not_deployed() -> None:
    model, x = seeded(Dropouts), torch.randn(64, 8)
    gm = fxq.prepare_qat(model, x)
    fxq.calibrate(gm, [x], progress=False)
    assert list(quantizers(gm)) == list(quantizers(fxq.prepare(model, x)))
    y = gm(x)
    assert 0.1 < float((y == 0).float().mean()) < 0.4
    assert not torch.equal(y, gm(x))
    gm.eval()
    with torch.no_grad():
        converted = fxq.convert(gm)
        assert torch.equal(gm(x), converted(x))
    assert not [n for n in converted.graph.nodes if n.op == "call_module"]
    masks = [m for m in gm.modules() if isinstance(m, nn.Dropout)]
    assert sorted(m.p for m in masks) == [0.25, 0.5]
    with torch.no_grad():
        assert not (gm(x) == 0).all(1).any()


def test_what_cannot_follow_the_mode_is_said() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)  # type: ignore[arg-type]

    gm = fxq.prepare_qat(seeded(Functional), torch.randn(1, 4, 2, 2))
    notes = [note.text for note in fxq.graph.state(gm).notes]
    assert any("called as a function" in text for text in notes)
