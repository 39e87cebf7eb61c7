"""The whole way, on real networks: from a model to a checked ONNX file and an engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from networks import cifar, images, sqnr_db, top1, warmed
from torch import Tensor, fx, nn
from toys import LeNet, basic_net, image, seeded

import fxq
from fxq.backends.onnxrt import Session
from fxq.errors import CalibrationError, ConvertError, ExportError, TraceError
from fxq.graph import state
from fxq.ops import kind_name
from fxq.qdq import DEQUANTIZE, QUANTIZE

SIZE = 96


@dataclass(frozen=True)
class Run:
    """A network that went the whole way."""

    model: nn.Module
    prepared: fx.GraphModule
    quantized: fx.GraphModule
    path: Path
    inputs: Tensor


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    model = warmed(request.param, SIZE)
    prepared = fxq.prepare(model, torch.zeros(8, 3, SIZE, SIZE))
    fxq.calibrate(prepared, images(32, SIZE, seed=1).split(8), progress=False)
    quantized = fxq.convert(prepared)
    path = fxq.export(quantized, tmp_path_factory.mktemp("flow") / f"{request.param}.onnx", dynamic_shapes=None)
    return Run(model, prepared, quantized, path, images(8, SIZE, seed=2))


def values(gm: fx.GraphModule, *inputs: Tensor) -> dict[str, Tensor]:
    """What every node of the graph gives."""
    found: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found[n.name] = result
            return result

    with torch.inference_mode():
        Keep(gm).run(*inputs)
    return found


def test_the_model_is_not_changed_and_the_prepared_graph_computes_what_it_did(run: Run) -> None:
    fresh = warmed("resnet18" if "18" in run.path.name else "resnet50", SIZE)
    for (name, mine), (_, theirs) in zip(run.model.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name
    with torch.inference_mode():
        torch.testing.assert_close(run.prepared(run.inputs), run.model(run.inputs), rtol=1e-4, atol=1e-3)


def test_every_weighted_operation_and_every_skip_is_quantized_and_the_rules_are_kept(run: Run) -> None:
    report = fxq.report(run.quantized)
    assert all(row.precision == "int8" for row in report.weighted)
    adds = [n for n in run.quantized.graph.nodes if kind_name(n) == "add"]
    assert len(adds) == len(report.skips) == (8 if "18" in run.path.name else 16)
    for add in adds:
        assert [a.target is DEQUANTIZE for a in add.args].count(True) == 1
    quantized_tensors = [n.args[0] for n in run.quantized.graph.nodes if n.target is QUANTIZE]
    assert len(quantized_tensors) == len(set(quantized_tensors))
    assert not fxq.lint(run.path)


def test_onnx_runtime_agrees_node_by_node(run: Run) -> None:
    """Fed PyTorch's own tensors, a quantizer's integers differ in 0.1% at most, and by 1 at most."""
    torch_values = values(run.quantized, run.inputs)
    session = Session(run.path, optimize=False)
    quantizers = [n for n in run.quantized.graph.nodes if n.target is QUANTIZE]
    assert len(quantizers) > 20
    for node in quantizers:
        weighted = _weighted_before(node)
        given = {a.name: torch_values[a.name] for a in weighted.all_input_nodes if a.name in session.value_names}
        given |= {"x": run.inputs} if "x" in session.input_names else {}
        given |= {n: torch_values[n] for n in _skips_between(weighted, node)}
        found = session.compute([node.name], given)[node.name]
        steps = (found.int() - torch_values[node.name].int()).abs()
        assert int(steps.max()) <= 1, node.name
        assert float((steps > 0).float().mean()) <= 1e-3, node.name


def _weighted_before(node: fx.Node) -> fx.Node:
    """The convolution or linear layer whose result, through float operations, `node` quantizes."""
    while kind_name(node) not in ("conv2d", "linear", "placeholder"):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _skips_between(weighted: fx.Node, node: fx.Node) -> Iterator[str]:
    while node is not weighted:
        yield from (a.name for a in node.all_input_nodes if a.target is DEQUANTIZE)
        node = node.args[0]  # type: ignore[assignment]


def test_end_to_end_quality_is_that_of_pytorch(run: Run) -> None:
    with torch.inference_mode():
        reference, simulated = run.model(run.inputs), run.quantized(run.inputs)
    exported = Session(run.path).run(run.inputs)[0]
    assert sqnr_db(reference, simulated) > 7  # random weights are hard; the benchmarks have trained ones
    assert abs(sqnr_db(reference, simulated) - sqnr_db(reference, exported)) < 0.5


@pytest.mark.parametrize("dynamic", ["batch", None])
def test_nodes_are_named_after_modules_and_lead_to_the_source(tmp_path: Path, dynamic: str | None) -> None:
    model = seeded(basic_net)
    quantized = fxq.quantize(model, [image(4, 3, 16, 16)], progress=False)
    proto = onnx.load(fxq.export(quantized, tmp_path / "m.onnx", dynamic_shapes=dynamic))
    nodes = {n.name: n for n in proto.graph.node}
    assert len(nodes) == len(proto.graph.node)
    conv = nodes["blocks.0.conv1"]
    properties = {p.key: p.value for p in conv.metadata_props}
    assert conv.op_type == "Conv"
    assert properties["fxq.module_path"] == "blocks.0.conv1"
    assert properties["fxq.source"].rpartition(":")[0].endswith("toys.py")
    first = proto.graph.input[0].type.tensor_type.shape.dim[0]
    assert (first.dim_param == "batch") if dynamic else (first.dim_value == 4)


@pytest.mark.usefixtures("trt")
def test_an_engine_reads_int8_in_every_weighted_kernel_and_in_every_skip(run: Run, tmp_path: Path) -> None:
    engine = fxq.build(run.path, tmp_path / "m.engine")
    assert engine.path.stat().st_size == engine.nbytes > 1_000_000
    assert len(engine.weighted_kernels) == len(fxq.report(run.quantized).weighted)
    assert engine.int8_kernels == engine.weighted_kernels
    adds = {n.name for n in onnx.load(run.path).graph.node if n.op_type == "Add"}
    kernels = [k for k in engine.kernels or () if adds & set(k.onnx_nodes)]
    assert len(kernels) >= len(adds)
    identity = [k for k in kernels if not any("downsample" in n for n in k.onnx_nodes)]
    assert len(identity) >= (5 if "18" in run.path.name else 12)
    assert all("int8" in {t.dtype for t in k.inputs} for k in identity)


def test_steps_repeat_and_copies_keep_what_they_know() -> None:
    model = seeded(basic_net)
    prepared = fxq.prepare(model, image(2, 3, 16, 16))
    batches = [image(4, 3, 16, 16, seed=s) for s in range(3)]
    fxq.calibrate(prepared, batches, progress=False)
    first = fxq.convert(prepared)
    x = image(2, 3, 16, 16, seed=9)
    again = fxq.convert(copy.deepcopy(prepared))
    assert fxq.format_graph(first) == fxq.format_graph(again)
    assert torch.equal(first(x), again(x))
    fxq.calibrate(prepared, [10 * b for b in batches], progress=False)
    wider = fxq.convert(prepared)
    assert not torch.equal(first(x), wider(x))
    fxq.calibrate(prepared, batches, progress=False)
    assert torch.equal(fxq.convert(prepared)(x), first(x))
    copied = copy.deepcopy(first)
    for name in ("target", "recipe", "properties", "notes", "provenance"):
        assert getattr(state(copied), name) == getattr(state(first), name)
    assert torch.equal(copied(x), first(x))
    assert fxq.format_graph(copied) == fxq.format_graph(first)


def test_what_is_out_of_turn_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    prepared = fxq.prepare(seeded(basic_net), image(2, 3, 16, 16))
    with pytest.raises(CalibrationError, match=r"next step: run fxq\.calibrate"):
        fxq.convert(prepared)
    with pytest.raises(ExportError, match="observers"):
        fxq.export(prepared, tmp_path / "m.onnx")
    with pytest.raises(CalibrationError, match="no batch"):
        fxq.calibrate(prepared, [], progress=False)
    with pytest.raises(CalibrationError, match="performance_only"):
        fxq.calibrate(prepared, None)
    with pytest.raises(CalibrationError, match="no batch"):
        fxq.quantize(seeded(basic_net), [])
    fxq.calibrate(prepared, [image(2, 3, 16, 16)], progress=False)
    quantized = fxq.convert(prepared)
    with pytest.raises(ConvertError, match="converted already"):
        fxq.convert(quantized)
    with pytest.raises(CalibrationError, match="converted already"):
        fxq.calibrate(quantized, [image(2, 3, 16, 16)])
    with pytest.raises(TraceError, match="traced by fxq already"):
        fxq.prepare(quantized, image(2, 3, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_random_data_is_marked_in_the_report_and_in_the_file(tmp_path: Path) -> None:
    prepared = fxq.prepare(seeded(basic_net), image(2, 3, 16, 16))
    fxq.calibrate(prepared, None, performance_only=True, progress=False)
    quantized = fxq.convert(prepared)
    assert "random data" in str(fxq.report(quantized))
    proto = onnx.load(fxq.export(quantized, tmp_path / "m.onnx"))
    assert '"performance_only": true' in {p.key: p.value for p in proto.metadata_props}["fxq.calibration"]


class TwoInputs(nn.Module):
    """Nested and keyword inputs, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, pair: tuple[Tensor, Tensor], *, gate: Tensor | None = None) -> dict[str, Tensor]:
        y = F.relu(self.left(pair[0]) + self.right(pair[1]))
        if gate is not None:
            y = y * gate
        return {"hidden": y, "logits": self.head(y)}


