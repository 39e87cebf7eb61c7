"""The text form of graphs: stable, complete, and readable at every stage."""

from __future__ import annotations

import copy
import math
import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import check_golden
from placing import MAX, Lambda, annotated, convert, prepared
from torch import Tensor, fx, nn
from toys import basic_net, branches, image, lenet, seeded, traced

from fxq.calibration import calibrate
from fxq.printer import format_graph, format_numbers
from fxq.quantizer import quantizers
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule

X = (2, 3, 16, 16)


def line(text: str, name: str) -> str:
    (found,) = [row for row in text.splitlines() if row.startswith(f"%{name} =")]
    return found


def test_every_stage_of_one_model() -> None:
    gm = prepared(branches(), image(*X), recipe=MAX)
    check_golden("core/printer_traced", format_graph(traced(branches(), image(*X))))
    check_golden("core/printer_prepared", format_graph(gm))
    for quantizer in quantizers(gm).values():
        channels = () if quantizer.axis is None else (8 if "stem" in quantizer.tensor else 4,)
        quantizer.set_parameters(torch.full(channels, 0.5), torch.zeros(channels, dtype=torch.int32))
    check_golden("core/printer_calibrated", format_graph(gm))
    check_golden("core/printer_converted", format_graph(convert(gm)))


def test_values_of_every_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(operator.getitem, (x, (slice(None), slice(1, None, 2), ..., None, 0)))
    values = ([x, (1,)], {"b": [2.5, float("inf")]}, "text", True, None)
    graph.call_function(print, values, {"layout": torch.strided})
    types = (torch.float16, torch.device("cpu"), torch.channels_last)
    graph.call_function(print, types)
    graph.call_method("add", (x, y), {"alpha": 2})
    for function in (torch.relu, F.relu, torch.relu_, operator.iadd, torch.Tensor.reshape_as, math.floor):
        graph.call_function(function, (x, y))
    graph.call_function(operator.add, (x, y))
    graph.output((y, {"z": x}))
    text = format_graph(fx.GraphModule(nn.Module(), graph))
    assert text.splitlines() == [
        "%x = placeholder()",
        "%getitem = getitem(%x, (:, 1::2, Ellipsis, None, 0))",
        "%print_1 = builtins.print([%x, (1,)], {'b': [2.5, inf]}, 'text', True, None, layout=strided)",
        "%print_2 = builtins.print(float16, cpu, channels_last)",
        "%add = %x.add(%getitem, alpha=2)",
        "%relu = torch.relu(%x, %getitem)",
        "%relu_1 = functional.relu(%x, %getitem)",
        "%relu_ = torch.relu_(%x, %getitem)",
        "%iadd = operator.iadd(%x, %getitem)",
        "%reshape_as = Tensor.reshape_as(%x, %getitem)",
        "%floor = math.floor(%x, %getitem)",
        "%add_1 = add(%x, %getitem)",
        "return (%getitem, {'z': %x})",
    ]


def test_several_results_and_modules() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.lstm(x.chunk(2, 1)[0])[0], lstm=nn.LSTM(4, 4)))
    text = format_graph(traced(model, image(3, 2, 4)))
    assert line(text, "chunk").endswith(": (float32[3,1,4], float32[3,1,4])")
    assert line(text, "lstm").startswith("%lstm = LSTM(%getitem)")


def test_annotations_ties_and_recipes() -> None:
    recipe = Recipe([Rule("left", None), Rule("right", EdgeSpecs(output=QSpec()))])
    text = format_graph(annotated(branches(), image(*X), recipe=recipe))
    assert "{0: float recipe}  {1: float recipe}" in line(text, "left")
    assert "{output: int8 per-tensor mse recipe}" in line(text, "right")

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(x)
        return m.a(y) + m.b(torch.cat([y, y], 1)).sum()

    parts = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(6, 3, 1)}
    text = format_graph(prepared(seeded(lambda: Lambda(forward, **parts)), image(*X)))
    assert line(text, "relu_quantizer").endswith("[int8 per-tensor mse tie=relu]")
    assert "{0: int8 per-tensor mse R20 tie=relu}" in line(text, "b")


def test_only() -> None:
    gm = traced(lenet(), image(1, 1, 28, 28))
    text = format_graph(gm, only=lambda n: n.op == "call_module")
    assert [row.split(" ")[0] for row in text.splitlines()] == ["%conv1", "%conv2", "%fc1", "%fc2", "%fc3"]
    assert format_graph(gm, only=lambda _: False) == ""


NUMBERS = [
    (torch.tensor(0.123456), "0.1235"),
    (torch.tensor(3, dtype=torch.int32), "3"),
    (torch.tensor([0.5, 0.5]), "2 times 0.5"),
    (torch.tensor([0.25, 1e-5, 0.5]), "3 in [1e-05, 0.5]"),
    (torch.tensor([1, -1], dtype=torch.int32), "2 in [-1, 1]"),
]


@pytest.mark.parametrize(("values", "text"), NUMBERS, ids=str)
def test_numbers(values: Tensor, text: str) -> None:
    assert format_numbers(values) == text


def test_a_scale_shows_where_it_is_used_and_its_buffer_does_not() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28), recipe=MAX)
    calibrate(gm, [image(1, 1, 28, 28)], progress=False)
    quantized = convert(gm)
    before = format_graph(quantized)
    assert "get_attr(quantizers." not in before
    assert before.count("= quantize(") == 5
    assert before.count("= dequantize(") == 10
    quantized.get_buffer("quantizers.view.scale").mul_(2)
    changed = [a for a, b in zip(before.splitlines(), format_graph(quantized).splitlines(), strict=True) if a != b]
    assert [row.split(" ")[0] for row in changed] == ["%view_quantize", "%view_dequantize"]


def test_graphs_that_are_not_fxqs() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert format_graph(gm).splitlines() == [
        "%input_1 = placeholder()",
        "%_0 = Linear(%input_1)",
        "%_1 = ReLU(%_0)",
        "return %_1",
    ]


def test_copies_and_processes_print_the_same() -> None:
    gm = prepared(basic_net(), image(*X))
    text = format_graph(gm)
    assert format_graph(copy.deepcopy(gm)) == text
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from toys import basic_net, image\nimport fxq\n"
        "print(fxq.format_graph(fxq.prepare(basic_net(), image(2, 3, 16, 16))))"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program, str(root), str(root / "tests" / "support")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == text
