"""Quantization-aware training: what training simulates is what convert gives, and a graph that trains is a module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import STUDY
from torch import Tensor, fx, nn
from toys import BasicBlock, basic_net, bottleneck_net, branches, lenet, preactivation_net, seeded

import fxq
from fxq import qat
from fxq.batch_norm import TrainedBatchNorm, batch_norms
from fxq.errors import CalibrationError, MissingDependencyError, RecipeError
from fxq.fake_quantizers import FakeQuantizer
from fxq.graph import constant
from fxq.qdq import DEQUANTIZE
from fxq.quantizer import Mode, quantized_nodes, quantizers

POLICIES = tuple(qat.POLICIES)
IMAGE = (4, 3, 16, 16)


class OddLayers(nn.Module):
    """Every kind of layer that BatchNorm folds into, with groups, a bias, and a channel whose gamma is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.n1 = nn.ConvTranspose2d(3, 8, 3, 2, groups=1), nn.BatchNorm2d(8)
        self.grouped, self.n2 = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)
        self.upgrouped, self.n3 = nn.ConvTranspose2d(8, 8, 2, groups=2, bias=False), nn.BatchNorm2d(8, affine=False)
        self.fc, self.n4 = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.up(x)))
        x = torch.relu(self.n2(self.grouped(x)))
        x = torch.relu(self.n3(self.upgrouped(x)))
        return self.n4(self.fc(x.mean((2, 3))))


def odd_layers() -> nn.Module:
    model = seeded(OddLayers)
    with torch.no_grad():
        model.n2.weight[1] = 0  # type: ignore[union-attr,index]
        model.n2.weight[2] = -0.5  # type: ignore[union-attr,index]
    return model


