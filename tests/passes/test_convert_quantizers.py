"""Conversion: observers become quantize and dequantize, weights become integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import (
    MAX,
    STUDY,
    Lambda,
    activation_quantizers,
    check_pass,
    convert,
    fake_quantized,
    node,
    of_kind,
    prepared,
)
from torch import Tensor, fx, nn
from toys import (
    basic_net,
    bottleneck_net,
    branches,
    image,
    lenet,
    nested_inputs,
    nested_model,
    preactivation_net,
    seeded,
)

import fxq
from fxq.calibration import calibrate
from fxq.errors import CalibrationError, ConvertError
from fxq.graph import edge_annotations, state, tensor_info
from fxq.passes.convert_quantizers import ConvertQuantizers
from fxq.printer import format_graph
from fxq.qdq import DEQUANTIZE, QUANTIZE, dequantize, quantize
from fxq.quantizer import quantizers
from fxq.recipe import DTYPES, EdgeSpecs, PerChannel, QSpec, Recipe, Rule
from fxq.verify import is_quantizer

X = (2, 3, 16, 16)


def calibrated(model: nn.Module, *args: Any, recipe: Recipe | None = None, target: Any = "tensorrt") -> fx.GraphModule:
    gm = prepared(model, *args, recipe=recipe, target=target)
    calibrate(gm, [args], progress=False)
    return gm


def bit_equal(gm: fx.GraphModule, *args: Tensor) -> fx.GraphModule:
    """The converted graph, which gives bit for bit what the quantizers in mode QUANTIZE give."""
    quantized = convert(gm)
    with torch.no_grad():
        expected, got = fake_quantized(gm)(*args), quantized(*args)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert not [n for n in quantized.graph.nodes if is_quantizer(n)]
    return quantized


def test_golden_and_second_run() -> None:
    """Scales set by hand, so that the text depends on no arithmetic."""
    gm = prepared(basic_net(), image(*X), recipe=MAX)
    for index, quantizer in enumerate(quantizers(gm).values()):
        channels = () if quantizer.axis is None else (gm.get_parameter(_weight_path(gm, quantizer.tensor)).shape[0],)
        quantizer.set_parameters(torch.full(channels, 2.0**-index), torch.zeros(channels, dtype=torch.int32))
    result = check_pass(ConvertQuantizers(), gm, "passes/convert_basic")
    assert {"quantized", "observed"} <= state(result.graph_module).properties


def _weight_path(gm: fx.GraphModule, name: str) -> str:
    return str(node(gm, name).target)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (lenet, (2, 1, 28, 28)),
    "basic": (basic_net, X),
    "bottleneck": (bottleneck_net, X),
    "pre-activation": (preactivation_net, X),
    "branches": (branches, X),
}


@pytest.mark.parametrize("name", MODELS)
def test_converted_is_bit_equal_to_fake_quantized(name: str) -> None:
    build, shape = MODELS[name]
    gm = calibrated(build(), image(*shape))
    quantized = bit_equal(gm, image(*shape, seed=1))
    with torch.no_grad():
        expected = build()(image(*shape))
        error = quantized(image(*shape)) - expected
    assert 0 < float(error.square().mean() / expected.square().mean()) < 1e-2


SPECS: dict[str, tuple[QSpec, QSpec]] = {
    "uint8 asymmetric": (QSpec("uint8", symmetric=False, method="max"), QSpec()),
    "uint8 asymmetric weights too": (
        QSpec("uint8", symmetric=False, method="max"),
        QSpec("uint8", symmetric=False, method="max"),
    ),
    "int8 asymmetric": (QSpec("int8", symmetric=False, method="max"), QSpec("int8", symmetric=False)),
    "fp8": (QSpec("float8_e4m3fn", method="max"), QSpec("float8_e4m3fn")),
    "int16 activations, int4 weights": (QSpec("int16", method="max"), QSpec("int4")),
    "uint4 weights per tensor": (QSpec(), QSpec("uint4", symmetric=False, granularity="per-tensor")),
    "activations per channel": (QSpec(granularity=PerChannel(1), method="max"), QSpec()),
}


@pytest.mark.parametrize("name", SPECS)
def test_nothing_assumes_int8_or_a_zero_zero_point(name: str) -> None:
    activation, weight = SPECS[name]
    recipe = Recipe([Rule("op:conv2d", EdgeSpecs(input=activation, weight=weight))])
    gm = calibrated(basic_net(), image(*X), recipe=recipe, target=STUDY)
    quantized = bit_equal(gm, image(*X, seed=1))
    first = node(quantized, "x_quantize")
    held, spec = tensor_info(first), edge_annotations(node(quantized, "stem_1"))[0].spec
    assert held is not None
    assert spec is not None
    assert held.dtype is spec.qdtype.storage
    assert quantized.get_buffer("stem.0.weight").dtype is (weight.dtype or DTYPES["int8"]).storage  # type: ignore[union-attr]
    if activation.symmetric is False:
        assert int(quantized.get_buffer("quantizers.x.zero_point")) != 0
    with torch.no_grad():
        expected = basic_net()(image(*X))
        noise = (quantized(image(*X)) - expected).square().mean() / expected.square().mean()
    assert float(noise) < (0.2 if "4" in name else 1e-2)


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(["int8", "uint8", "int4", "uint4", "int16", "float8_e4m3fn"]),
    symmetric=st.booleans(),
    output=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_spec_on_any_edge(dtype: str, symmetric: bool, output: bool, seed: int) -> None:
    spec = QSpec(dtype, symmetric or dtype.startswith("float"), "per-tensor", "max")
    recipe = Recipe([Rule("*", spec), *([Rule("op:relu", EdgeSpecs(output=spec))] if output else [])])
    gm = calibrated(branches(), image(*X, seed=seed), recipe=recipe, target=STUDY)
    bit_equal(gm, image(*X, seed=seed + 1))


def test_output_quantizers() -> None:
    recipe = Recipe([Rule("op:relu", EdgeSpecs(output=QSpec(method="max"))), Rule("fc3", EdgeSpecs(output=QSpec()))])
    gm = calibrated(lenet(), image(2, 1, 28, 28), recipe=recipe)
    quantized = bit_equal(gm, image(2, 1, 28, 28))
    for relu in of_kind(quantized, "relu"):
        assert [user.target for user in relu.users] == [QUANTIZE]
    (output,) = [n for n in quantized.graph.nodes if n.op == "output"]
    assert output.args[0].target is DEQUANTIZE  # type: ignore[union-attr]
    with torch.no_grad():
        logits = quantized(image(2, 1, 28, 28))
    steps = logits / quantized.get_buffer("quantizers.fc3.scale")
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_another_type_get_it_back(dtype: torch.dtype) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))).to(dtype)
    gm = calibrated(model, image(4, 8).to(dtype), recipe=MAX)
    quantized = bit_equal(gm, image(4, 8, seed=1).to(dtype))
    assert quantized(image(4, 8).to(dtype)).dtype is dtype
    casts = [n for n in quantized.graph.nodes if n.name.endswith("_cast")]
    assert len(casts) == 4
    assert {tensor_info(n).dtype for n in casts} == {dtype}  # type: ignore[union-attr]


# What stays as it was.


def test_prepared_stays_usable() -> None:
    gm = calibrated(basic_net(), image(*X))
    text, keys = format_graph(gm), {k: v.clone() for k, v in gm.state_dict().items()}
    first = convert(gm)
    assert format_graph(gm) == text
    assert all(torch.equal(v, keys[k]) for k, v in gm.state_dict().items())
    second = convert(gm)
    assert format_graph(first) == format_graph(second)
    assert torch.equal(first(image(*X)), second(image(*X)))
    calibrate(gm, [3 * image(*X)], progress=False)
    third = convert(gm)
    assert float(third.get_buffer("quantizers.x.scale")) > float(first.get_buffer("quantizers.x.scale"))


def test_converting_twice() -> None:
    quantized = fxq.convert(calibrated(lenet(), image(1, 1, 28, 28)))
    with pytest.raises(ConvertError, match="converted already"):
        fxq.convert(quantized)
    with pytest.raises(CalibrationError, match="converted already"):
        fxq.calibrate(quantized, [image(1, 1, 28, 28)], progress=False)


def test_state_dict() -> None:
    gm = calibrated(basic_net(), image(*X))
    quantized = convert(gm)
    keys = set(quantized.state_dict())
    model_keys = {k for k in gm.state_dict() if not k.startswith("quantizers.")}
    assert {k for k in keys if not k.startswith("quantizers.")} == model_keys
    tensors = [n.args[0].name for n in gm.graph.nodes if is_quantizer(n)]
    assert {k for k in keys if k.startswith("quantizers.")} == {
        f"quantizers.{t}.{what}" for t in tensors for what in ("scale", "zero_point")
    }
    fresh = convert(calibrated(basic_net(), 2 * image(*X)))
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(image(*X)), quantized(image(*X)))


def test_weights_are_integer_buffers_at_their_own_key() -> None:
    model = lenet()
    quantized = convert(calibrated(model, image(1, 1, 28, 28), recipe=MAX))
    for name in ("conv1", "conv2", "fc1", "fc2", "fc3"):
        integers = quantized.get_buffer(f"{name}.weight")
        assert integers.dtype is torch.int8
        scale = quantized.get_buffer(f"quantizers.{name}_weight.scale")
        weight = model.get_parameter(f"{name}.weight").detach()
        error = dequantize(integers, scale, torch.zeros_like(scale, dtype=torch.int32), 0) - weight
        assert (error.abs().flatten(1).amax(1) <= scale / 2 * (1 + 1e-5)).all()
        assert integers.flatten(1).abs().amax(1).eq(127).all()
    assert not [n for n, _ in quantized.named_parameters() if n.endswith("weight")]
    assert all(not buffer.requires_grad for buffer in quantized.buffers())


def test_copies() -> None:
    quantized = convert(calibrated(basic_net(), image(*X)))
    twin = copy.deepcopy(quantized)
    assert format_graph(twin) == format_graph(quantized)
    for name in ("target", "recipe", "properties", "notes", "provenance"):
        assert getattr(state(twin), name) == getattr(state(quantized), name)
    assert torch.equal(twin(image(*X)), quantized(image(*X)))
    assert twin.get_buffer("stem.0.weight").data_ptr() != quantized.get_buffer("stem.0.weight").data_ptr()
    assert not quantized.training


def test_nested_inputs_and_outputs() -> None:
    args = nested_inputs()
    gm = fxq.prepare(nested_model(), args)
    calibrate(gm, [args], progress=False)
    with torch.no_grad():
        expected, got = fake_quantized(gm)(*args), convert(gm)(*args)
    assert torch.equal(got["sum"], expected["sum"])
    assert torch.equal(got["parts"][0], expected["parts"][0])
    assert torch.equal(got["parts"][1], args[0]["b"])


# Weights that somebody else reads.


def test_a_weight_that_is_read_in_float_too() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.fc(x) + m.fc.weight.mean(), fc=nn.Linear(8, 8)))
    quantized = bit_equal(calibrated(model, image(2, 8)), image(2, 8))
    assert torch.equal(quantized.get_parameter("fc.weight"), model.get_parameter("fc.weight"))
    assert quantized.get_buffer("fc.weight_int8").dtype is torch.int8


def test_a_module_called_twice_has_one_integer_weight() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.fc(torch.relu(m.fc(x))), fc=nn.Linear(8, 8)))
    quantized = bit_equal(calibrated(model, image(2, 8)), image(2, 8))
    assert quantized.get_buffer("fc.weight").dtype is torch.int8
    assert {k for k in quantized.state_dict() if k.startswith("fc.")} == {"fc.bias", "fc.weight"}
    assert len([n for n in quantized.graph.nodes if n.target == "fc.weight"]) == 1


def test_tied_parameters() -> None:
    """An embedding whose weight is the classifier's too keeps reading floats."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(x)))

    model = seeded(Tied)
    x = torch.arange(10).view(2, 5)
    quantized = bit_equal(calibrated(model, x), x)
    assert torch.equal(quantized.get_parameter("embedding.weight"), model.get_parameter("embedding.weight"))
    assert quantized.get_buffer("head.weight").dtype is torch.int8


