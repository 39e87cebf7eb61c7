"""Feeding data: every form of batch, repeatable, and errors that name the place."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from fxq import calibration
from fxq.batches import Inputs, model_inputs, random_batches
from fxq.calibration import calibrate, solve
from fxq.errors import CalibrationError
from fxq.graph import ORIGIN, Origin
from fxq.quantizer import Mode, Quantizer, quantizers
from fxq.recipe import METHODS, QSpec


class Net(nn.Module):
    """Two inputs, a weight, a shared scale, and a place where NaN can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.weight).relu()
        ratio = hidden / y
        root = ratio.sqrt()
        return torch.cat([hidden, root], 1)


PLACES = {"x": None, "weight": None, "hidden": None, "relu": "cat", "sqrt": "cat"}


def prepared(method: str = "max") -> fx.GraphModule:
    """Net with quantizers on its input, its weight, and both inputs of the concatenation, which are tied."""
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Net())
    gm.add_submodule("quantizers", nn.Module())
    spec = QSpec("int8", symmetric=True, granularity="per-tensor", method=method)
    for node in list(gm.graph.nodes):
        if node.name not in PLACES:
            continue
        node.meta[ORIGIN] = Origin(module_path=f"net.{node.name}", source="net.py:7")
        weight = node.op == "get_attr"
        quantizer = Quantizer(spec, tensor=node.name, axis=0 if weight else None, tie=PLACES[node.name], weight=weight)
        gm.add_submodule(f"quantizers.{node.name}", quantizer)
        with gm.graph.inserting_after(node):
            call = gm.graph.call_module(f"quantizers.{node.name}", (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, own=call: user is not own)
    gm.recompile()
    return gm


def batch(size: int = 4, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3) * scale, torch.rand(size, 4) + 0.5


def scales(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {name: q.scale.clone() for name, q in quantizers(gm).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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


def test_no_batch_is_an_error() -> None:
    spent = iter([])
    for nothing in ([], spent, DataLoader([])):  # type: ignore[arg-type]
        with pytest.raises(CalibrationError, match=r"no batch[\s\S]*only once"):
            calibrate(prepared(), nothing)


def test_a_graph_without_quantizers_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"no quantizers[\s\S]*fxq.prepare"):
        calibrate(fx.symbolic_trace(Net()), [batch()])


def test_quantizers_that_see_nothing_are_all_named() -> None:
    gm = prepared()
    for name in ("relu", "sqrt"):
        gm.quantizers.get_submodule(name).forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"2 quantizers saw no data: relu \(net.relu\), sqrt \(net.sqrt\)"):
        calibrate(gm, [batch()])
    assert not quantizers(gm)["x"].solved


@pytest.mark.parametrize("index", [0, 6, 7, 8, 19])
def test_nan_names_the_node_that_made_it_and_the_batch(index: int) -> None:
    data = [batch() for _ in range(20)]
    data[index][1][0, 0] = -1.0  # the root of a negative number; relu gave a positive numerator
    data[index][0][0] = prepared().weight[0] * 5
    with pytest.raises(CalibrationError) as caught:
        calibrate(prepared(), iter(data))
    error = caught.value
    assert error.message == f"batch {index}: NaN first comes up in sqrt"
    assert (error.node, error.module_path) == ("sqrt", "net.sqrt")
    assert error.source is not None
    assert "net.py:7" in error.source


def test_inf_before_nan_is_told() -> None:
    data = [batch() for _ in range(3)]
    x, y = data[1]
    x[:2] = prepared().weight[0] * 5
    y[:2, 0] = torch.tensor([0.0, -1.0])
    with pytest.raises(CalibrationError, match=r"batch 1: NaN first comes up in sqrt, and Inf before it in truediv"):
        calibrate(prepared(), data)


def test_bad_input_is_told_apart() -> None:
    data = [batch() for _ in range(3)]
    data[2][0][1, 1] = torch.inf
    with pytest.raises(CalibrationError, match="batch 2: the input x holds Inf itself"):
        calibrate(prepared(), data)


def test_nan_in_a_loop_of_ones_own_is_found_too() -> None:
    data = [batch() for _ in range(3)]
    data[1][0][0, 0] = torch.nan

    def forward(model: Any, pair: Any) -> None:
        assert model.training is False  # attributes are there in the second run as well
        model(y=pair[1], x=pair[0])

    with pytest.raises(CalibrationError, match="batch 1: the input x holds NaN itself"):
        calibrate(prepared(), data, forward=forward)


def test_nan_that_does_not_come_again_is_admitted() -> None:
    calls = itertools.count()

    def forward(model: Any, pair: Any) -> None:
        x, y = pair
        model(x * torch.nan if next(calls) == 0 else x, y)

    with pytest.raises(CalibrationError, match=r"quantizers of x, relu, sqrt[\s\S]*random"):
        calibrate(prepared(), [batch()], forward=forward)


def test_infinite_masks_off_the_quantized_paths_are_fine() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, -torch.inf).softmax(-1)

    gm = fx.symbolic_trace(Masked())
    gm.add_submodule("quantizers", nn.Module())
    softmax = next(n for n in gm.graph.nodes if n.name == "softmax")
    gm.add_submodule(
        "quantizers.softmax",
        Quantizer(QSpec("int8", symmetric=True, granularity="per-tensor", method="max"), tensor="softmax", axis=None),
    )
    with gm.graph.inserting_after(softmax):
        call = gm.graph.call_module("quantizers.softmax", (softmax,))
    softmax.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    gm.recompile()
    calibrate(gm, [torch.tensor([[1.0, -2.0, 3.0]])])
    with pytest.raises(
        CalibrationError, match="batch 0: NaN first comes up in softmax, and Inf before it in masked_fill"
    ):
        calibrate(gm, [torch.tensor([[-1.0, -2.0, -3.0]])])


