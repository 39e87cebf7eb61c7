"""Weights that are quantized together: who waits for whom, and, on a GPU, that they come out as alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import straight_through
from fxq.folding import Fold
from fxq.recipe import DTYPES
from fxq.straight_through import ScaleGradient, fake_quantize_weight
from fxq.weight_batch import Made, WeightBatch, WeightRequest

needs_gpu = pytest.mark.gpu


class Table:
    """Stands for the kernel: gives each weight doubled, and counts launches."""

    launches = 0

    def __init__(self, requests: Sequence[WeightRequest]) -> None:
        self.requests = list(requests)

    def fits(self, requests: Sequence[WeightRequest]) -> bool:
        return [id(r.weight) for r in requests] == [id(r.weight) for r in self.requests]

    def launch(self) -> list[Made]:
        Table.launches += 1
        return [Made(2 * r.weight.detach(), torch.ones_like(r.weight, dtype=torch.bool), None) for r in self.requests]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made | None]:
    monkeypatch.setattr(Table, "launches", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def wanted(batch: WeightBatch, key: int, request: WeightRequest) -> Made | None:
        return batch.take(key, request, Table)

    return wanted


def requests(count: int, mode: str = "fixed") -> list[WeightRequest]:
    made = []
    for _ in range(count):
        fold = Fold(torch.ones(4), torch.ones(4), 1e-5, tracked=torch.tensor(0))
        made.append(WeightRequest(nn.Parameter(torch.randn(4, 3)), torch.ones(4), fold, -128, 127, mode, torch.float32))
    return made


def test_the_first_to_ask_has_all_computed_and_each_result_is_used_once(ask: Any) -> None:
    batch, wanted = WeightBatch(), requests(3)
    assert [ask(batch, k, r) for k, r in enumerate(wanted)] == [None] * 3  # the first step gets to know them
    for step in (1, 2):
        for key, request in enumerate(wanted):
            made = ask(batch, key, request)
            assert made is not None
            assert torch.equal(made.y, 2 * request.weight)
        assert Table.launches == step


@pytest.mark.parametrize("part", ["weight", "scale", "gamma", "tracked"])
def test_what_changed_since_is_not_used(ask: Any, part: str) -> None:
    batch, wanted = WeightBatch(), requests(2)
    for key, request in enumerate(wanted):
        ask(batch, key, request)
    ask(batch, 0, wanted[0])
    assert Table.launches == 1
    second = wanted[1]
    assert second.fold is not None
    tensors = {
        "weight": second.weight,
        "scale": second.scale,
        "gamma": second.fold.gamma,
        "tracked": second.fold.tracked,
    }
    with torch.no_grad():
        tensors[part].add_(1)  # type: ignore[union-attr]
    made = ask(batch, 1, second)
    assert Table.launches == 2
    assert made is not None
    assert torch.equal(made.y, 2 * second.weight)


def test_weights_that_want_something_else_stay_apart(ask: Any) -> None:
    batch = WeightBatch()
    wanted = [*requests(2), *requests(2, "max")]
    for _ in range(2):
        for key, request in enumerate(wanted):
            ask(batch, key, request)
    assert Table.launches == 2


def test_a_weight_of_its_own_kind_is_made_alone(ask: Any) -> None:
    batch, (only,) = WeightBatch(), requests(1)
    assert [ask(batch, 0, only) for _ in range(3)] == [None] * 3


def test_what_is_forgotten_has_to_be_seen_again(ask: Any) -> None:
    batch, wanted = WeightBatch(), requests(3)
    for key, request in enumerate(wanted):
        ask(batch, key, request)
    ask(batch, 0, wanted[0])
    batch.forget(1)
    assert ask(batch, 1, wanted[1]) is None
    assert ask(batch, 2, wanted[2]) is not None


def test_nothing_is_computed_ahead_while_autograd_recomputes(ask: Any) -> None:
    batch, wanted, seen = WeightBatch(), requests(2), []
    for key, request in enumerate(wanted):
        ask(batch, key, request)
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(ask(batch, 0, wanted[0])))
    y.backward()
    assert seen == [None]
    assert Table.launches == 0


def test_copies_begin_empty() -> None:
    batch, (one,) = WeightBatch(), requests(1)
    batch.take(0, one, Table)
    for other in (copy.deepcopy(batch), copy.copy(batch)):
        assert not other._known


def test_a_graph_hands_one_batch_to_its_weights_and_copies_of_it_another() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    gm = fxq.prepare_qat(model, torch.randn(2, 3, 8, 8))

    def batches(graph: nn.Module) -> set[int]:
        return {id(m._batch) for m in graph.modules() if isinstance(m, fxq.qat.FakeQuantizer) and m.weight}

    assert len(batches(gm)) == 1
    assert len(batches(copy.deepcopy(gm))) == 1
    assert batches(gm) != batches(copy.deepcopy(gm))


def weights() -> list[tuple[Tensor, Tensor, Fold | None, Tensor]]:
    """Weight, scale, fold and gradient: long rows, dead and negative channels, no affine part, no fold."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for at, shape in enumerate([(16, 3, 7, 7), (64, 64, 3, 3), (10, 5000), (24, 8, 1, 1)]):
        weight = torch.randn(shape, device="cuda", generator=generator).requires_grad_()
        gamma = torch.randn(shape[0], device="cuda", generator=generator)
        gamma[1], gamma[2] = 0, -2
        var = torch.rand(shape[0], device="cuda", generator=generator) + 0.3
        scale = torch.rand(shape[0], device="cuda", generator=generator) * 0.01 + 0.005
        fold = None if at == 3 else Fold(var, None if at == 2 else gamma, 1e-5)
        made.append((weight, scale, fold, torch.randn(shape, device="cuda", generator=generator)))
    return made