class Tied(nn.Module):
    """A concatenation, and one of its parts read on its own too: their quantizers share a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.a(x)), torch.relu(3 * self.b(x))
        return self.c(torch.cat([a, b], 1)) + self.d(a)


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "basic": (basic_net, IMAGE),
    "bottleneck": (bottleneck_net, IMAGE),
    "pre-activation": (lambda: preactivation_net(norm=True), IMAGE),
    "lenet": (lenet, (4, 1, 28, 28)),
    "branches": (branches, IMAGE),
    "tied": (lambda: seeded(Tied), IMAGE),
    "odd layers": (odd_layers, IMAGE),
}


def batch(shape: tuple[int, ...] = IMAGE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared(net: str = "basic", scales: str | qat.ScalePolicy = "fixed", **options: Any) -> fx.GraphModule:
    """A calibrated graph that trains."""
    build, shape = NETS[net]
    gm = fxq.prepare_qat(build(), batch(shape), scales=scales, **options)
    fxq.calibrate(gm, [batch(shape, 1), batch(shape, 2)], progress=False)
    return gm


def step(gm: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = gm(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def trained(gm: fx.GraphModule, shape: tuple[int, ...] = IMAGE, steps: int = 3) -> fx.GraphModule:
    optimizer = torch.optim.SGD(qat.parameter_groups(gm, lr=0.01, scale_lr=1e-4), momentum=0.9)
    for number in range(steps):
        step(gm, optimizer, batch(shape, 10 + number))
    return gm


def integers(converted: fx.GraphModule) -> dict[str, Tensor]:
    """The integer weights of a converted graph by the key of their scale."""
    found = {}
    for node in converted.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        weight = constant(node.args[0])
        if weight is not None:
            found[str(node.args[1].target).split(".")[1]] = weight
    return found


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


def test_a_schedule_is_a_function_of_the_number() -> None:
    gm = prepared("basic", "moving-average")
    plan = qat.schedule(gm, quantize_from=1, observe_until=3, freeze_bn_at=2)

    def seen(number: int) -> tuple[bool, bool, bool]:
        plan(number)
        quantizer, norm = quantizers(gm)["x"], batch_norms(gm)["stem.1"]
        assert isinstance(quantizer, FakeQuantizer)
        return quantizer.mode is Mode.QUANTIZE, quantizer.observing, norm.frozen

    expected = {0: (False, True, False), 1: (True, True, False), 2: (True, True, True), 3: (True, False, True)}
    assert {n: seen(n) for n in (0, 1, 2, 3)} == expected
    assert {n: seen(n) for n in (3, 0, 2, 1)} == expected
    with pytest.raises(RecipeError, match="freeze_bn_at is -1"):
        qat.schedule(gm, freeze_bn_at=-1)
    with pytest.raises(RecipeError, match="no fake quantizers"):
        qat.schedule(nn.Linear(1, 1))


def test_context_managers_restore_whatever_happens() -> None:
    gm = prepared("basic", "moving-average")
    name = "blocks_0_relu"
    for change, attribute, inside in (
        (qat.disable_observers, "observing", False),
        (qat.disable_quantizers, "mode", Mode.OFF),
    ):
        before = {n: getattr(q, attribute) for n, q in quantizers(gm).items()}
        with pytest.raises(ZeroDivisionError), change(gm, "blocks.0*"):  # noqa: PT012 - what is inside is the point
            assert getattr(quantizers(gm)[name], attribute) == inside
            assert getattr(quantizers(gm)["x"], attribute) != inside
            raise ZeroDivisionError
        assert {n: getattr(q, attribute) for n, q in quantizers(gm).items()} == before
    with qat.disable_quantizers(gm), qat.enable_quantizers(gm, name):
        assert [n for n, q in quantizers(gm).items() if q.mode is Mode.QUANTIZE] == [name]
    with qat.disable_observers(gm), qat.enable_observers(gm, name):
        assert [n for n, q in quantizers(gm).items() if q.observing] == [name]  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="no quantizer matches"), qat.disable_observers(gm, "nothing"):
        pass
    with pytest.raises(RecipeError, match="no BatchNorm matches"):
        qat.freeze_bn(gm, "nothing")


def test_held_ranges_hold() -> None:
    gm = prepared("basic", "moving-average")
    trained(gm, steps=1)
    with qat.disable_observers(gm):
        before = {n: q.scale.clone() for n, q in quantizers(gm).items()}
        trained(gm)
        assert all(torch.equal(q.scale, before[n]) for n, q in quantizers(gm).items())
        gm.eval()
        with torch.no_grad():
            assert torch.equal(gm(batch(seed=5)), fxq.convert(gm)(batch(seed=5)))


def test_parameter_groups_keep_scales_apart() -> None:
    gm = prepared("tied", "learned")
    others, scales = qat.parameter_groups(gm, lr=0.1, scale_lr=0.01, weight_decay=0.5)
    assert (others["lr"], others["weight_decay"], scales["lr"], scales["weight_decay"]) == (0.1, 0.5, 0.01, 0.0)
    every = [id(p) for group in (others, scales) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in gm.parameters())
    assert {id(q.scale) for q in quantizers(gm).values()} == {id(p) for p in scales["params"]}
    assert len(qat.parameter_groups(prepared(), lr=0.1)) == 1


@pytest.mark.parametrize("scales", POLICIES)
def test_copies_and_reloaded_graphs_go_on_identically(scales: str) -> None:
    gm = trained(prepared("tied", scales))
    twin = copy.deepcopy(gm)
    reloaded = fxq.prepare_qat(seeded(Tied), batch(), scales=scales)
    reloaded.load_state_dict(gm.state_dict(), strict=True)
    first = torch.optim.Adam(qat.parameter_groups(gm, lr=1e-3, scale_lr=1e-5))
    losses = [step(gm, first, batch(seed=s)) for s in range(3)]
    for other in (twin, reloaded):
        optimizer = torch.optim.Adam(qat.parameter_groups(other, lr=1e-3, scale_lr=1e-5))
        assert [step(other, optimizer, batch(seed=s)) for s in range(3)] == losses


@pytest.mark.parametrize("scales", POLICIES)
def test_training_resumes_in_the_middle_with_identical_losses(scales: str, tmp_path: Any) -> None:
    gm = prepared("basic", scales)
    plan = qat.schedule(gm, observe_until=4, freeze_bn_at=3)
    optimizer = torch.optim.SGD(qat.parameter_groups(gm, lr=0.01, scale_lr=1e-4), momentum=0.9)
    losses = []
    for number in range(6):
        if number == 3:
            torch.save({"model": gm.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
        plan(number)
        losses.append(step(gm, optimizer, batch(seed=number)))
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = fxq.prepare_qat(basic_net(), batch(), scales=scales)
    again.load_state_dict(saved["model"], strict=True)
    plan = qat.schedule(again, observe_until=4, freeze_bn_at=3)
    optimizer = torch.optim.SGD(qat.parameter_groups(again, lr=0.01, scale_lr=1e-4), momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    rest = []
    for number in range(3, 6):
        plan(number)
        rest.append(step(again, optimizer, batch(seed=number)))
    assert rest == losses[3:]


def test_an_uncalibrated_checkpoint_leaves_scales_unknown() -> None:
    plain = fxq.prepare(basic_net(), batch())
    gm = fxq.prepare_qat(basic_net(), batch(), batch_norm="fold")
    gm.load_state_dict(plain.state_dict(), strict=True)
    assert not any(q.solved for q in quantizers(gm).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", POLICIES)
def test_autocast_trains(scales: str, dtype: torch.dtype) -> None:
    gm = prepared("basic", scales)
    groups = qat.parameter_groups(gm, lr=0.01, scale_lr=1e-4)
    optimizer = torch.optim.SGD(groups)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16, init_scale=128.0)
    losses = []
    for number in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            y = gm(batch(seed=3))
            loss = y.float().square().mean()
        assert y.dtype is dtype
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters()), number
    assert losses[-1] < losses[0]
    assert all(q.scale.dtype is torch.float32 for q in quantizers(gm).values())


@pytest.mark.parametrize("scales", POLICIES)
def test_gradients_accumulate(scales: str) -> None:
    """Two forwards before the backwards: nothing that backward needs is changed in place."""
    gm = prepared("basic", scales)
    twin = copy.deepcopy(gm)
    first, second = gm(batch(seed=3)).square().mean(), gm(batch(seed=4)).square().mean()
    (first + second).backward()
    for seed in (3, 4):
        twin(batch(seed=seed)).square().mean().backward()
    for (name, mine), theirs in zip(gm.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("scales", POLICIES)
def test_the_compiler_takes_the_graph_whole(scales: str) -> None:
    """Without a graph break, with eager's gradients and state: backward must not see what forward changed."""
    torch.compiler.reset()
    gm = prepared("basic", scales)
    twin = copy.deepcopy(gm)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for model in (compiled, twin):
        model(batch(seed=3)).square().mean().backward()
    for (name, mine), theirs in zip(gm.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs[1].grad, rtol=1e-3, atol=1e-5, msg=name)
    theirs_by_name = twin.state_dict()  # what is saved; observers' scratch memory is not, and begins unset
    for name, mine in gm.state_dict().items():
        torch.testing.assert_close(mine, theirs_by_name[name], rtol=1e-5, atol=1e-5, msg=name)
    torch.compiler.reset()


