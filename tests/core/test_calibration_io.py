"""Calibration to and from files: what was saved goes on, and ranges of others set scales."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from rank_worker import batches, prepared
from torch import Tensor, fx

import fxq
from fxq import calibration_io as io
from fxq.errors import CalibrationError
from fxq.quantizer import quantizers


def scales(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {name: q.scale.clone() for name, q in quantizers(gm).items()}


def equal(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    one, other = scales(a), scales(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def calibrated(method: str = "mse", count: int = 6) -> fx.GraphModule:
    gm = prepared(method)
    fxq.calibrate(gm, batches(count), bias_correction=False)
    return gm


@pytest.mark.parametrize("method", ["max", "moving-average", "entropy"])
def test_saved_statistics_go_on_where_they_stopped(method: str, tmp_path: Path) -> None:
    data = batches(10)
    whole, first, second = prepared(method), prepared(method), prepared(method)
    fxq.calibrate(whole, data, bias_correction=False)
    fxq.calibrate(first, data[:4], bias_correction=False)
    io.save_statistics(first, tmp_path / "state.safetensors")
    io.load_statistics(second, tmp_path / "state.safetensors")
    assert equal(first, second)
    fxq.calibrate(second, data[4:], reset=False, bias_correction=False)
    assert equal(whole, second)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_loaded_statistics_are_solved_without_data(tmp_path: Path) -> None:
    gm = calibrated()
    io.save_statistics(gm, tmp_path / "state")
    other = prepared("mse")
    io.load_statistics(other, tmp_path / "state")
    fxq.solve(gm, "entropy")
    fxq.solve(other, "entropy")
    assert equal(gm, other)
    fxq.convert(other)


def test_statistics_of_other_observers_are_refused(tmp_path: Path) -> None:
    io.save_statistics(calibrated("max"), tmp_path / "state")
    other = prepared("mse")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"MinMax.*in the file and.*Histogram.*in the graph"):
        io.load_statistics(other, tmp_path / "state")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    (tmp_path / "junk").write_bytes(b"no such thing at all")
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        io.load_statistics(other, tmp_path / "junk")


def test_ranges_come_back_bit_for_bit_without_data(tmp_path: Path) -> None:
    gm, other = calibrated(), prepared("mse")
    io.write_amax(gm, tmp_path / "amax.json")
    io.set_amax(other, io.read_amax(tmp_path / "amax.json"))
    assert equal(gm, other)
    x = batches(1)[0]
    assert torch.equal(fxq.convert(gm)(x), fxq.convert(other)(x))
    written = json.loads((tmp_path / "amax.json").read_text())
    weight = next(q for q in quantizers(gm).values() if q.weight)
    assert len(written[weight.tensor]) == weight.scale.numel()


def test_ranges_are_named_by_tensor_or_by_module_and_ties_take_the_largest() -> None:
    gm = prepared("max")
    observed = {name: q for name, q in quantizers(gm).items() if not q.weight}
    amax = {q.tensor: 2.0 + i for i, q in enumerate(observed.values())}
    io.set_amax(gm, amax)
    for quantizer in observed.values():
        group = [q for q in observed.values() if q is quantizer or (q.tie is not None and q.tie == quantizer.tie)]
        assert quantizer.scale == torch.tensor(max(amax[q.tensor] for q in group) / 127)
    assert all(q.solved for q in quantizers(gm).values())  # weights take their own
    row = next(row for row in fxq.solve(calibrated("max")).rows if row.module_path)
    other = prepared("max")
    io.set_amax(other, {row.module_path: 5.0}, partial=True)
    assert next(q for q in quantizers(other).values() if q.tensor == row.name).scale == torch.tensor(5 / 127)


@pytest.mark.parametrize(
    ("amax", "said"),
    [
        ({"nobody": 1.0}, "no quantized tensor is called nobody"),
        ({}, "there is no amax for"),
        ({"x": [1.0, 2.0]}, "x needs one number"),
        ({"x": -1.0}, "amax of x is -1"),
        ({"x": float("nan")}, "amax of x is nan"),
    ],
)
def test_ranges_that_do_not_fit_change_nothing(amax: dict[str, io.Amax], said: str) -> None:
    gm = calibrated()
    before = scales(gm)
    with pytest.raises(CalibrationError, match=said):
        io.set_amax(gm, amax)
    assert all(torch.equal(before[k], v) for k, v in scales(gm).items())


def test_asymmetric_ranges_and_missing_scales_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="have no scale"):
        io.write_amax(prepared("max"), tmp_path / "amax.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"x": "wide"}',
        '{"x": []}',
        '{"x": true}',
        "{",
        '{"x": 1, "x": 2}',
        '{"x": NaN}',
        '{"x": -1}',
        '{"x": [1, Infinity]}',
        '{"x": [[1]]}',
    ],
)
def test_json_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "amax.json").write_text(text)
    with pytest.raises(CalibrationError):
        io.read_amax(tmp_path / "amax.json")


def test_a_calibration_cache_of_tensorrt_is_read(tmp_path: Path) -> None:
    scale = 0.0078740157
    bits = struct.pack(">f", scale).hex()
    path = tmp_path / "calibration.cache"
    path.write_text(f"TRT-8601-EntropyCalibration2\nx: {bits}\n(Unnamed Layer* 3) [a::b]: 3c010a14\nzero: 0\n")
    found = io.read_tensorrt_cache(path)
    assert list(found) == ["x", "(Unnamed Layer* 3) [a::b]", "zero"]
    assert found["x"] == pytest.approx(1.0, rel=1e-6)
    assert found["(Unnamed Layer* 3) [a::b]"] == 127 * struct.unpack(">f", bytes.fromhex("3c010a14"))[0]
    gm = prepared("max")
    io.set_amax(gm, found, partial=True)
    x = next(q for q in quantizers(gm).values() if q.tensor == "x")
    assert x.scale == torch.tensor(scale)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "TRT-8601-MinMax\nx 3c010a14\n",
        "TRT-8601\nx: zz\n",
        "TRT-1\nx: 7fc00000\n",
        "no",
        "TRT-8601\n",
        "TRT-8601\nx: bf800000\n",
        "TRT-8601\nx: 3c010a14ff\n",
        "TRT-8601\nx: 3c010a14\nx: 3c010a15\n",
        "TRT-8601\n: 3c010a14\n",
        "\x00\x01TRT-8601\nx: 3c010a14\n",
    ],
)
def test_a_cache_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text(text)
    with pytest.raises(CalibrationError):
        io.read_tensorrt_cache(tmp_path / "cache")


def test_files_that_are_not_there_or_not_text_are_told(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "binary"):
        for read in (io.read_amax, io.read_tensorrt_cache):
            with pytest.raises(CalibrationError, match=f"{path} cannot be read"):
                read(path)


def test_a_cache_with_the_line_ends_of_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"TRT-8601-MinMax\r\nx: 3c010a14\r\n\r\n")
    assert list(io.read_tensorrt_cache(tmp_path / "cache")) == ["x"]


@pytest.mark.gpu
def test_files_reach_a_graph_on_the_gpu(tmp_path: Path) -> None:
    gm, x = calibrated("mse").cuda(), batches(1)[0].cuda()
    io.save_statistics(gm, tmp_path / "state")
    io.write_amax(gm, tmp_path / "amax.json")
    loaded, given = prepared("mse").cuda(), prepared("mse").cuda()
    io.load_statistics(loaded, tmp_path / "state")
    io.set_amax(given, io.read_amax(tmp_path / "amax.json"))
    for other in (loaded, given):
        assert all(q.scale.is_cuda for q in quantizers(other).values())
        assert torch.equal(fxq.convert(other)(x), fxq.convert(gm)(x))
    fxq.solve(loaded, "auto")
    fxq.calibrate(loaded, batches(2), reset=False)
    fxq.solve(loaded, "max", batches=batches(2))
    assert fxq.convert(loaded)(x).isfinite().all()
