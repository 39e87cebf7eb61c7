"""The report: a table that a person enjoys, with totals that hide nothing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from golden import check_golden
from placing import STUDY, Lambda, Lambda2, convert, prepared
from torch import Tensor, fx, nn
from toys import basic_net, image, lenet, seeded, traced

import fxq
from fxq.calibration import calibrate
from fxq.placement import EdgeRow, OpRow
from fxq.quantizer import quantizers
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.reports import Report
from fxq.totals import Totals

X = (2, 3, 16, 16)


def with_scales(gm: fx.GraphModule) -> fx.GraphModule:
    """Scales set by hand, so that no text depends on arithmetic."""
    for index, quantizer in enumerate(quantizers(gm).values()):
        node = next(n for n in gm.graph.nodes if n.name == quantizer.tensor)
        channels = () if quantizer.axis is None else (node.meta["tensor"].shape[quantizer.axis],)
        quantizer.set_parameters(torch.full(channels, 0.5 / (index + 1)), torch.zeros(channels, dtype=torch.int32))
    return gm


def row(report: Report, name: str) -> OpRow:
    (found,) = [r for r in report.rows if r.node == name]
    return found


def edge(report: Report, name: str, role: str) -> EdgeRow:
    (found,) = [e for e in row(report, name).edges if e.role == role]
    return found


def converted() -> fx.GraphModule:
    return convert(with_scales(prepared(basic_net(), image(*X))))


# The text.


def test_text_of_a_residual_network() -> None:
    check_golden("core/report_basic", fxq.report(converted()).text(120))


def test_text_before_calibration() -> None:
    check_golden("core/report_prepared", fxq.report(prepared(lenet(), image(1, 1, 28, 28))).text(120))


def everything() -> fx.GraphModule:
    """Parts kept whole, declined additions, outputs, exclusions and half an operation in one model."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.relu(m.conv(x)) + x
        y = m.second(torch.relu(y)) + y
        z = m.third(y.flatten(2))
        return m.head(m.encoder(z)) @ m.fourth(z).transpose(1, 2)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    parts = {
        "conv": nn.Conv2d(16, 16, 3, padding=1),
        "second": nn.Conv2d(16, 16, 3, padding=1),
        "third": nn.Linear(64, 8),
        "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        "head": nn.Linear(8, 8),
        "fourth": nn.Linear(8, 8),
    }
    recipe = Recipe(
        [
            Rule("third", EdgeSpecs(output=QSpec(method="max"))),
            Rule("head", None),
            Rule("fourth", EdgeSpecs(input=None)),
        ]
    )
    model = seeded(lambda: Lambda(forward, **parts))
    return prepared(model, image(2, 16, 8, 8), recipe=recipe)


def test_text_of_everything() -> None:
    report = fxq.report(convert(with_scales(everything())))
    check_golden("core/report_everything", report.text(120))


def test_the_text_keeps_its_width() -> None:
    report = fxq.report(everything())
    for width in (80, 100, 140):
        assert max(map(len, report.text(width).splitlines())) <= width
    assert all(name in report.text(80).replace("\n", "") for name in ("encoder", "third", "add_1"))


def test_print_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    report = fxq.report(everything())
    monkeypatch.setenv("COLUMNS", "90")
    assert str(report) == report.text(90)
    monkeypatch.setenv("COLUMNS", "20")
    assert str(report) == report.text(80)
    monkeypatch.delenv("COLUMNS")
    assert str(report).splitlines()[0] == report.summary()


def test_a_graph_with_nothing_to_say() -> None:
    report = fxq.report(prepared(Lambda(lambda _, x: x.relu()), image(2, 3)))
    assert report.rows == ()
    assert report.text(100).splitlines() == [
        "prepared for tensorrt: 0 of 0 weighted operations quantized",
        "weighted operations  0 of 0 quantized",
        "quantizers           0: 0 of activations, 0 of weights",
        "parameters           0.0 kB in float, 0.0 kB converted",
    ]


# Rows.