@needs_gpu
@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("mode", ["fixed", "learned", "max"])
def test_together_and_alone_are_the_same_to_the_last_bit(mode: str, lowered: bool) -> None:
    batch, given = WeightBatch(), weights()
    learning: dict[str, Any] = {"gradient": ScaleGradient.LSQ, "gradient_scale": 0.25} if mode == "learned" else {}

    def run(at: int, place: tuple[WeightBatch, int] | None) -> list[Tensor]:
        weight, scale, fold, grad = given[at]
        weight.grad = scale.grad = None
        if mode == "learned":
            scale.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=lowered and mode != "learned"):
            y = fake_quantize_weight(
                weight, scale, DTYPES["int8" if at % 2 else "int4"], 0, fold=fold, refresh=mode == "max", batch=place,
                **learning,
            )  # fmt: skip
        y.backward(grad.to(y.dtype))
        assert weight.grad is not None
        assert weight.grad.dtype is torch.float32
        found = [y.detach().clone(), weight.grad.clone(), scale.detach().clone()]
        return [*found, scale.grad.clone()] if scale.grad is not None else found

    alone = [run(at, None) for at in range(4)]
    for at in range(4):
        run(at, (batch, at))
    together = [run(at, (batch, at)) for at in range(4)]
    for mine, theirs in zip(together, alone, strict=True):
        for a, b in zip(mine[:3], theirs[:3], strict=True):
            assert torch.equal(a, b)
        if mode == "learned":
            torch.testing.assert_close(mine[3], theirs[3], rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("scales", ["fixed", "moving-average", "learned"])
def test_a_step_on_a_gpu_takes_one_launch_for_its_weights(scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4)]
    x = torch.randn(4, 8, 12, 12)
    gm = fxq.prepare_qat(nn.Sequential(*layers), x, scales=scales)
    fxq.calibrate(gm, [x], progress=False)
    gm = gm.cuda().train()
    twin = copy.deepcopy(gm)
    for quantizer in twin.modules():
        if isinstance(quantizer, fxq.qat.FakeQuantizer):
            quantizer._batch = None
    table, launches = straight_through._weight_kernels().WeightTable, []
    launch = table.launch
    monkeypatch.setattr(table, "launch", lambda self: launches.append(1) or launch(self))
    for model in (gm, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(x.cuda()).square().mean().backward()
            optimizer.step()
    assert len(launches) == 3  # the first step gets to know the weights
    for (name, mine), theirs in zip(gm.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
