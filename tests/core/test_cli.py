"""The command line: what each command prints and writes, its exit codes, and errors without tracebacks."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import RECORD
from inspector import float_skip
from lint_net import IMAGE, Net, residual
from networks import cifar, top1
from PIL import Image
from safetensors.torch import save_file
from torch_engine import TRT, TorchEngine
from typer.testing import CliRunner

from fxq import __version__
from fxq.backends.onnx_lint import lint_onnx
from fxq.backends.onnxrt import Session
from fxq.backends.trt_engine import Engine
from fxq.backends.trt_options import BuildOptions
from fxq.backends.trt_record import BuildRecord, sha256
from fxq.backends.trt_session import Session as TrtSession
from fxq.cli import app
from fxq.errors import FxqError
from fxq.sarif import findings_as_sarif

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
def loader():
    return [torch.randn(4, 3, 12, 12) for _ in range(2)]
def broken():
    raise RuntimeError("no weights here")
number = 3
def strings():
    return ["a"]
def failing():
    yield torch.randn(2, 3, 12, 12)
    raise KeyError("label")
class Wrong(torch.nn.Module):
    def forward(self, x):
        return x @ torch.ones(3, 3)
"""


def write_engine(path: Path) -> None:
    """A file that stands for an engine, with its record."""
    path.write_bytes(b"engine")
    dataclasses.replace(
        RECORD,
        version="10.13.0",
        fxq="0.1.0",
        device="Some GPU",
        onnx_sha256="abc",
        engine_sha256=sha256(path),
        options=BuildOptions(workspace_bytes=1024, weights="stripped").as_dict(),
        profiles={"x": [[1, 8], [4, 8], [16, 8]]},
    ).write(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL)
    onnx.save(residual("shared"), tmp_path / "good.onnx")
    onnx.save(residual(None), tmp_path / "skip.onnx")
    net = Net()
    onnx.save(net.model(net.conv(net.qdq("x", zero=3), "conv")), tmp_path / "bad.onnx")
    return tmp_path