def test_moving_to_another_type_or_device_keeps_scales_in_float32() -> None:
    for scales in ("fixed", "learned"):
        gm = prepared("basic", scales).half()
        assert all(q.scale.dtype is torch.float32 for q in quantizers(gm).values())
        assert gm.get_parameter("fc.weight").dtype is torch.float16
        meta = prepared("basic", scales).to("meta")
        assert all(q.scale.is_meta for q in quantizers(meta).values())


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(RecipeError, match="no scale policy is called 'best'"):
        fxq.prepare_qat(basic_net(), batch(), scales="best")
    with pytest.raises(RecipeError, match="batch_norm is 'drop'"):
        fxq.prepare_qat(basic_net(), batch(), batch_norm="drop")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="for weights"):
        qat.ScalePolicy("fixed", "pact")
    with pytest.raises(RecipeError, match="momentum"):
        qat.ScalePolicy(momentum=0)
    with pytest.raises(RecipeError, match="scales of shape"):
        quantizers(prepared())["x"].set_parameters(torch.ones(3), torch.zeros(3, dtype=torch.int32))


class FakeCallback:
    """What the callback's base needs to be for this test."""


def test_the_lightning_callback_keeps_to_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType, SimpleNamespace

    calls: list[int] = []
    room = ModuleType("lightning.pytorch")
    room.Callback = FakeCallback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", room)
    trainer = SimpleNamespace(current_epoch=2, global_step=7)
    plan: Any = calls.append
    by_epoch, by_step = qat.lightning_callback(plan), qat.lightning_callback(plan, every="step")
    assert isinstance(by_epoch, FakeCallback)
    for callback in (by_epoch, by_step):
        callback.on_train_epoch_start(trainer, None)
        callback.on_train_batch_start(trainer, None, None, 0)
    assert calls == [2, 7]
    with pytest.raises(RecipeError, match="every is 'batch'"):
        qat.lightning_callback(plan, every="batch")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingDependencyError):
        qat.lightning_callback(plan)


def test_blocks_that_are_called_twice_train_both_times() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model, x = seeded(Twice), batch()
    gm = fxq.prepare_qat(model, x)
    assert list(quantizers(gm)) == list(quantizers(fxq.prepare(model, x)))
    fxq.calibrate(gm, [x], progress=False)
    trained(gm).eval()
    with torch.no_grad():
        assert torch.equal(gm(x), fxq.convert(gm)(x))
    assert len([m for m in gm.modules() if isinstance(m, TrainedBatchNorm)]) == 2