# What is missing.


def test_unfed_quantizers_are_all_named() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28))
    with pytest.raises(CalibrationError) as caught:
        convert(gm)
    assert caught.value.message.startswith("5 quantizers have no scale")
    for name in activation_quantizers(gm):
        assert name in caught.value.message
    assert "max_pool2d (" not in caught.value.message  # the model's own call has no module path
    assert "weight" not in caught.value.message
    assert "fxq.calibrate" in str(caught.value.hint)
    with pytest.raises(CalibrationError, match=r"no data: x, body_1 \(body\.1\)"):
        convert(prepared(seeded(_Body), image(2, 8)))


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_failed_conversion_leaves_the_prepared_graph_alone() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28))
    text = format_graph(gm)
    with pytest.raises(CalibrationError):
        convert(gm)
    assert format_graph(gm) == text
    calibrate(gm, [image(1, 1, 28, 28)], progress=False)
    bit_equal(gm, image(1, 1, 28, 28))


def test_a_weight_with_a_scale_of_its_own_keeps_it() -> None:
    """What calibration, or somebody with a better idea, solved is what is converted."""
    gm = calibrated(lenet(), image(1, 1, 28, 28))
    quantizer = quantizers(gm)["fc1_weight"]
    quantizer.set_parameters(quantizer.scale * 2, quantizer.zero_point)
    quantized = bit_equal(gm, image(1, 1, 28, 28))
    assert torch.equal(quantized.get_buffer("quantizers.fc1_weight.scale"), quantizer.scale)


