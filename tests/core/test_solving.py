"""The door to calibration: solving again, forwards of one's own, going on, and names that modules have taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_worker import batches, prepared
from torch import Tensor, fx, nn

import fxq
from fxq.errors import CalibrationError
from fxq.graph import state
from fxq.quantizer import quantizers, submodule_name


def scales(gm: fx.GraphModule) -> list[Tensor]:
    return [q.scale.clone() for q in quantizers(gm).values()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def corrections(gm: fx.GraphModule) -> int:
    return sum(1 for _ in gm.bias_corrections.buffers())


def test_solving_again_gives_what_calibrating_so_gives() -> None:
    gm, other = prepared("mse"), prepared("entropy")
    fxq.calibrate(gm, batches())
    fxq.calibrate(other, batches())
    report = fxq.solve(gm, "entropy")
    activations = [q.tensor for q in quantizers(gm).values() if not q.weight]
    found, wanted = ({q.tensor: q.scale for q in quantizers(g).values()} for g in (gm, other))
    assert all(torch.equal(found[name], wanted[name]) for name in activations)
    assert [row.name for row in report.rows] == activations
    assert state(gm).provenance["calibration"].items() >= {"batches": 12, "performance_only": False}.items()


def test_corrections_of_other_scales_are_dropped_or_measured_again() -> None:
    gm = prepared("mse")
    fxq.calibrate(gm, batches())
    assert corrections(gm) > 0
    fxq.solve(gm)
    assert corrections(gm) > 0  # the same scales
    fxq.solve(gm, "max")
    assert corrections(gm) == 0
    fxq.solve(gm, "entropy", batches=batches())
    other = prepared("mse")
    fxq.calibrate(other, batches(), bias_correction=False)
    fxq.solve(other, "entropy", batches=batches())
    assert corrections(gm) > 0
    for name, buffer in other.bias_corrections.named_buffers():
        assert torch.equal(gm.bias_corrections.get_buffer(name), buffer)


def test_what_was_never_fed_cannot_be_solved() -> None:
    with pytest.raises(CalibrationError, match="saw no data"):
        fxq.solve(prepared("mse"))


def test_a_forward_of_ones_own_is_corrected_for_too() -> None:
    def forward(model: Any, batch: dict[str, Any]) -> None:
        model(batch["picture"] / 2)

    gm, other = prepared("mse"), prepared("mse")
    fxq.calibrate(gm, [{"picture": 2 * x, "name": "a"} for x in batches()], forward=forward)
    fxq.calibrate(other, batches())
    assert equal(scales(gm), scales(other))
    assert corrections(gm) > 0
    for name, buffer in other.bias_corrections.named_buffers():
        assert torch.equal(gm.bias_corrections.get_buffer(name), buffer)


def test_calibration_goes_on_without_reset() -> None:
    gm, whole = prepared("mse"), prepared("mse")
    fxq.calibrate(gm, batches()[:5])
    report = fxq.calibrate(gm, batches()[5:], reset=False)
    fxq.calibrate(whole, batches())
    assert report.batches == 12
    assert equal(scales(gm), scales(whole))


class Taken(nn.Module):
    """Layers and tensors whose names are attributes of every module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"half_": nn.Conv2d(3, 4, 1)})
        self.add_module("conv", nn.Conv2d(4, 4, 1))

    def forward(self, float: Tensor) -> Tensor:  # noqa: A002
        return self.conv(self.inner["half_"](float).relu())


def test_tensors_may_have_the_names_of_modules_attributes() -> None:
    gm = fxq.prepare(Taken().eval(), torch.zeros(2, 3, 4, 4))
    report = fxq.calibrate(gm, [torch.randn(4, 3, 4, 4) for _ in range(4)])
    assert report.rows[0].name in ("float", "float_1")
    fxq.convert(gm)(torch.randn(2, 3, 4, 4))


def test_no_two_tensors_share_a_submodules_name() -> None:
    names = ["half", "half_", "half__", "to", "x", "x_", "training", "__class__"]
    made = [submodule_name(name) for name in names]
    assert len(set(made)) == len(names)
    container = nn.Module()
    for name in made:
        container.add_module(name, nn.Identity())
    assert made[4:6] == ["x", "x_"]