def fxq(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


@pytest.mark.usefixtures("folder")
def test_quantize_lint_and_run() -> None:
    done = fxq("quantize", "net.py:build", "net.onnx", "--data", "net.py:loader")
    assert done.exit_code == 0, done.output
    assert "2 of 2 weighted operations quantized" in done.output
    assert fxq("lint", "net.onnx").exit_code == 0
    ran = fxq("run", "net.onnx", "--batch", "2", "--repeat", "2", "-o", "out.npz")
    assert ran.exit_code == 0, ran.output
    assert "2x16x8x8" in ran.output
    assert re.search(r"latency: p50 [0-9.]+ ms, p90 .*, p99 .*, [0-9]+ samples/s", ran.output)
    assert np.load("out.npz")["output"].shape == (2, 16, 8, 8)


@pytest.mark.usefixtures("folder")
class TestRun:
    """Outputs, times, and the comparison with a model or a file."""

    @pytest.fixture
    def files(self, folder: Path) -> None:
        assert fxq("quantize", "net.py:build", "net.onnx", "--data", "net.py:loader").exit_code == 0
        done = fxq("quantize", "net.py:build", "float.onnx", "--data", "net.py:loader", "--float")
        assert (done.exit_code, done.stdout) == (0, "wrote float.onnx\n")
        assert not any(node.op_type == "QuantizeLinear" for node in onnx.load("float.onnx").graph.node)

    @pytest.mark.usefixtures("files")
    @pytest.mark.parametrize("reference", ["net.py:build", "float.onnx"])
    def test_compare_layer_by_layer(self, reference: str) -> None:
        command = ("run", "net.onnx", "--compare", reference, "--inputs", "net.py:loader", "--repeat", "2")
        done = fxq(*command, "--min-sqnr", "20", "--no-optimize")
        assert done.exit_code == 0, done.output
        rows = [line.split()[:2] for line in done.stdout.splitlines() if "Conv" in line or "Relu" in line]
        assert [kind for _, kind in rows] == ["Conv", "Relu", "Conv"]
        assert "3 tensors compared on 4 samples" in done.stdout
        assert ("float.onnx  p50" in done.stdout) == (reference == "float.onnx")
        low = fxq(*command, "--min-sqnr", "200", "--worst", "1")
        assert low.exit_code == 1
        assert "is below 200 dB" in low.stderr
        assert sum("Conv" in line or "Relu" in line for line in low.stdout.splitlines()) == 1

    @pytest.mark.usefixtures("files")
    def test_inputs_and_shapes(self) -> None:
        save_file({"input": torch.ones(3, 3, 12, 12)}, "x.safetensors")
        done = fxq("run", "net.onnx", "--inputs", "x.safetensors", "--repeat", "0", "-o", "out.npz")
        assert done.exit_code == 0, done.output
        assert "latency" not in done.output
        (expected,) = Session("net.onnx").run(torch.ones(3, 3, 12, 12))
        np.testing.assert_array_equal(np.load("out.npz")["output"], expected.numpy())
        shaped = fxq("run", "net.onnx", "--shape", "input=2x3x12x12", "--repeat", "0")
        assert "output: float32 2x16x8x8" in shaped.output

    @pytest.mark.parametrize("graph", [(), ("--cuda-graph",)])
    def test_without_a_gpu_an_engine_says_what_it_is_and_why_it_does_not_run(
        self, folder: Path, graph: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        write_engine(folder / "net.engine")
        done = fxq("run", "net.engine", *graph)
        assert done.exit_code == 2
        assert done.stdout.splitlines() == [
            "net.engine: built with tensorrt 10.13.0 on Some GPU (8.9), by fxq 0.1.0, from ONNX abc",
            "  x: 1x8 to 16x8, tuned for 4x8",
            "  options: workspace_bytes=1024, weights=stripped",
            "  kernels: not listed by this builder, and no GPU here could load the engine",
        ]
        assert done.stderr.splitlines()[0] == "error: net.engine cannot be run here: torch sees no CUDA GPU"
        assert "Traceback" not in done.output

    def test_an_engine_beside_another_and_a_file(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a torch function behind TensorRT's interface, on the CPU."""
        inputs = {"x": (torch.float32, (1, 8), (4, 8), (16, 8))}
        engine = TorchEngine(lambda x: {"y": x * 2}, inputs, {"y": torch.float32})
        held = TrtSession(TRT, engine, torch.device("cpu"), "test")  # type: ignore[arg-type]
        monkeypatch.setattr(Engine, "_session", property(lambda _: held))
        write_engine(folder / "a.engine")
        (folder / "b.plan").write_bytes(b"of another tool")
        done = fxq("run", "a.engine", "--compare", "b.plan", "--repeat", "3", "-o", "out.npz")
        assert done.exit_code == 0, done.output
        assert "y: float32 4x8" in done.stdout
        assert [line.split()[0] for line in done.stdout.splitlines() if " p50 " in line] == ["a.engine", "b.plan"]
        assert np.load("out.npz")["y"].shape == (4, 8)
        model = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 19]> g (float[n,8] x) => (float[n,8] y)'
            "<float c = {2.02}> { y = Mul (x, c) }"
        )
        onnx.save(model, folder / "twice.onnx")
        beside = fxq("run", "b.plan", "--compare", "twice.onnx", "--batch", "3", "--repeat", "1", "--min-sqnr", "50")
        assert beside.exit_code == 1
        assert "nothing is known of how it was built" in beside.stdout
        assert "y: float32 3x8" in beside.stdout
        assert "y: 40.1 dB is below 50 dB" in beside.stderr


def test_quantize_from_a_numpy_file_with_a_recipe(folder: Path) -> None:
    np.save("data.npy", np.random.default_rng(0).normal(size=(6, 3, 12, 12)).astype(np.float32))
    (folder / "recipe.yaml").write_text("rules:\n- match: '2'\n  spec: null\n  reason: keep it float\n")
    command = ("quantize", "net.py:build", "net.onnx", "--data", "data.npy", "--batch-size", "4", "--static")
    done = fxq(*command, "--recipe", "recipe.yaml")
    assert done.exit_code == 0, done.output
    assert "1 of 2 weighted operations quantized" in done.output
    assert onnx.load("net.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


@pytest.mark.usefixtures("folder")
def test_quantize_on_a_folder_of_images_in_half_precision(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 14, 20, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index}.png")
    command = ("quantize", "net.py:build", "net.onnx", "--data", "photos", "--size", "12", "--batch-size", "2")
    done = fxq(
        *command, "--compute-dtype", "fp16", "--cast-io-types", "--dynamic", "input:0=1..16", "--report", "r.txt"
    )
    assert done.exit_code == 0, done.output
    assert "2 of 2 weighted operations quantized" in Path("r.txt").read_text()
    model = onnx.load("net.onnx")
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {
        onnx.TensorProto.FLOAT16
    }
    held = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(held["fxq.profiles"])["input"][2][0] == 16


def test_a_trained_network_from_its_files_to_a_comparison(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _, _, test, labels = cifar(real_data)
    save_file(model.state_dict(), "resnet20.safetensors")
    np.save("test.npy", test[:256].numpy())
    with np.load(real_data / "cifar10_small.npz") as held:
        pixels, classes = held["train_images"][:256], held["train_labels"][:256]
    for index, (image, label) in enumerate(zip(pixels, classes, strict=True)):
        (tmp_path / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / str(label) / f"{index}.png")
    named = ("networks:ResNet20", "--weights", "resnet20.safetensors")
    done = fxq("quantize", *named, "r20.onnx", "--data", "photos", "--size", "32", "--count", "64")
    assert done.exit_code == 0, done.output
    assert "20 of 20 quantized" in done.stdout
    command = ("run", "r20.onnx", "--inputs", "test.npy", "--repeat", "0", "-o", "out.npz")
    found = fxq(*command, "--compare", *named, "--min-sqnr", "24", "--worst", "3")
    assert found.exit_code == 0, found.output
    with torch.inference_mode():
        reference = top1(model(test[:256]), labels[:256])
    (logits,) = np.load("out.npz").values()
    assert abs(top1(torch.from_numpy(logits), labels[:256]) - reference) <= 1.2  # three of 256


@pytest.mark.usefixtures("folder")
def test_quantize_with_weights_on_random_data() -> None:
    state = {"0.weight": torch.ones(16, 3, 3, 3), "0.bias": torch.zeros(16)}
    state |= {"2.weight": torch.ones(16, 16, 3, 3), "2.bias": torch.zeros(16)}
    save_file(state, "net.safetensors")
    command = ("quantize", "net.py:build", "net.onnx", "--random", "2x3x12x12", "--weights", "net.safetensors")
    done = fxq(*command, "--static", "--input-name", "image", "--output-name", "features")
    assert done.exit_code == 0, done.output
    assert "WARNING" in done.output  # such scales are for measuring speed
    graph = onnx.load("net.onnx").graph
    assert (graph.input[0].name, graph.output[0].name) == ("image", "features")
    integers = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert {int(value) for array in integers if array.ndim == 4 for value in array.flat} == {127}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("args", "code"),
    [(("good.onnx",), 0), (("skip.onnx",), 0), (("skip.onnx", "--strict"), 1), (("bad.onnx",), 1), (("none.onnx",), 2)],
)
def test_exit_codes_of_lint(args: tuple[str, ...], code: int) -> None:
    assert fxq("lint", *args).exit_code == code


@pytest.mark.usefixtures("folder")
def test_lint_as_json_and_sarif() -> None:
    data = json.loads(fxq("lint", "bad.onnx", "--format", "json").stdout)
    assert data["counts"]["error"] == 1
    assert data["findings"][0]["rule"] == "R9"
    assert fxq("lint", "bad.onnx", "--format", "sarif", "-o", "bad.sarif").exit_code == 1
    log = json.loads(Path("bad.sarif").read_text())
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    (result,) = [r for r in run["results"] if r["level"] == "error"]
    assert run["tool"]["driver"]["name"] == "fxq"
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == "R9"
    assert result["message"]["text"].startswith("the zero point is 3, not 0.")
    (place,) = result["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "bad.onnx"
    assert place["logicalLocations"][0]["name"] == "x_q"


def test_sarif_names_the_source_line_and_nothing_else() -> None:
    found = lint_onnx(residual(None))
    plain = findings_as_sarif(found)["runs"][0]["results"]
    assert len(plain) == len(found)
    assert all("physicalLocation" not in place for result in plain for place in result["locations"])
    (result,) = findings_as_sarif([dataclasses.replace(found[0], source="my net.py:7")])["runs"][0]["results"]
    place = result["relatedLocations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "my%20net.py"}, "region": {"startLine": 7}}


def test_report(folder: Path) -> None:
    predicted = fxq("report", "good.onnx", "--format", "json")
    assert predicted.exit_code == 0
    assert len(json.loads(predicted.stdout)["kernels"]) == 4
    (folder / "engine.json").write_text(json.dumps(float_skip(11, IMAGE)))
    found = fxq("report", "skip.onnx", "--engine", "engine.json", "--format", "html", "-o", "report.html")
    assert found.exit_code == 1
    assert Path("report.html").read_text().startswith("<!doctype html>")
    assert "R23" in fxq("report", "skip.onnx", "--engine", "engine.json").stdout


@pytest.mark.usefixtures("trt", "folder")
def test_build() -> None:
    done = fxq("build", "good.onnx", "good.engine", "--log", "builder.log")
    assert done.exit_code == 0, done.output
    assert "weighted kernels reading INT8: 3 of 3" in done.output
    assert fxq("report", "good.onnx", "--engine", "builder.log").exit_code == 0
    assert fxq("report", "good.onnx", "--engine", "good.engine").exit_code == 0
    again = fxq(
        "build", "good.onnx", "b.engine", "--optimization-level", "1", "--workspace", "64", "--cache", "engines"
    )
    assert again.exit_code == 0, again.output
    assert len(list(Path("engines").glob("*.engine"))) == 1
    record = BuildRecord.read(Path("b.engine"))
    assert record is not None
    assert (record.options["workspace_bytes"], record.options["optimization_level"]) == (64 << 20, 1)


ERRORS = {
    "no data": (("quantize", "net.py:build", "x.onnx"), "there is no calibration data"),
    "no file": (("quantize", "gone.py:build", "x.onnx", "--data", "net.py:loader"), "there is no file gone.py"),
    "no name": (("quantize", "net.py:bild", "x.onnx", "--data", "net.py:loader"), "net.py has no 'bild'"),
    "no model": (("quantize", "net.py:number", "x.onnx", "--data", "net.py:loader"), "gives a int, not an nn.Module"),
    "it fails": (("quantize", "net.py:broken", "x.onnx", "--data", "net.py:loader"), "RuntimeError: no weights here"),
    "no entry": (("quantize", "net.py", "x.onnx", "--data", "net.py:loader"), "names no Python object"),
    "bad data": (("quantize", "net.py:build", "x.onnx", "--data", "gone.npy"), "cannot read gone.npy"),
    "two data": (
        ("quantize", "net.py:build", "x.onnx", "--data", "a.npy", "--random", "1x3x8x8"),
        "--data and --random",
    ),
    "no size": (("quantize", "net.py:build", "x.onnx", "--data", "."), "--size 224"),
    "no images": (("quantize", "net.py:build", "x.onnx", "--data", ".", "--size", "8"), "there are no images in"),
    "no shape": (("quantize", "net.py:build", "x.onnx", "--random", "1x3x0x8"), "'1x3x0x8' is no shape"),
    "no mean": (
        ("quantize", "net.py:build", "x.onnx", "--data", ".", "--size", "8", "--mean", "a,b"),
        "'a,b' is no list of numbers",
    ),
    "wrong shape": (("quantize", "net.py:build", "x.onnx", "--random", "1x4x12x12"), "4"),
    "no device": (("quantize", "net.py:build", "x.onnx", "--random", "1x3x12x12", "--device", "cua"), "go to cua"),
    "no island": (
        (
            "quantize",
            "net.py:build",
            "x.onnx",
            "--random",
            "1x3x12x12",
            "--compute-dtype",
            "fp16",
            "--island",
            "op:cat",
        ),
        "matches no operation",
    ),
    "dynamic": (
        ("quantize", "net.py:build", "x.onnx", "--random", "1x3x12x12", "--dynamic", "input=1"),
        "'input=1' is no dynamic dimension",
    ),
    "static and dynamic": (
        ("quantize", "net.py:build", "x.onnx", "--random", "1x3x12x12", "--static", "--dynamic", "input:0=n"),
        "--static and --dynamic",
    ),
    "no such input": (("quantize", "net.py:build", "x.onnx", "--random", "1x3x12x12", "--dynamic", "y:0=n"), "y"),
    "no target": (("quantize", "net.py:build", "x.onnx", "--random", "1x3x12x12", "--target", "tensort"), "tensort"),
    "data that fail": (("quantize", "net.py:build", "x.onnx", "--data", "net.py:failing"), "failed: KeyError: 'label'"),
    "a model that fails": (("quantize", "net.py:Wrong", "x.onnx", "--data", "net.py:loader"), "net.py:18"),
    "no tensors": (("run", "good.onnx", "--inputs", "net.py:strings"), "net.py:strings gives a str for the input x"),
    "a folder to run": (("run", "."), "there is no file ."),
    "no kernels in a folder": (("report", "good.onnx", "--engine", "."), "cannot read ."),
    "no recipe": (
        ("quantize", "net.py:build", "x.onnx", "--data", "net.py:loader", "--recipe", "gone.yaml"),
        "gone.yaml",
    ),
    "no ONNX": (("lint", "net.py"), "no ONNX model in net.py"),
    "profile": (("build", "good.onnx", "x.engine", "--profile", "x=1x3"), "'x=1x3' is no profile"),
    "two profiles": (
        ("build", "good.onnx", "x.engine", "--profile", "x=1,2,3", "--profile", "x=1,2,3"),
        "there are two profiles for x",
    ),
    "no HTML": (("report", "good.onnx", "--format", "html"), "a prediction has no HTML"),
    "no kernels": (("report", "good.onnx", "--engine", "net.py"), "lists no kernels"),
    "nothing to compare": (("run", "good.onnx", "--min-sqnr", "3"), "there is nothing to compare with"),
    "no input": (("run", "good.onnx", "--shape", "y=1x2"), "good.onnx has no input y"),
    "no input shape": (("run", "good.onnx", "--shape", "1x2"), "'1x2' is no input and shape"),
    "no engine": (("run", "gone.engine"), "there is no engine file gone.engine"),
    "no engine to report": (("report", "good.onnx", "--engine", "gone.engine"), "there is no engine file gone.engine"),
    "another reference": (("run", "good.onnx", "--compare", "gone.py:build"), "there is no file gone.py"),
    "findings over the model": (("lint", "good.onnx", "-o", "good.onnx"), "good.onnx is a file that is read here"),
    "kernels over the model": (("report", "good.onnx", "-o", "good.onnx"), "good.onnx is a file that is read here"),
    "an engine over the model": (("build", "good.onnx", "good.onnx"), "good.onnx is a file that is read here"),
    "a log over the model": (("build", "good.onnx", "x.engine", "--log", "good.onnx"), "good.onnx is a file"),
    "an engine over a folder": (("build", "good.onnx", "."), ". is a folder"),
    "findings over a folder": (("lint", "good.onnx", "-o", "."), ". is a folder"),
    "a fixed file over a folder": (("lint", "good.onnx", "--fix", "-o", "."), ". is a folder"),
    "outputs over the model": (("run", "good.onnx", "-o", "good.onnx"), "good.onnx is a file that is read here"),
    "a network over a folder": (("quantize", "net.py:build", ".", "--random", "1x3x12x12"), ". is a folder"),
    "no folder": (("quantize", "net.py:build", "gone/x.onnx", "--random", "1x3x12x12"), "there is no folder gone"),
    "report and network in one": (
        ("quantize", "net.py:build", "x.onnx", "--random", "1x3x12x12", "--report", "x.onnx"),
        "both the network and the report",
    ),
    "nothing to run": (("run", "gone.onnx"), "there is no file gone.onnx"),
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_a_sentence_and_a_next_step(name: str) -> None:
    args, message = ERRORS[name]
    done = fxq(*args)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not Path("x.onnx").exists()
    assert not lint_onnx("good.onnx"), "the given model is as it was"


@pytest.mark.gpu
@pytest.mark.usefixtures("folder")
def test_quantize_on_a_gpu() -> None:
    done = fxq("quantize", "net.py:build", "net.onnx", "--data", "net.py:loader", "--device", "cuda")
    assert done.exit_code == 0, done.output
    found = fxq("run", "net.onnx", "--compare", "net.py:build", "--inputs", "net.py:loader", "--min-sqnr", "20")
    assert found.exit_code == 0, found.output


def test_version() -> None:
    assert fxq("--version").stdout == f"fxq {__version__}\n"


@pytest.mark.usefixtures("folder")
def test_debug_raises() -> None:
    assert isinstance(fxq("--debug", "lint", "net.py").exception, FxqError)


@pytest.mark.parametrize("command", ["quantize", "lint", "build", "report", "run"])
def test_help_has_an_example(command: str) -> None:
    done = fxq(command, "--help")
    assert done.exit_code == 0
    assert f"fxq {command} net" in done.output


def test_a_process_of_its_own(folder: Path) -> None:
    command = [sys.executable, "-m", "fxq", "lint", "bad.onnx"]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "R9" in done.stdout
    assert done.stderr == ""


class TestLintFix:
    """``fxq lint --fix``: what it writes, prints and exits with."""

    def test_it_writes_beside_the_file_and_says_what_it_did(self, folder: Path) -> None:
        onnx.save(residual("shared", conv=True), folder / "both.onnx")
        before = (folder / "both.onnx").read_bytes()
        done = fxq("lint", "both.onnx", "--fix-rounding")
        assert done.exit_code == 0, done.output
        assert "fixed: R23 add: let it read 'conv2' in float (other rounding)" in done.output
        assert "left: no findings" in done.output
        assert "wrote both.fixed.onnx" in done.output
        assert (folder / "both.onnx").read_bytes() == before
        assert not lint_onnx(folder / "both.fixed.onnx")
        assert "[fixed by --fix-rounding]" in fxq("lint", "both.onnx").output

    def test_the_exit_code_is_that_of_what_is_left(self, folder: Path) -> None:
        assert fxq("lint", "skip.onnx", "--fix", "--strict", "-o", "out.onnx").exit_code == 1
        assert fxq("lint", "skip.onnx", "--fix-rounding", "--strict", "-o", "out.onnx").exit_code == 0
        assert fxq("lint", "bad.onnx", "--fix").exit_code == 1
        assert (folder / "bad.fixed.onnx").read_bytes() == (folder / "bad.onnx").read_bytes()

    def test_in_place(self, folder: Path) -> None:
        done = fxq("lint", "skip.onnx", "--fix-rounding", "--in-place")
        assert "wrote skip.onnx" in done.output
        assert not lint_onnx(folder / "skip.onnx")
        assert "skip.onnx is as it was" in fxq("lint", "skip.onnx", "--fix-rounding", "--in-place").output
        refused = fxq("lint", "skip.onnx", "--in-place")
        assert refused.exit_code == 2
        assert "add --fix" in refused.output

    @pytest.mark.usefixtures("folder")
    def test_as_data(self) -> None:
        done = CliRunner().invoke(app, ["lint", "skip.onnx", "--fix-rounding", "--format", "json"])
        data = json.loads(done.stdout)
        assert [change["rule"] for change in data["changes"]] == ["R23"]
        assert data["left"]["findings"] == []
        left = json.loads(CliRunner().invoke(app, ["lint", "skip.onnx", "--fix", "--format", "sarif"]).stdout)
        (result,) = left["runs"][0]["results"]
        assert result["properties"] == {"fixable": "rounding"}
