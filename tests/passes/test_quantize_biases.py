"""Biases become int32 in steps of input scale times weight scale, where a target asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import check_golden
from torch import Tensor, fx, nn
from toys import seeded

import fxq
from fxq.graph import constant
from fxq.passes import QuantizeBiases
from fxq.qdq import DEQUANTIZE
from fxq.target import Target

INTEGERS = {
    "name": "integers",
    "extends": "tensorrt",
    "activation": {"dtype": "uint8", "symmetric": False, "granularity": "per-tensor", "method": "max"},
    "residual": {"policy": "none"},
    "refuses": [],
    "bias": {
        "kinds": ["conv2d", "linear"],
        "rule": "R17",
        "reason": "it adds integers",
        "ranks": {"linear": 2},
    },
}


def target(**changes: object) -> Target:
    return Target.from_data({**INTEGERS, **changes}, "a test")


def converted(model: nn.Module, x: Tensor, **changes: object) -> fx.GraphModule:
    prepared = fxq.prepare(model, x, target=target(**changes))
    fxq.calibrate(prepared, [x], progress=False, bias_correction=False)
    return fxq.convert(prepared)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def bias_of(gm: fx.GraphModule, name: str) -> fx.Node:
    found = next(n for n in gm.graph.nodes if n.name == name).args[2]
    assert isinstance(found, fx.Node)
    return found


def test_biases_are_int32_in_steps_of_one_product() -> None:
    x = torch.rand(2, 3, 8, 8)
    model = seeded(small_net)
    gm = converted(model, x)
    check_golden("quantize_biases/small_net", fxq.format_graph(gm))
    for name, layer in (("_0", model[0]), ("_3", model[3])):
        node = next(n for n in gm.graph.nodes if n.name == name)
        bias = bias_of(gm, name)
        integers, scale = constant(bias.args[0]), constant(bias.args[1])
        assert integers is not None
        assert scale is not None
        assert integers.dtype == torch.int32
        product = constant(node.args[0].args[1]) * constant(node.args[1].args[1])
        torch.testing.assert_close(scale, product, rtol=0, atol=0)
        assert bool(((integers * scale.double() - layer.bias).abs() <= scale / 2 * (1 + 1e-6)).all())
    assert not QuantizeBiases()(gm).modified


def test_a_target_that_says_nothing_leaves_biases_float() -> None:
    gm = converted(seeded(small_net), torch.rand(2, 3, 8, 8), bias=None)
    assert bias_of(gm, "_0").op == "get_attr"
    assert "int32" not in fxq.format_graph(gm)


def test_a_channel_without_weights_keeps_its_bias() -> None:
    """BatchNorm leaves such channels: next to no weight, and a bias that int32 cannot hold in steps of it."""
    model, x = seeded(small_net), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model[0].weight[1] *= 1e-12
        model[0].bias[1] = 0.7
    gm = converted(model, x)
    bias = bias_of(gm, "_0")
    integers = constant(bias.args[0])
    assert integers is not None
    assert int(integers.abs().max()) <= 2**30
    torch.testing.assert_close(DEQUANTIZE(integers, *map(constant, bias.args[1:3]), 0)[1], torch.tensor(0.7))
    held = converted(model, x, bias=None)
    torch.testing.assert_close(gm(x), held(x), rtol=0, atol=1e-5)
    for untouched in (0, 2, 3):
        assert torch.equal(constant(gm_weight(gm))[untouched], constant(gm_weight(held))[untouched])


def gm_weight(gm: fx.GraphModule) -> fx.Node:
    weight = next(n for n in gm.graph.nodes if n.name == "_0").args[1].args[0]
    assert isinstance(weight, fx.Node)
    return weight


def test_a_bias_too_large_for_one_scale_stays_float_and_says_so() -> None:
    model, x = seeded(small_net), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model[0].weight *= 1e-9
        model[0].bias[1] = 0.7
    per_tensor = {"dtype": "int8", "symmetric": True, "granularity": "per-tensor", "method": "max"}
    gm = converted(model, x, weight=per_tensor)
    assert bias_of(gm, "_0").op == "get_attr"
    notes = [note.text for note in fxq.graph.state(gm).notes if note.rule == "R17"]
    assert notes == ["its bias stays float: it is too large for int32 in steps of input scale * weight scale"]
    assert constant(bias_of(gm, "_3").args[0]).dtype == torch.int32


def test_weights_that_two_layers_share_are_not_changed_for_a_bias() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model, x = seeded(Twice), torch.rand(8, 4)
    with torch.no_grad():
        model.layer.weight[1] *= 1e-12
        model.layer.bias[1] = 0.7
    gm = converted(model, x)
    notes = [note.node for note in fxq.graph.state(gm).notes if note.rule == "R17"]
    linears = [n for n in gm.graph.nodes if n.target is torch.nn.functional.linear]
    assert notes == [n.name for n in linears]
    torch.testing.assert_close(gm(x), converted(model, x, bias=None)(x), rtol=0, atol=0)


def test_a_shared_bias_becomes_one_for_each_scale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    x = torch.rand(8, 4)
    model = seeded(Shared)
    gm = converted(model, x)
    paths = {str(n.args[2].args[0].target) for n in gm.graph.nodes if n.target is torch.nn.functional.linear}
    assert len(paths) == 2
    torch.testing.assert_close(gm(x), converted(model, x, bias=None)(x), rtol=0, atol=1e-4)


def test_a_computed_bias_and_a_product_of_higher_rank_stay_float() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.layer(x).flatten(0, 1), self.layer.weight, bias)

    x, bias = torch.rand(2, 3, 4), torch.rand(4)
    prepared = fxq.prepare(seeded(Odd), (x, bias), target=target())
    fxq.calibrate(prepared, [(x, bias)], progress=False, bias_correction=False)
    gm = fxq.convert(prepared)
    notes = [note.text for note in fxq.graph.state(gm).notes if note.rule == "R17"]
    assert notes == [
        "its bias stays float: the kernel adds it for inputs of rank 2 alone",
        "its bias stays float: it is computed in the graph",
    ]


def test_onnx_runtime_runs_the_whole_network_in_integers(tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from fxq.backends.onnxrt import Session

    model, x = seeded(small_net), torch.rand(2, 3, 8, 8)
    gm = converted(model, x)
    path = fxq.export(gm, tmp_path / "m.onnx")
    torch.testing.assert_close(Session(path, optimize=False).run(x)[0], gm(x), rtol=0, atol=1e-5)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ran = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"QLinearConv", "QGemm"} <= ran
    assert not {"Conv", "Gemm", "FusedConv", "FusedGemm"} & ran
