"""Comparing a float model with its quantized graph, tensor by tensor."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from toys import basic_net, bottleneck_net, image, lenet, nested_inputs, nested_model, preactivation_net

import fxq
from fxq.errors import CalibrationError, FxqError
from fxq.quantizer import Mode, quantizers

MODELS = {
    "lenet": (lenet, (1, 28, 28)),
    "basic": (basic_net, (3, 16, 16)),
    "bottleneck": (bottleneck_net, (3, 16, 16)),
    "preactivation": (lambda: preactivation_net(norm=True), (3, 16, 16)),
}


def calibrated(model: nn.Module, x: Tensor) -> fx.GraphModule:
    prepared = fxq.prepare(model, x)
    fxq.calibrate(prepared, [x], progress=False)
    return prepared


class Kept(fx.Interpreter):
    """Keeps what every node gives."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Tensor:
        self.kept[n.name] = super().run_node(n)
        return self.kept[n.name]


def sqnr(real: Tensor, other: Tensor) -> float:
    real, other = real.double(), other.double()
    return float(10 * torch.log10(real.square().sum() / (real - other).square().sum()))


@pytest.mark.parametrize("name", MODELS)
def test_rows_say_what_the_model_and_the_graph_give(name: str) -> None:
    """Against the user's own model, watched from outside: no part of fxq's reference graph is trusted."""
    build, shape = MODELS[name]
    model, x = build(), image(4, *shape)
    quantized = fxq.convert(calibrated(model, x))
    seen: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(lambda _m, _i, y, path=path: seen.update({path: y.clone()}))
    watcher = Kept(quantized)
    with torch.no_grad():
        model(x)
        watcher.run(x)
    rows = {row.node: row for row in fxq.compare(model, quantized, x).rows}
    checked = 0
    for path, real in seen.items():
        row = rows.get(("_" if path[0].isdigit() else "") + path.replace(".", "_"))
        if row is not None:
            other = watcher.kept[row.node]
            assert row.sqnr == pytest.approx(sqnr(real, other), rel=1e-4)
            assert row.max_error == pytest.approx(float((real - other).abs().max()), rel=1e-3, abs=1e-6)
            assert row.cosine == pytest.approx(
                float(torch.cosine_similarity(real.flatten(), other.flatten(), 0)), abs=1e-5
            )
            checked += 1
    assert checked >= 3


def test_a_prepared_graph_compares_like_its_converted_form() -> None:
    model, x = basic_net(), image(4, 3, 16, 16)
    prepared = fxq.prepare(model, x)
    fxq.calibrate(prepared, [x], progress=False, bias_correction=False)
    before = {name: q.observer.state_dict() for name, q in quantizers(prepared).items() if q.observer is not None}
    one = fxq.compare(model, prepared, x)
    two = fxq.compare(prepared, fxq.convert(prepared), x)
    assert [row.node for row in one.rows] == [row.node for row in two.rows]
    assert [row.sqnr for row in one.rows] == pytest.approx([row.sqnr for row in two.rows], rel=1e-5)
    assert {q.mode for q in quantizers(prepared).values()} == {Mode.OBSERVE}
    for name, state in before.items():  # comparing is not calibrating
        observer = quantizers(prepared)[name].observer
        assert observer is not None
        assert all(torch.equal(state[key], value) for key, value in observer.state_dict().items())


def test_batches_add_up() -> None:
    model, x = basic_net(), image(8, 3, 16, 16)
    quantized = fxq.convert(calibrated(model, x))
    whole, parts = fxq.compare(model, quantized, x), fxq.compare(model, quantized, list(x.split(2)))
    assert whole.samples == parts.samples == 8
    assert [row.sqnr for row in parts.rows] == pytest.approx([row.sqnr for row in whole.rows], rel=1e-3)