def test_rows_of_a_residual_network() -> None:
    report = fxq.report(converted())
    assert [r.node for r in report.rows] == [
        "stem_1",
        "blocks_0_bn1",
        "blocks_0_bn2",
        "blocks_0_add",
        "blocks_1_downsample_1",
        "blocks_1_bn1",
        "blocks_1_bn2",
        "blocks_1_add",
        "fc",
    ]
    conv, add, down = row(report, "blocks_0_bn1"), row(report, "blocks_0_add"), row(report, "blocks_1_add")
    assert (conv.kind, conv.precision, conv.weighted, conv.module_path) == (
        "conv2d",
        "int8",
        1,
        "blocks.0.conv1",
    )
    assert re.fullmatch(r".*toys\.py:\d+", str(conv.source))
    assert [e.role for e in conv.edges] == ["input", "weight"]
    assert (add.kind, add.precision, add.weighted, add.identity) == ("add", "int8", 0, True)
    assert not down.identity
    skip = edge(report, "blocks_0_add", "skip")
    assert (skip.tensor, skip.quantized, skip.channels, skip.readers, skip.rule) == (
        "stem_2",
        True,
        1,
        2,
        "R24",
    )
    assert "the same one serves" in skip.reason
    weight = edge(report, "blocks_1_bn2", "weight")
    assert (weight.tensor, weight.channels, weight.spec.split(" ")[0]) == (
        "blocks_1_conv2_weight",
        16,
        "int8",
    )
    source = edge(report, "blocks_0_bn1", "input")
    assert source.scale == edge(report, "blocks_0_add", "skip").scale == pytest.approx(0.5 / 3)


def test_scales_are_unknown_before_calibration() -> None:
    report = fxq.report(prepared(basic_net(), image(*X)))
    assert {e.scale for r in report.rows for e in r.edges} == {None}
    assert [r.low for r in report.rows] == [True] * 9
    assert edge(report, "stem_1", "weight").channels == 8


def test_excluded_operations() -> None:
    recipe = Recipe([Rule("blocks.0.conv2", None, "it hurts")])
    report = fxq.report(prepared(basic_net(), image(*X), recipe=recipe))
    conv, add = row(report, "blocks_0_bn2"), row(report, "blocks_0_add")
    assert (conv.precision, conv.low) == ("float", False)
    assert {(e.spec, e.quantized, e.rule, e.reason) for e in conv.edges} == {("float", False, "recipe", "it hurts")}
    assert (add.precision, add.edges) == ("float", ())
    assert report.summary() == "prepared for tensorrt: 6 of 7 weighted operations and 1 of 2 residual skips quantized"


def test_half_an_operation_is_float() -> None:
    recipe = Recipe([Rule("fc", EdgeSpecs(input=None))])
    report = fxq.report(prepared(basic_net(), image(*X), recipe=recipe))
    assert row(report, "fc").precision == "float"
    assert report.totals.weighted_quantized == 6


def test_mixed_data_types() -> None:
    recipe = Recipe([Rule("fc", EdgeSpecs(input=QSpec("uint8", symmetric=False), weight=QSpec("int4")))])
    report = fxq.report(prepared(basic_net(), image(*X), recipe=recipe, target=STUDY))
    assert row(report, "fc").precision == "uint8/int4"


def test_products_of_activations() -> None:
    gm = prepared(Lambda2(lambda _, x, y: x @ y), image(4, 32), image(32, 16))
    report = fxq.report(gm)
    (only,) = report.rows
    assert [(e.role, e.tensor) for e in only.edges] == [("input", "x"), ("input", "y")]
    assert only.precision == "int8"
    assert report.totals.weight_quantizers == 0


def test_outputs() -> None:
    recipe = Recipe([Rule("op:relu", EdgeSpecs(output=QSpec()))])
    report = fxq.report(with_scales(prepared(lenet(), image(1, 1, 28, 28), recipe=recipe)))
    relu = row(report, "relu")
    assert (relu.kind, relu.weighted, [(e.role, e.tensor) for e in relu.edges]) == (
        "relu",
        0,
        [("output", "relu")],
    )
    assert report.totals.weighted == 5
    assert "output" in report.text(140).splitlines()[2]


def test_modules_kept_whole() -> None:
    report = fxq.report(everything())
    leaf = row(report, "encoder")
    (note,) = [n for n in report.notes if n.kind == "opaque"]
    (count,) = re.findall(r"(\d+) weighted operations inside", note.text)
    assert (leaf.kind, leaf.precision, leaf.weighted) == ("TransformerEncoder", "float", int(count))
    assert "trace into a subclass" in note.text
    assert report.totals.weighted == 6 + int(count)
    assert report.totals.weighted_quantized == 4
    lstm = fxq.report(prepared(seeded(lambda: Lambda(lambda m, x: m.l(x)[0], l=nn.LSTM(4, 4))), image(3, 2, 4)))
    assert [(r.kind, r.weighted) for r in lstm.rows] == [("LSTM", 1)]


# Totals.


def test_totals_agree_before_and_after_conversion() -> None:
    gm = with_scales(prepared(basic_net(), image(*X)))
    assert fxq.report(gm).totals == fxq.report(convert(gm)).totals
    assert fxq.report(prepared(basic_net(), image(*X))).totals == fxq.report(gm).totals


