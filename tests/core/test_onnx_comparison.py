"""An ONNX file against the model, the graph and another file, tensor by tensor."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from toys import basic_net, image, nested_inputs, nested_model

import fxq
from fxq.backends.onnxrt import Session
from fxq.errors import CalibrationError, EngineError, FxqError

X = image(4, 3, 16, 16)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("files"), basic_net()
    quantized = fxq.quantize(model, [X], progress=False)
    return {
        "int8": fxq.export(quantized, folder / "int8.onnx"),
        "half": fxq.export(quantized, folder / "half.onnx", compute_dtype="fp16", keep_io_types=False),
        "float": fxq.export(fxq.trace(model, X), folder / "float.onnx"),
    }


def sqnr(real: Tensor, other: Tensor) -> float:
    real, other = real.double(), other.double()
    return float(10 * torch.log10(real.square().sum() / (real - other).square().sum()))


def test_rows_are_what_both_compute(files: dict[str, Path]) -> None:
    """Against the model's own modules, watched from outside, and the file run whole."""
    model, seen = basic_net(), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(lambda _m, _i, y, path=path: seen.update({path.replace(".", "_"): y.clone()}))
    found = fxq.compare_onnx(files["int8"], model, X)
    with torch.no_grad():
        expected = model(X)
    ran = dict(Session(files["int8"], optimize=False).run_all([X]))
    rows = {row.node: row for row in found.rows}
    shared = [name for name in seen if name in rows]
    assert len(shared) >= 3
    for name in shared:
        value = ran.get(name, ran["output"])
        assert rows[name].sqnr == pytest.approx(sqnr(seen[name], value), abs=1e-3), name
        assert rows[name].max_error == pytest.approx(float((seen[name] - value).abs().max()), rel=1e-3)
    (output,) = found.outputs
    assert output == found.rows[-1]
    assert output.sqnr == pytest.approx(sqnr(expected, ran["output"]), abs=1e-3)
    assert output.module_path
    assert output.source is not None
    assert found.samples == 4
    assert model.training == basic_net().training


def test_a_float_file_is_the_model(files: dict[str, Path]) -> None:
    found = fxq.compare_onnx(files["float"], basic_net(), X)
    assert len(found.rows) > 5
    assert min(row.sqnr for row in found.rows) > 90


def test_the_model_and_its_float_file_say_the_same(files: dict[str, Path]) -> None:
    model = fxq.compare_onnx(files["int8"], basic_net(), X)
    file = fxq.compare_onnx(files["int8"], files["float"], {"x": X} if "x" in Session(files["int8"]).input_names else X)
    assert [row.node for row in file.rows] == [row.node for row in model.rows]
    for one, other in zip(model.rows, file.rows, strict=True):
        assert one.sqnr == pytest.approx(other.sqnr, abs=0.1)


def test_a_converted_graph_runs_as_it_is_and_a_prepared_one_in_float(files: dict[str, Path]) -> None:
    model = basic_net()
    prepared = fxq.prepare(model, X)
    fxq.calibrate(prepared, [X], progress=False)
    converted = fxq.convert(prepared)
    alike = fxq.compare_onnx(files["int8"], converted, X)
    assert alike.outputs[0].sqnr > 35
    assert any(row.kind == "DequantizeLinear" for row in alike.rows)
    real = fxq.compare_onnx(files["int8"], prepared, X)
    assert [row.sqnr for row in real.rows] == pytest.approx(
        [row.sqnr for row in fxq.compare_onnx(files["int8"], model, X).rows]
    )


def test_inputs_are_cast_to_what_a_file_takes(files: dict[str, Path]) -> None:
    found = fxq.compare_onnx(files["half"], files["int8"], X)
    assert 20 < found.outputs[0].sqnr < 200
    assert len(found.rows) > 5


def test_several_batches_add_up(files: dict[str, Path]) -> None:
    whole = fxq.compare_onnx(files["int8"], files["float"], X)
    parts = fxq.compare_onnx(files["int8"], files["float"], list(X.split(1)))
    assert (whole.samples, parts.samples) == (4, 4)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one.sqnr == pytest.approx(other.sqnr, abs=1e-3)


def test_a_drop_is_at_the_tensor_that_is_wrong(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["float"])
    bias = next(t for t in model.graph.initializer if "bias" in t.name and "conv2" in t.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.05), bias.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    found = fxq.compare_onnx(tmp_path / "wrong.onnx", files["float"], X)
    parted = next(row for row in found.rows if row.sqnr < math.inf)
    assert parted.node.endswith("bn2")  # into which the convolution is fused
    assert parted.max_error == pytest.approx(0.05, rel=1e-3)
    assert math.isnan(parted.drop)  # nothing that it reads differs
    assert all(row.drop < 40 for row in found.drops())


def test_outputs_of_other_tools_meet_by_their_order(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["float"])
    names = {name: f"t{index}" for index, node in enumerate(model.graph.node) for name in node.output}
    for node in model.graph.node:
        del node.metadata_props[:]
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for value in model.graph.output:
        value.name = names[value.name]
    onnx.save(model, tmp_path / "foreign.onnx")
    for reference in (files["int8"], basic_net()):
        found = fxq.compare_onnx(tmp_path / "foreign.onnx", reference, X)
        assert found.rows == found.outputs
        assert len(found.outputs) == 1
    assert fxq.compare_onnx(tmp_path / "foreign.onnx", files["float"], X).outputs[0].sqnr == math.inf


def test_several_and_nested_inputs(tmp_path: Path) -> None:
    model, given = nested_model(), nested_inputs()
    quantized = fxq.quantize(model, [given], progress=False)
    path = fxq.export(quantized, tmp_path / "nested.onnx")
    found = fxq.compare_onnx(path, model, given)
    assert found.outputs
    assert all(row.sqnr > 15 for row in found.outputs)


def test_inputs_by_the_files_names_reach_a_model_with_others(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left * 2 - right

    model, given = Difference(), (image(2, 3), image(2, 3) * 5)
    path = fxq.export(fxq.trace(model, given), tmp_path / "m.onnx", input_names=["b", "a"])
    by_name = {"a": given[1], "b": given[0]}
    for inputs in (by_name, given, {"right": given[1], "left": given[0]}):
        assert fxq.compare_onnx(path, model, inputs).outputs[0].sqnr > 100


def test_as_text_data_and_picture(files: dict[str, Path]) -> None:
    found = fxq.compare_onnx(files["int8"], files["float"], X)
    assert "tensors compared on 4 samples" in str(found)
    assert [row["node"] for row in found.to_dict()["rows"]] == [row.node for row in found.rows]
    assert "a file against its reference" in found._repr_html_()
    assert found.plot().axes


def test_what_cannot_be_compared(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no input"):
        fxq.compare_onnx(files["int8"], files["float"], [])
    with pytest.raises(EngineError, match="there is no file"):
        fxq.compare_onnx(tmp_path / "none.onnx", files["float"], X)
    with pytest.raises(CalibrationError, match=r"a batch holds 0 inputs and float\.onnx takes"):
        fxq.compare_onnx(files["int8"], files["float"], ())
    wider = fxq.export(fxq.trace(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), X), tmp_path / "wider.onnx")
    with pytest.raises(FxqError, match="has shape"):
        fxq.compare_onnx(wider, files["float"], X)
