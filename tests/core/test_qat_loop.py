"""A graph that trains in a training loop: schedules, checkpoints, autocast, the compiler, Lightning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import BasicBlock, basic_net, seeded
from training import POLICIES, Tied, batch, prepared, step, trained

import fxq
from fxq import qat
from fxq.batch_norm import TrainedBatchNorm, batch_norms
from fxq.errors import MissingDependencyError, RecipeError
from fxq.fake_quantizers import FakeQuantizer
from fxq.quantizer import Mode, quantizers


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
