"""The report on an engine: where its kernels came from and what differs from the prediction."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inspector import float_skip
from lint_net import IMAGE, Make, Net, residual

import fxq
from fxq.backends.trt_engine import Engine
from fxq.backends.trt_kernels import tensors_of_engine
from fxq.errors import EngineError


@pytest.fixture
def skip_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(residual(None), path)
    return path


def inspected(version: int, folder: Path) -> Path:
    path = folder / f"engine{version}.json"
    path.write_text(json.dumps(float_skip(version, IMAGE)))
    return path


@pytest.mark.parametrize("version", [10, 11])
def test_the_inspector_of_both_versions(version: int, skip_file: Path) -> None:
    report = fxq.engine_report(inspected(version, skip_file.parent), skip_file)
    assert report.builder == "tensorrt"
    assert report.sum_bytes == 0
    assert report.agreement.precision_share == 1
    found = [(f.rule, f.severity, f.node) for f in report.findings]
    assert ("R23", "warning", "relu2_q") in found, found
    assert ("R18", "advice", "conv3") in found
    lone = next(f for f in report.findings if f.node == "relu2_q" and "kernel relu2_q" in f.message)
    assert "does nothing but quantize" in lone.message
    assert "no input is quantized; the skip 'stem' should be" in lone.message
    assert lone.fix.startswith("Put Q/DQ on the skip's edge")


def test_what_the_engine_takes_and_gives() -> None:
    old, new = (tensors_of_engine(json.dumps(float_skip(version, IMAGE))) for version in (10, 11))
    assert [t.name for t in old] == [t.name for t in new] == ["x", "conv3"]
    assert [(t.dtype, t.shape) for t in new] == [("float32", IMAGE)] * 2
    assert {t.dtype for t in old} == {"unknown"}


def test_layers_without_metadata_are_known_by_their_names(skip_file: Path) -> None:
    data = float_skip(10, IMAGE)
    for layer in data["Layers"]:
        del layer["Metadata"]
    path = skip_file.parent / "bare.json"
    path.write_text(json.dumps(data))
    rows = fxq.engine_report(path, skip_file).rows
    assert [row.kernel.onnx_nodes for row in rows] == [
        ("stem",), ("stem_q",), ("conv1", "relu1"), ("conv2", "add", "relu2"), ("relu2_q",), ("conv3",), ("conv3",),
    ]  # fmt: skip


def concat() -> onnx.ModelProto:
    net = Net()
    source = net.qdq("x")
    parts = [net.qdq(net.conv(source, f"branch{i}"), scale) for i, scale in enumerate((0.05, 0.06))]
    return net.model(net.conv(net.op("Concat", parts, "joined", axis=1), "conv", (64, 32)))


def float_weight() -> onnx.ModelProto:
    net = Net()
    return net.model(net.conv(net.qdq("x"), "conv", weight=net.float_weight("conv", (32, 32, 3, 3))))


def squeezed() -> onnx.ModelProto:
    """Squeeze and excitation: a float tensor waits for its factor."""
    net = Net()
    wide = net.op("Relu", [net.conv(net.qdq("x"), "wide")], "relu")
    factor = net.op("Sigmoid", [net.conv(net.qdq(net.op("GlobalAveragePool", [wide], "pool")), "fc")], "gate")
    return net.model(net.conv(net.qdq(net.op("Mul", [wide, factor], "scaled")), "out"))


BUILT: dict[str, tuple[Make, set[tuple[str, str | None]]]] = {
    "as it should be": (lambda: residual("shared"), set()),
    "float skip": (lambda: residual(None), {("R23", "relu2_q")}),
    "concat of two scales": (concat, {("R27", "conv")}),
    "float weight": (float_weight, {("R20", "conv")}),
    "excitation": (squeezed, {("R39", "scaled")}),
}


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("name", BUILT)
def test_a_built_engine(name: str, tmp_path: Path) -> None:
    make, wanted = BUILT[name]
    path = tmp_path / "net.onnx"
    onnx.save(make(), path)
    log = tmp_path / "builder.log"
    report = fxq.engine_report(fxq.build(path, tmp_path / "net.engine", verbose_log=log), path)
    assert report.builder == "tensorrt-rtx"
    warned = {(f.rule, f.node) for f in report.findings if f.severity == "warning" or f.rule == "R39"}
    assert wanted <= warned if wanted else not warned, report.findings
    assert report.agreement.precision_share == 1
    again = fxq.engine_report(log, path)
    assert again.rows == report.rows
    assert again.findings == report.findings


@pytest.mark.usefixtures("trt")
def test_sizes_that_depend_on_the_batch_are_shapes(tmp_path: Path) -> None:
    model = squeezed()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    engine = fxq.build(path, tmp_path / "net.engine", profiles={"x": ((1, 32, 16, 16), IMAGE, IMAGE)})
    found = [f for f in fxq.engine_report(engine, path).findings if f.rule == "R39"]
    assert [f.node for f in found] == ["scaled"]  # and nothing of the pooled tensor, 128 bytes an image
    assert " of [?, 32, 16, 16] lies between" in found[0].message


@pytest.mark.usefixtures("trt")
def test_a_quantizer_that_a_convolution_needs_is_not_to_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(squeezed(), path)
    found = fxq.engine_report(fxq.build(path, tmp_path / "net.engine"), path).findings
    (lone,) = [f for f in found if f.rule == "R31"]
    assert (lone.node, lone.severity) == ("pool_q", "advice")
    assert lone.message.endswith("does nothing but quantize, for fc")
    assert "leave fc float" in lone.fix


@pytest.mark.usefixtures("trt")
def test_a_float_tensor_that_a_norm_reads_is_as_it_has_to_be(tmp_path: Path) -> None:
    net = Net(x=(8, 16, 64))
    stream = "x"
    for index in range(2):
        norm = net.op(
            "LayerNormalization", [stream, net.constant(f"g{index}", np.ones(64, np.float32))], f"norm{index}"
        )
        product = net.op("MatMul", [net.qdq(norm), net.weight(f"p{index}", (64, 64), 1)], f"p{index}")
        stream = net.op("Add", [product, stream], f"sum{index}")
    norm = net.op("LayerNormalization", [stream, net.constant("g", np.ones(64, np.float32))], "norm")
    path = tmp_path / "net.onnx"
    onnx.save(net.model(net.op("MatMul", [net.qdq(norm), net.weight("out", (64, 64), 1)], "out")), path)
    report = fxq.engine_report(fxq.build(path, tmp_path / "net.engine"), path)
    assert any(n.endswith("norm") for row in report.rows for n in row.kernel.onnx_nodes)
    assert not [f for f in report.findings if f.rule == "R39"], report.findings


@pytest.mark.usefixtures("trt")
def test_a_kernel_leads_back_to_the_line(tmp_path: Path) -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(8, 32, 3)
            self.second = torch.nn.Conv2d(32, 32, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).relu())  # type: ignore[no-any-return]

    model = Model().eval()
    image = torch.randn(2, 8, 16, 16)
    path = fxq.export(fxq.quantize(model, [image], progress=False), tmp_path / "net.onnx", dynamic_shapes=None)
    report = fxq.engine_report(fxq.build(path, tmp_path / "net.engine"), path)
    convolutions = [row for row in report.rows if row.kernel.weighted]
    assert [row.module_paths[0] for row in convolutions] == ["first", "second"]
    assert all(Path(__file__).name in row.sources[0] for row in convolutions)
    assert report.sum_bytes > 0
    assert "this builder splits" in report.summary()


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize(("groups", "scales"), [(1, "channel"), (4, "tensor")])
def test_a_transposed_convolution_in_float_is_nobodys_fault(groups: int, scales: str, tmp_path: Path) -> None:
    """Per channel alone, per tensor in groups (R16, R43); this builder runs either in float."""
    import torch

    up = torch.nn.ConvTranspose2d(32, 32, 2, stride=2, groups=groups)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3), torch.nn.ReLU(), up, torch.nn.Conv2d(32, 32, 1)).eval()
    image = torch.randn(2, 8, 16, 16)
    path = fxq.export(fxq.quantize(model, [image], progress=False), tmp_path / "net.onnx", dynamic_shapes=None)
    report = fxq.engine_report(fxq.build(path, tmp_path / "net.engine"), path)
    (found,) = [f for f in report.findings if f.rule == "R43"]
    assert (found.module_path, found.severity) == ("2", "advice")
    assert f"a weight with one scale per {scales}" in found.message
    assert "reads float32" in found.message
    assert found.fix.startswith("None is needed")
    assert not [f for f in report.findings if f.severity != "advice"], report.findings


class Page(HTMLParser):
    """Counts rows, and looks for what would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.rows += tag == "tr"
        self.outside += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_dictionary_and_text_hold_every_kernel(skip_file: Path) -> None:
    report = fxq.engine_report(inspected(11, skip_file.parent), skip_file)
    page = Page()
    page.feed(report.save(skip_file.parent / "report.html").read_text())
    assert page.open == []
    assert page.outside == []
    assert page.rows == 3 + len(report.rows) + len(report.findings) + len(report.prediction.kernels)
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["kernels"]) == len(report.rows)
    assert [f["rule"] for f in data["findings"]] == [f.rule for f in report.findings]
    text = str(report)
    assert all(" + ".join(row.kernel.onnx_nodes) in text.replace("\n", " ") for row in report.rows[2:4])
    assert "R23" in text


def test_an_engine_whose_kernels_are_not_known(skip_file: Path) -> None:
    with pytest.raises(EngineError, match=r"the kernels of .* are not known") as caught:
        fxq.engine_report(Engine(skip_file, 1, "11.0"), skip_file)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "no kernels here", '{"Layers": ["conv1"]}', "{broken"])
def test_a_file_without_kernels(text: str, skip_file: Path) -> None:
    path = skip_file.parent / "engine.json"
    path.write_text(text)
    with pytest.raises(EngineError, match="lists no kernels"):
        fxq.engine_report(path, skip_file)


def test_a_missing_file(skip_file: Path) -> None:
    with pytest.raises(EngineError, match="cannot read"):
        fxq.engine_report(skip_file.parent / "none.json", skip_file)
