"""Which quantizer hurts: each alone, and with all before it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, fx, nn
from toys import basic_net, image, lenet

import fxq
from fxq.errors import CalibrationError, FxqError
from fxq.quantizer import Mode, Quantizer, quantizers


def calibrated(model: nn.Module, x: Tensor) -> fx.GraphModule:
    prepared = fxq.prepare(model, x)
    fxq.calibrate(prepared, [x], progress=False, bias_correction=False)
    return prepared


def output_with(gm: fx.GraphModule, x: Tensor, on: list[Quantizer]) -> Tensor:
    """The graph's output with some quantizers on and the rest standing aside."""
    for quantizer in quantizers(gm).values():
        quantizer.mode = Mode.QUANTIZE if quantizer in on else Mode.OFF
    with torch.no_grad():
        result: Tensor = gm(x)
    return result


def sqnr(real: Tensor, other: Tensor) -> float:
    noise = (real.double() - other.double()).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(real.double().square().sum() / noise))


@pytest.mark.parametrize(("build", "shape"), [(lenet, (1, 28, 28)), (basic_net, (3, 16, 16))])
def test_each_row_is_what_toggling_by_hand_gives(build: object, shape: tuple[int, ...]) -> None:
    model, x = build(), image(4, *shape)  # type: ignore[operator]
    gm = calibrated(model, x)
    found = fxq.sensitivity(gm, x, progress=False)
    order = list(quantizers(gm).values())
    by_name = {q.tensor: q for q in order}
    assert sorted(row.tensor for row in found.rows) == sorted(by_name)
    real = output_with(gm, x, [])
    before: list[Quantizer] = []
    for row in found.rows:
        own = by_name[row.tensor]
        before.append(own)
        assert row.alone == pytest.approx(sqnr(real, output_with(gm, x, [own])), rel=1e-4)
        assert row.cumulative == pytest.approx(sqnr(real, output_with(gm, x, before)), rel=1e-4)
    assert found.rows[-1].cumulative == pytest.approx(sqnr(real, output_with(gm, x, order)), rel=1e-4)


def test_nothing_is_changed() -> None:
    gm = calibrated(basic_net(), image(4, 3, 16, 16)).train()
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    fxq.sensitivity(gm, image(2, 3, 16, 16, seed=1), progress=False)
    assert gm.training
    assert {q.mode for q in quantizers(gm).values()} == {Mode.OBSERVE}
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


def test_the_tensor_that_was_spoilt_comes_first() -> None:
    gm = calibrated(basic_net(), image(4, 3, 16, 16))
    name = next(name for name, q in quantizers(gm).items() if q.weight and "conv2" in name)
    spoilt = quantizers(gm)[name]
    spoilt.set_parameters(spoilt.scale * 300, spoilt.zero_point)
    found = fxq.sensitivity(gm, image(4, 3, 16, 16), progress=False)
    assert found.worst(1)[0].tensor == spoilt.tensor
    assert found.worst(1)[0].weight


def test_batches_add_up() -> None:
    x = image(8, 3, 16, 16)
    gm = calibrated(basic_net(), x)
    whole, parts = (fxq.sensitivity(gm, given, progress=False) for given in (x, list(x.split(4))))
    assert whole.samples == parts.samples == 8
    assert [r.alone for r in parts.rows] == pytest.approx([r.alone for r in whole.rows], rel=1e-3)


def test_text_and_data() -> None:
    gm = calibrated(lenet(), image(4, 1, 28, 28))
    found = fxq.sensitivity(gm, image(4, 1, 28, 28), progress=False)
    assert found.worst(1)[0].tensor in str(found)
    assert len(json.loads(json.dumps(found.to_dict()))["rows"]) == len(found.rows)


def test_training_graph() -> None:
    x = image(4, 3, 16, 16)
    gm = fxq.prepare_qat(basic_net(), x)
    fxq.calibrate(gm, [x], progress=False)
    found = fxq.sensitivity(gm, x, progress=False)
    assert len(found.rows) == len(quantizers(gm))


def test_declined() -> None:
    x = image(4, 1, 28, 28)
    with pytest.raises(CalibrationError, match="no scale"):
        fxq.sensitivity(fxq.prepare(lenet(), x), x)
    gm = calibrated(lenet(), x)
    with pytest.raises(FxqError, match="no quantizers"):
        fxq.sensitivity(fxq.convert(gm), x)
    with pytest.raises(CalibrationError, match="no input"):
        fxq.sensitivity(gm, [])