def test_totals_of_a_residual_network() -> None:
    gm = converted()
    totals = fxq.report(gm).totals
    weights = 8 * 27 + 2 * 8 * 72 + 16 * 8 + 16 * 72 + 16 * 144 + 10 * 16
    channels = 8 + 8 + 8 + 16 + 16 + 16 + 10
    assert totals == Totals(
        weighted=7,
        weighted_quantized=7,
        residuals=2,
        skips_quantized=2,
        identity_skips_quantized=1,
        activation_quantizers=7,
        weight_quantizers=7,
        float_bytes=4 * (weights + channels),
        bytes=weights + 4 * channels + 4 * channels,  # integers, scales, biases
    )
    stored = sum(b.nbytes for n, b in gm.named_buffers() if n.endswith("weight"))
    assert stored == weights


@pytest.mark.parametrize(("dtype", "size"), [("int4", 40), ("float8_e4m3fn", 80), ("int16", 160), ("uint4", 40)])
def test_bytes_of_other_types(dtype: str, size: int) -> None:
    """Types of 4 bits are counted packed, as they are in a file (R12)."""
    recipe = Recipe([Rule("*", EdgeSpecs(weight=QSpec(dtype, granularity="per-tensor")))])
    model = seeded(lambda: nn.Sequential(nn.Linear(10, 8, bias=False)))
    totals = fxq.report(prepared(model, image(2, 10), recipe=recipe, target=STUDY)).totals
    assert (totals.float_bytes, totals.bytes) == (320, size + 4)


def test_a_weight_read_twice_counts_once() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(8, 8, bias=False)))
    totals = fxq.report(prepared(model, image(2, 8))).totals
    assert (totals.weighted, totals.weight_quantizers, totals.float_bytes) == (2, 1, 256)


def test_half_precision_models() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8, bias=False))).bfloat16()
    gm = prepared(model, image(2, 8).bfloat16())
    calibrate(gm, [image(2, 8).bfloat16()], progress=False)
    prepared_report, report = fxq.report(gm), fxq.report(convert(gm))
    assert report.totals == prepared_report.totals
    assert report.totals.float_bytes == 128
    assert [(r.precision, [e.scale for e in r.edges]) for r in report.rows] == [
        (r.precision, [e.scale for e in r.edges]) for r in prepared_report.rows
    ]


# Stages, notes and data.


def test_stages_and_warnings() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28))
    assert fxq.report(traced(lenet(), image(1, 1, 28, 28))).stage == "traced"
    assert fxq.report(gm).stage == "prepared"
    fxq.calibrate(gm, [image(1, 1, 28, 28)], progress=False)
    assert fxq.report(gm).stage == "calibrated"
    assert fxq.report(fxq.convert(gm)).stage == "quantized"
    assert fxq.report(gm).warnings == ()
    fxq.calibrate(gm, None, performance_only=True, progress=False)
    report = fxq.report(fxq.convert(gm))
    assert report.warnings == ("calibrated on random data: good for measuring speed, useless for accuracy",)
    assert report.text(100).splitlines()[1] == f"WARNING: {report.warnings[0]}"


def test_notes_are_grouped() -> None:
    lines = fxq.report(prepared(basic_net(), image(*X))).text(120).splitlines()
    start = lines.index("advice (3)")
    assert lines[start + 1] == "  R35  INT8 kernels for so few channels are seldom faster than floating point"
    assert lines[start + 2 : start + 3] == [
        "    - blocks_0_bn1, blocks_0_bn2: 8 input and 8 output channels with a 3x3 kernel"
    ]
    lone = fxq.report(prepared(lenet(), image(1, 1, 28, 28))).text(120).splitlines()
    assert "    - conv1: 1 input and 6 output channels with a 5x5 kernel" in lone
    inner = seeded(lambda: nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 3))))
    assert "    - _0_1 (0.1): 3 input and 3 output channels with a 3x3 kernel" in str(
        fxq.report(prepared(inner, image(*X)))
    )
    assert sum("INT8 kernels for so few channels" in line for line in lines) == 1


def test_plain_data() -> None:
    report = fxq.report(converted())
    data = json.loads(json.dumps(report.to_dict()))
    assert list(data) == ["rows", "totals", "notes", "stage", "target", "warnings"]
    assert data["totals"]["weighted_quantized"] == 7
    assert data["rows"][3]["edges"][0]["tensor"] == "stem_2"
    assert data["notes"][0]["rule"] == "R35"
    assert data["stage"] == "quantized"


def test_views() -> None:
    report = fxq.report(converted())
    assert [r.node for r in report.skips] == ["blocks_0_add", "blocks_1_add"]
    assert len(report.weighted) == 7


def test_a_report_changes_nothing() -> None:
    gm = prepared(basic_net(), image(*X))
    text = fxq.format_graph(gm)
    assert str(fxq.report(gm)) == str(fxq.report(gm))
    assert fxq.format_graph(gm) == text
