"""Feeding data: every form of batch, repeatable, and put back as it was."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from calibrating import Net, batch, equal, prepared, scales
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxq.batches import Inputs, model_inputs, random_batches
from fxq.calibration import calibrate, solve
from fxq.errors import CalibrationError
from fxq.quantizer import Mode, Quantizer, quantizers
from fxq.recipe import METHODS, QSpec


def test_scales_come_from_the_data() -> None:
    gm, data = prepared(), [batch() for _ in range(11)]
    report = calibrate(gm, data)
    xs = torch.cat([x for x, _ in data])
    ys = torch.cat([y for _, y in data])
    net = Net()
    net.weight = gm.weight  # type: ignore[assignment]
    out = net(xs, ys)
    found = quantizers(gm)
    assert found["x"].scale == xs.abs().max() / 127
    assert found["relu"].scale == found["sqrt"].scale
    torch.testing.assert_close(found["relu"].scale, out.max() / 127)
    torch.testing.assert_close(found["weight"].scale, net.weight.abs().amax(1) / 127)
    assert report.batches == 11
    assert [row.name for row in report.rows] == ["x", "relu", "sqrt"]
    assert report.rows[0].amax == xs.max()
    assert report.rows[1].module_path == "net.relu"


FORMS = {
    "tuples": lambda data: data,
    "lists": lambda data: [list(pair) for pair in data],
    "with labels": lambda data: [(*pair, torch.tensor([1]), "file.png") for pair in data],
    "dicts": lambda data: [{"y": y, "x": x, "label": 3} for x, y in data],
    "arrays": lambda data: [(x.numpy(), y.numpy()) for x, y in data],
    "generator": lambda data: (pair for pair in data),
    "loader": lambda data: DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*data, strict=True))), 4),
    "inputs": lambda data: [Inputs((x,), {"y": y}) for x, y in data],
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_give_the_same(form: str) -> None:
    data = [batch() for _ in range(5)]
    one, other = prepared(), prepared()
    calibrate(one, data)
    report = calibrate(other, FORMS[form](data))
    assert equal(scales(one), scales(other))
    assert report.batches == 5


class Single(nn.Module):
    """One input and one optional one."""

    def forward(self, x: Any, mask: Any = None) -> Any:
        return x


def test_inputs_of_a_model_with_one_input() -> None:
    x, label = torch.randn(2), torch.tensor(1)
    assert model_inputs(Single(), x).args == (x,)
    assert model_inputs(Single(), (x, label)).args == (x,)
    assert model_inputs(Single(), {"x": x, "label": label}) == Inputs((), {"x": x})
    assert model_inputs(Single(), {"x": x, "mask": label}) == Inputs((), {"x": x, "mask": label})
    nested = {"image": x, "size": 3}
    assert model_inputs(Single(), nested).args == (nested,)


def test_a_tensor_alone_is_one_batch() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    gm.add_submodule("quantizers", nn.Module())
    gm.add_submodule(
        "quantizers.input_1",
        Quantizer(QSpec("int8", symmetric=True, granularity="per-tensor", method="max"), tensor="input_1", axis=None),
    )
    node = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(node):
        gm.graph.call_module("quantizers.input_1", (node,))
    gm.recompile()
    assert calibrate(gm, torch.randn(5, 3)).batches == 1
    assert calibrate(gm, [torch.randn(5, 3)] * 3).batches == 3


@pytest.mark.parametrize("given", [torch.randn(2, 3), (torch.randn(2, 3),), {"x": torch.randn(2, 3)}])
def test_a_batch_that_lacks_an_input_is_refused(given: Any) -> None:
    with pytest.raises(CalibrationError, match=r"\by\b"):
        calibrate(prepared(), [given])


@pytest.mark.parametrize("method", METHODS)
def test_calibrating_again_starts_afresh(method: str) -> None:
    gm, data = prepared(method), [batch() for _ in range(10)]
    calibrate(gm, data)
    first = scales(gm)
    calibrate(gm, [batch(scale=100)])
    assert not equal(scales(gm), first)
    calibrate(gm, data)
    assert equal(scales(gm), first)


@pytest.mark.parametrize("method", METHODS)
def test_going_on_equals_one_run(method: str) -> None:
    data = [batch() for _ in range(12)]
    whole, parts = prepared(method), prepared(method)
    calibrate(whole, data)
    calibrate(parts, data[:5])
    report = calibrate(parts, data[5:], reset=False)
    assert report.batches == 12
    for name, scale in scales(whole).items():
        torch.testing.assert_close(scales(parts)[name], scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_state_stops_and_goes_on_through_a_file(method: str, tmp_path: Any) -> None:
    data = [batch() for _ in range(12)]
    whole, stopped, resumed = prepared(method), prepared(method), prepared(method)
    calibrate(whole, data)
    calibrate(stopped, data[:5])
    save_file(stopped.state_dict(), tmp_path / "state.safetensors")
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    calibrate(resumed, data[5:], reset=False)
    for name, scale in scales(whole).items():
        torch.testing.assert_close(scales(resumed)[name], scale, rtol=1e-6, atol=0)


def test_solving_again_needs_no_data() -> None:
    gm = prepared("entropy")
    calibrate(gm, [batch(64) for _ in range(3)])
    first = scales(gm)
    for method in ("max", "percentile", "mse", "entropy"):
        report = solve(gm, method)
        assert {row.method for row in report.rows} == {method}
        found = quantizers(gm)
        assert found["relu"].scale == found["sqrt"].scale
        if method == "max":
            assert found["x"].scale >= first["x"]
    assert equal(scales(gm), first)
    with pytest.raises(CalibrationError, match=r"2 quantizers cannot be solved: x, relu: Histogram.*moving-average"):
        solve(gm, "moving-average")
    assert equal(scales(gm), first)


def test_max_batches_takes_no_more_than_it_says() -> None:
    drawn = 0

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield batch()

    assert calibrate(prepared(), endless(), max_batches=3).batches == 3
    assert drawn == 3
    with pytest.raises(CalibrationError, match="max_batches is 0"):
        calibrate(prepared(), endless(), max_batches=0)


def test_modes_are_put_back() -> None:
    gm = prepared()
    gm.train()
    quantizers(gm)["x"].mode = Mode.OFF
    quantizers(gm)["relu"].mode = Mode.QUANTIZE
    seen: list[tuple[bool, bool]] = []

    def forward(model: Any, pair: Any) -> None:
        seen.append((model.training, torch.is_inference_mode_enabled()))
        model(*pair)

    calibrate(gm, [batch()], forward=forward)
    assert seen == [(False, True)]
    assert gm.training
    assert all(module.training for module in gm.modules())
    assert quantizers(gm)["x"].mode is Mode.OFF
    assert quantizers(gm)["relu"].mode is Mode.QUANTIZE


def test_a_loop_of_ones_own_gets_the_batch_as_it_came() -> None:
    gm, other = prepared(), prepared()
    data = [{"deep": [batch(), batch()]} for _ in range(3)]

    def forward(model: Any, given: Any) -> None:
        for pair in given["deep"]:
            model(*pair)

    assert calibrate(gm, data, forward=forward).batches == 6
    calibrate(other, itertools.chain.from_iterable(d["deep"] for d in data))
    assert equal(scales(gm), scales(other))


def test_a_copy_calibrates_by_itself() -> None:
    gm = prepared()
    calibrate(gm, [batch()])
    before, twin = scales(gm), copy.deepcopy(gm)
    calibrate(twin, [batch(scale=50)])
    assert equal(scales(gm), before)
    assert not equal(scales(twin), before)


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(prepared(), [batch()])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    calibrate(prepared(), [batch()])
    assert "calibrate" in capsys.readouterr().err
    calibrate(prepared(), [batch()], progress=False)
    assert capsys.readouterr().err == ""


def test_random_batches_look_like_the_example_and_repeat() -> None:
    mask = torch.tensor([True, False])
    found = random_batches((torch.zeros(2, 3).half(), [mask, 5]), {"z": torch.zeros(2)}, count=3)
    again = random_batches((torch.zeros(2, 3).half(), [mask, 5]), {"z": torch.zeros(2)}, count=3)
    assert len(found) == 3
    for one, other in zip(found, again, strict=True):
        assert one.args[0].shape == (2, 3)
        assert one.args[0].dtype == torch.float16
        assert one.args[0].float().std() > 0.1
        assert one.args[1] == [mask, 5]
        assert torch.equal(one.args[0], other.args[0])
        assert torch.equal(one.kwargs["z"], other.kwargs["z"])
    assert not torch.equal(found[0].args[0], found[1].args[0])


def test_random_batches_calibrate() -> None:
    def forward(model: Any, inputs: Inputs) -> None:
        model(inputs.args[0], inputs.args[1].abs())  # Net takes the root of it

    assert calibrate(prepared(), random_batches(batch(), {}), forward=forward).batches == 8


def test_scales_do_not_depend_on_the_batch_size() -> None:
    x, y = batch(64)
    for method in ("max", "percentile", "entropy", "mse"):
        found = []
        for size in (1, 7, 64):
            gm = prepared(method)
            calibrate(gm, zip(x.split(size), y.split(size), strict=True))
            found.append(scales(gm))
        for other in found[1:]:
            for name in found[0]:
                torch.testing.assert_close(other[name], found[0][name], rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_batches_move_to_the_model() -> None:
    gm, here = prepared("mse").cuda(), prepared("mse")
    data = [batch(8) for _ in range(10)]
    calibrate(gm, data)
    calibrate(here, data)
    for name, scale in scales(here).items():
        torch.testing.assert_close(scales(gm)[name].cpu(), scale, rtol=1e-3, atol=0)
    assert np.isfinite(float(gm(*(t.cuda() for t in data[0])).detach().sum()))