def test_nested_and_keyword_inputs_go_the_whole_way(tmp_path: Path) -> None:
    model = seeded(TwoInputs)
    pair, gate = (image(4, 8), image(4, 8, seed=1)), torch.rand(4, 16)
    prepared = fxq.prepare(model, (pair,), example_kwargs={"gate": gate})
    fxq.calibrate(prepared, [{"pair": pair, "gate": gate}], progress=False)
    quantized = fxq.convert(prepared)
    ours, theirs = quantized(pair, gate=gate), model(pair, gate=gate)
    assert sqnr_db(theirs["logits"], ours["logits"]) > 25
    path = fxq.export(quantized, tmp_path / "m.onnx", output_names=["hidden", "logits"])
    session = Session(path)
    outputs = session.run(dict(zip(session.input_names, (*pair, gate), strict=True)))
    torch.testing.assert_close(outputs["logits"], ours["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_model_on_a_gpu_stays_there_until_export(tmp_path: Path) -> None:
    model = seeded(basic_net).cuda()
    batch = image(4, 3, 16, 16).cuda()
    prepared = fxq.prepare(model, batch)
    fxq.calibrate(prepared, [batch.cpu()], progress=False)
    quantized = fxq.convert(prepared)
    assert quantized(batch).is_cuda
    assert sqnr_db(model(batch), quantized(batch)) > 20
    path = fxq.export(quantized, tmp_path / "m.onnx")
    assert quantized(batch).is_cuda
    exported = Session(path).run(batch.cpu())[0]
    assert sqnr_db(quantized(batch).cpu(), exported) > 25


def test_quantize_traces_as_it_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Rescaled(), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(TraceError):
        fxq.quantize(model, [image(2, 3, 8, 8)], progress=False)
    quantized = fxq.quantize(
        model, [image(2, 3, 8, 8)], progress=False, on_untraceable="leaf", leaf_modules=["0"], dynamic_shapes=None
    )
    totals = fxq.report(quantized).totals
    assert (totals.weighted, totals.weighted_quantized) == (2, 1)
    assert quantized(image(2, 3, 8, 8)).shape == (2, 4, 4, 4)


class Rescaled(nn.Module):
    """Decides by values."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.max() if x.max() > 1 else x


def test_trained_resnet20_keeps_its_accuracy(real_data: Path, tmp_path: Path) -> None:
    model, train, _, test, labels = cifar(real_data)
    quantized = fxq.quantize(model, train[:512].split(32), progress=False)
    path = fxq.export(quantized, tmp_path / "resnet20.onnx")
    with torch.inference_mode():
        reference, simulated = model(test), quantized(test)
    exported = Session(path).run(test)[0]
    assert top1(reference, labels) == pytest.approx(81.5, abs=0.11)
    assert abs(top1(simulated, labels) - top1(reference, labels)) <= 0.3
    assert abs(top1(exported, labels) - top1(reference, labels)) <= 0.3
    assert min(sqnr_db(reference, simulated), sqnr_db(reference, exported)) > 26.5
    assert len(fxq.report(quantized).skips) == 9
    assert not fxq.lint(path).errors


def test_lenet_trained_on_mnist_keeps_its_accuracy(real_data: Path, tmp_path: Path) -> None:
    data = np.load(real_data / "mnist.npz")
    train, test = (
        (torch.from_numpy(data[f"{k}_images"])[:, None].float() / 255 - 0.1307) / 0.3081 for k in ("train", "test")
    )
    labels = torch.from_numpy(data["train_labels"])
    model = seeded(LeNet).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for chosen in torch.randperm(20_000, generator=torch.Generator().manual_seed(0)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(train[chosen]), labels[chosen]).backward()
        optimizer.step()
    quantized = fxq.quantize(model.eval(), train[:512].split(64), progress=False)
    exported = Session(fxq.export(quantized, tmp_path / "lenet.onnx")).run(test)[0]
    with torch.inference_mode():
        reference, simulated = model(test), quantized(test)
    expected = torch.from_numpy(data["test_labels"])
    assert top1(reference, expected) > 96
    for logits in (simulated, exported):
        assert abs(top1(logits, expected) - top1(reference, expected)) <= 0.2
