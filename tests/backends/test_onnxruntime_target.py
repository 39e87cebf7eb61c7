"""The target of ONNX Runtime, end to end: which kernels its optimizer makes of a file, and what they compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from networks import sqnr_db
from placing import Lambda
from torch import Tensor, nn
from toys import image, seeded

import fxq
from fxq.backends.onnxrt import Session
from fxq.random_models import SHAPE as RANDOM
from fxq.random_models import random_model

SHAPE = (16, 16, 16)
"""As many channels as the kernels want, so that no heuristic leaves the first layer float."""


def conv(inputs: int = 16, outputs: int = 16, kernel: int = 3, **options: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def residual(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(torch.relu(m.stem(x)), 2)
    y = torch.relu(m.second(torch.relu(m.first(x))) + x)
    y = torch.relu(m.fourth(torch.relu(m.third(y))) + m.shortcut(y))
    return m.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def shortcut(m: Any, x: Tensor) -> Tensor:
    y = F.relu6(m.stem(x))
    y = torch.relu(m.down(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
    return m.head(F.avg_pool2d(y, 8).flatten(1))


def squeezed(
    activation: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]
) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = activation(m.wide(x))
        y = y * gate(m.up(activation(m.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = m.narrow(y) + x
        return m.head(F.adaptive_avg_pool2d(activation(m.last(y)), 1).flatten(1))

    return forward


def dense(m: Any, x: Tensor) -> Tensor:
    y = torch.relu(m.stem(x))
    for layer in (m.one, m.two):
        y = torch.cat([y, torch.relu(layer(y))], 1)
    return m.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def tokens(m: Any, x: Tensor) -> Tensor:
    y = m.patches(x).flatten(2).transpose(1, 2)
    q, k, v = m.qkv(m.norm(y)).chunk(3, -1)
    y = y + m.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)
    y = y + m.shrink(F.gelu(m.grow(m.norm(y))))
    return m.head(y.mean(1))


class Case(NamedTuple):
    """A network, and the kernels that ONNX Runtime is to make of it, with those that stay float last."""

    forward: Callable[[Any, Tensor], Tensor]
    parts: Callable[[], dict[str, nn.Module]]
    kernels: dict[str, int]
    floats: frozenset[str] = frozenset()


def _squeezing() -> dict[str, nn.Module]:
    return {
        "wide": conv(16, 32), "squeeze": nn.Conv2d(32, 16, 1), "up": nn.Conv2d(16, 32, 1), "narrow": conv(32, 16),
        "last": conv(16, 32, 1), "head": nn.Linear(32, 16),
    }  # fmt: skip


SQUEEZED = {"QLinearConv": 5, "QLinearGlobalAveragePool": 2, "QGemm": 1}
CASES = {
    "residual": Case(
        residual,
        lambda: {
            "stem": conv(), "first": conv(), "second": conv(), "third": conv(16, 32, stride=2), "fourth": conv(32, 32),
            "shortcut": conv(16, 32, 1, stride=2), "head": nn.Linear(32, 16),
        },
        {"QLinearConv": 6, "QLinearAdd": 2, "NhwcMaxPool": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "shortcut": Case(
        shortcut,
        lambda: {"stem": conv(), "down": conv(16, 32, stride=2), "head": nn.Linear(32, 16)},
        {"QLinearConv": 2, "QLinearAdd": 1, "QLinearAveragePool": 1, "QGemm": 1, "Slice": 2},
        frozenset({"Pad"}),
    ),
    "hardswish": Case(
        squeezed(F.hardswish, F.hardsigmoid),
        _squeezing,
        SQUEEZED | {"QLinearMul": 4, "QLinearAdd": 5},
    ),
    "silu": Case(
        squeezed(F.silu, torch.sigmoid),
        _squeezing,
        SQUEEZED | {"QLinearMul": 4, "QLinearSigmoid": 4, "QLinearAdd": 1},
    ),
    "dense": Case(
        dense,
        lambda: {"stem": conv(), "one": conv(), "two": conv(32, 16), "head": nn.Linear(48, 16)},
        {"QLinearConv": 3, "QLinearConcat": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "tokens": Case(
        tokens,
        lambda: {
            "patches": nn.Conv2d(16, 32, 4, 4), "norm": nn.LayerNorm(32), "qkv": nn.Linear(32, 96),
            "out": nn.Linear(32, 32), "grow": nn.Linear(32, 64), "shrink": nn.Linear(64, 32), "head": nn.Linear(32, 16),
        },
        {"QLinearConv": 1, "MatMulIntegerToFloat": 4, "QGemm": 1},
        frozenset({"LayerNormalization", "SkipLayerNormalization", "Gelu", "BiasGelu", "Softmax", "FusedMatMul",
                   "MatMul", "Add", "Split", "ReduceMean", "Div", "Mul", "Erf"}),
    ),
}  # fmt: skip
INTEGERS = ("QLinear", "QGemm", "MatMulIntegerToFloat", "Nhwc")
MOVES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Flatten", "Slice", "Squeeze", "Unsqueeze",
         "Concat", "Shape", "Gather"}  # fmt: skip


def network(case: Case) -> nn.Module:
    model = seeded(lambda: Lambda(case.forward, **case.parts()))
    with torch.no_grad():
        for _ in range(2):
            model.train()(image(16, *SHAPE))
    return model.eval()


def exported(model: nn.Module, x: Tensor, batches: list[Tensor], folder: Path) -> tuple[nn.Module, Path]:
    """The converted graph and its file."""
    gm = fxq.prepare(model, x, target="onnxruntime")
    fxq.calibrate(gm, batches, progress=False)
    quantized = fxq.convert(gm)
    return quantized, fxq.export(quantized, folder / "model.onnx")


@pytest.mark.parametrize("name", CASES)
def test_kernels_and_numbers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, x = network(case), image(8, *SHAPE, seed=7)
    batches = [image(8, *SHAPE, seed=seed) for seed in range(4)]
    quantized, path = exported(model, x, batches, tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that a file written for this machine may not fit another one
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert {op: found[op] for op in case.kernels} == case.kernels
    others = {op for op in found if not op.startswith(INTEGERS)} - MOVES
    assert others <= case.floats, found
    with torch.no_grad():
        real, rounded = model(x), quantized(x)
    given = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert sqnr_db(real, given) > 25
    assert abs(sqnr_db(real, given) - sqnr_db(real, rounded)) < 0.5
    assert sqnr_db(rounded, given) > 35


@pytest.mark.parametrize("seed", [1, 6, 12])
def test_random_models_give_the_same_in_both(seed: int, tmp_path: Path) -> None:
    """Layers of all usual kinds in any order, so that what joins meets what stays float."""
    model, x = random_model(seed, 10), image(*RANDOM, seed=9)
    quantized, path = exported(model, x, [image(*RANDOM, seed=s) for s in range(3)], tmp_path)
    with torch.no_grad():
        rounded = quantized(x)
    assert sqnr_db(rounded, Session(path).run(x)[0]) > 60
    assert sqnr_db(model(x).detach(), rounded) > 25


def test_a_layer_that_a_recipe_leaves_float_is_float(tmp_path: Path) -> None:
    """Between a DQ and a Q its weight would be quantized by ONNX Runtime, so the layer before it is float too."""
    layers: list[nn.Module] = [conv(), nn.ReLU(), conv(), nn.ReLU(), conv()]
    model = seeded(lambda: nn.Sequential(*layers))
    x = image(4, *SHAPE)
    recipe = fxq.Recipe([fxq.Rule("2.0", None, reason="it is sensitive")])
    gm = fxq.prepare(model, x, recipe=recipe, target="onnxruntime")
    fxq.calibrate(gm, [x], progress=False)
    path = fxq.export(fxq.convert(gm), tmp_path / "net.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    made = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert (made["QLinearConv"], made["FusedConv"] + made["Conv"]) == (1, 2), made
    assert [finding.rule for finding in fxq.lint(path)] == ["ORT1"]