def test_nested_inputs() -> None:
    inputs = nested_inputs()
    model = nested_model()
    prepared = fxq.prepare(model, inputs)
    fxq.calibrate(prepared, [inputs], progress=False)
    found = fxq.compare(model, fxq.convert(prepared), inputs)
    assert {"left", "right"} <= {row.node for row in found.rows}


def test_an_unquantized_graph_differs_nowhere() -> None:
    model, x = basic_net(), image(2, 3, 16, 16)
    prepared = fxq.prepare(model, x, recipe=fxq.Recipe([fxq.Rule("*", None)]))
    found = fxq.compare(model, prepared, x)
    assert all(row.sqnr == math.inf and row.max_error == 0 and row.cosine == pytest.approx(1) for row in found.rows)
    assert found.first_below(200) is None
    assert found.drops() == ()


def test_drop_names_the_operation_that_loses_most() -> None:
    """One layer's weight gets steps that are so wide that all of it becomes 0."""
    model, x = basic_net(), image(4, 3, 16, 16)
    prepared = calibrated(model, x)
    name = next(name for name, q in quantizers(prepared).items() if q.weight and "blocks_1_conv1" in name)
    quantizer = quantizers(prepared)[name]
    quantizer.set_parameters(quantizer.scale * 300, quantizer.zero_point)
    found = fxq.compare(model, prepared, x)
    assert found.drops(1)[0].module_path == "blocks.1.conv1"
    first = found.first_below(15)
    assert first is not None
    assert first.module_path == "blocks.1.conv1"


def test_with_the_exported_file(tmp_path: Path) -> None:
    model, x = basic_net(), image(4, 3, 16, 16)
    quantized = fxq.convert(calibrated(model, x))
    path = fxq.export(quantized, tmp_path / "model.onnx")
    found = fxq.compare(model, quantized, x, onnx=path)
    assert found.runtime == ()
    with_runtime = [row for row in found.rows if row.runtime_sqnr is not None]
    assert len(with_runtime) > len(found.rows) / 2
    assert all(row.runtime_sqnr == pytest.approx(row.sqnr, abs=1.0) for row in with_runtime)
    assert "ONNX Runtime agrees" in str(found)


def test_a_file_of_other_weights_is_seen(tmp_path: Path) -> None:
    model, x = lenet(), image(4, 1, 28, 28)
    quantized = fxq.convert(calibrated(model, x))
    path = fxq.export(quantized, tmp_path / "model.onnx")
    bias = quantized.get_parameter("fc1.bias")
    with torch.no_grad():
        bias += 0.5
    found = fxq.compare(model, quantized, x, onnx=path)
    assert found.runtime is not None
    assert found.runtime[0].node == "fc1"
    assert "first at fc1" in str(found)


def test_text_and_data() -> None:
    model, x = lenet(), image(4, 1, 28, 28)
    found = fxq.compare(model, fxq.convert(calibrated(model, x)), x)
    text = str(found)
    assert "where most is lost" in text
    assert "fc3" in found.table()
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["node"] == found.rows[0].node
    assert found.worst(1)[0].sqnr == min(row.sqnr for row in found.rows)


def test_training_graphs_are_compared_in_eval_mode_and_left_training() -> None:
    model, x = basic_net(), image(4, 3, 16, 16)
    gm = fxq.prepare_qat(model, x)
    fxq.calibrate(gm, [x], progress=False)
    gm.train()
    found = fxq.compare(model, gm, x)
    assert gm.training
    assert found.output.sqnr > 10


def test_declined() -> None:
    model, x = lenet(), image(4, 1, 28, 28)
    with pytest.raises(CalibrationError, match="no scale"):
        fxq.compare(model, fxq.prepare(model, x), x)
    quantized = fxq.convert(calibrated(model, x))
    with pytest.raises(CalibrationError, match="no input"):
        fxq.compare(model, quantized, [])
    other = calibrated(basic_net(), image(2, 3, 16, 16))
    with pytest.raises(FxqError):
        fxq.compare(other, quantized, x)