def test_ctrl_c_keeps_what_was_collected() -> None:
    data = [batch() for _ in range(9)]

    def stopping() -> Iterator[Any]:
        yield from data[:6]
        raise KeyboardInterrupt

    gm, other = prepared("mse"), prepared("mse")
    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(gm, stopping())
    assert any("6 batches" in note for note in caught.value.__notes__)
    assert not quantizers(gm)["x"].solved
    assert solve(gm).batches == 6
    calibrate(other, data[:6])
    assert equal(scales(gm), scales(other))
    calibrate(gm, data[6:], reset=False)
    calibrate(other, data)
    assert equal(scales(gm), scales(other))


def test_ctrl_c_inside_a_batch_says_so() -> None:
    calls = itertools.count()

    def forward(model: Any, given: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        model(*given)

    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(prepared("mse"), [batch() for _ in range(9)], forward=forward)
    assert any("3 batches and a part of the next one" in note for note in caught.value.__notes__)


def test_an_error_of_the_model_says_which_batch() -> None:
    with pytest.raises(RuntimeError) as caught:
        calibrate(prepared(), [batch(), (torch.randn(4, 99), torch.randn(4, 4))])
    assert "while fxq calibrated on batch 1" in caught.value.__notes__


def test_a_copy_calibrates_by_itself() -> None:
    gm = prepared()
    calibrate(gm, [batch()])
    before, twin = scales(gm), copy.deepcopy(gm)
    calibrate(twin, [batch(scale=50)])
    assert equal(scales(gm), before)
    assert not equal(scales(twin), before)


def test_marks_say_what_is_odd() -> None:
    gm = prepared("entropy")
    x, y = batch(4000)
    x[0, 0] = 1000.0
    row = calibrate(gm, [(x, y)]).rows[0]
    assert row.marks == ("outlier",)
    assert row.counted == 1.0
    rows = calibrate(gm, [(torch.zeros(4, 3), y[:4])]).rows
    assert [row.marks for row in rows] == [("all-zero",)] * 3


def test_the_report_prints_as_a_table() -> None:
    text = str(calibrate(prepared(), [batch()] * 2))
    assert text.startswith("calibrated on 2 batches")
    assert "net.relu" in text
    assert "scale" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 118


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


def test_the_place_of_nan_is_sought_only_when_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NonfiniteProbe", None)
    calibrate(prepared(), [batch() for _ in range(20)])


@pytest.mark.gpu
def test_batches_move_to_the_model() -> None:
    gm, here = prepared("mse").cuda(), prepared("mse")
    data = [batch(8) for _ in range(10)]
    calibrate(gm, data)
    calibrate(here, data)
    for name, scale in scales(here).items():
        torch.testing.assert_close(scales(gm)[name].cpu(), scale, rtol=1e-3, atol=0)
    assert np.isfinite(float(gm(*(t.cuda() for t in data[0])).detach().sum()))


def errors_by_method(x: Tensor) -> dict[str, float]:
    """The summed squared error of quantizing x by each method's scale."""
    gm = prepared("mse")
    calibrate(gm, [(x, torch.rand(len(x), 4) + 0.5)])
    quantizer = quantizers(gm)["x"]

    def error(method: str) -> float:
        solve(gm, method)
        quantizer.mode = Mode.QUANTIZE
        try:
            return float((quantizer(x) - x).square().sum())
        finally:
            quantizer.mode = Mode.OBSERVE

    return {method: error(method) for method in ("max", "percentile", "entropy", "mse", "auto")}


def test_auto_takes_the_least_error_of_all_methods() -> None:
    errors = errors_by_method(torch.cat([torch.randn(20_000, 3), 30 * torch.randn(40, 3)]))
    assert errors["auto"] <= 1.001 * min(errors.values())
    assert errors["max"] > 1.03 * errors["auto"]


def test_auto_is_cautious_where_few_values_tell_methods_apart() -> None:
    errors = errors_by_method(torch.cat([torch.randn(2000, 3), 30 * torch.randn(4, 3)]))
    assert min(errors.values()) < errors["auto"] == errors["max"]


def test_auto_says_what_it_chose() -> None:
    gm = prepared("mse")
    calibrate(gm, [batch(500)])
    assert re.fullmatch(r"auto \((mse|entropy|percentile|max)\)", solve(gm, "auto").rows[0].method)


def test_auto_needs_histograms() -> None:
    gm = prepared("max")
    calibrate(gm, [batch()])
    before = scales(gm)
    with pytest.raises(CalibrationError, match="cannot answer the method 'auto'"):
        solve(gm, "auto")
    assert equal(scales(gm), before)


def test_saturating_tensors_are_marked() -> None:
    gm = prepared("mse")
    x, y = batch(4000)
    assert calibrate(gm, [(x, y)]).rows[0].marks == ()
    assert calibrate(gm, [(x.clamp(-0.5, 0.5), y)]).rows[0].marks == ("saturating",)


def test_dead_channels_are_marked() -> None:
    gm = prepared()
    data = [batch() for _ in range(3)]
    for x, _ in data:
        x[:, 1] = 0
    assert calibrate(gm, data).rows[0].marks == ("1 dead channel",)
    data[0][0][0, 1] = 1.0
    assert calibrate(gm, data).rows[0].marks == ()


def test_a_picture_shows_the_histogram_and_every_methods_end() -> None:
    report = calibrate(prepared("mse"), [batch(4000)])
    figure = report.plot("x")
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == ["max", "percentile", "entropy", "mse", "in"]
    heights = axes.patches[0].get_data().values
    assert heights.sum() == 12_000
    assert "100% of 12000 values" in axes.get_title()
    with pytest.raises(CalibrationError, match="no calibrated tensor is called 'z'"):
        report.plot("z")
    with pytest.raises(CalibrationError, match="has no histogram"):
        calibrate(prepared("max"), [batch()]).plot("x")