def test_nodes_and_their_origin() -> None:
    gm = calibrated(basic_net(), image(*X))
    quantized = convert(gm)
    real = node(quantized, "stem_2_dequantize")
    integers = real.args[0]
    assert isinstance(integers, fx.Node)
    assert integers.name == "stem_2_quantize"
    assert integers.args[0] is node(quantized, "stem_2")
    assert real.meta["origin"].module_path == integers.meta["origin"].module_path == "stem.2"
    scale, zero_point = real.args[1:3]
    assert (scale.target, zero_point.target) == ("quantizers.stem_2.scale", "quantizers.stem_2.zero_point")  # type: ignore[union-attr]
    x = image(*X)
    held = quantized.get_buffer("quantizers.stem_2.scale")
    expected = dequantize(
        quantize(x, held, torch.zeros((), dtype=torch.int32), None, "int8"), held, torch.zeros(()), None
    )
    torch.testing.assert_close(expected, x, rtol=0, atol=float(held) * 200)


def test_a_graph_without_quantizers() -> None:
    gm = prepared(seeded(lambda: Lambda(lambda _, x: F.relu(x))), image(2, 3))
    result = check_pass(ConvertQuantizers(), gm)
    assert not result.modified
    assert torch.equal(convert(gm)(image(2, 3)), image(2, 3).relu())
