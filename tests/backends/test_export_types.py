"""fxq.export in 16 bits: what the files compute, and the types of the kernels that are built of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from networks import sqnr_db
from torch import Tensor, nn

import fxq
from fxq.backends.onnx_typing import FLOAT32_REASON
from fxq.backends.onnxrt import Session
from fxq.backends.trt_build import build
from fxq.errors import ExportError, RecipeError


class Net(nn.Module):
    """A residual convolution, attention with a softmax, a norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.conv(x))
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).chunk(3, -1)
        attended = torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, -1) @ v
        return self.fc((tokens + attended).mean(1))


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any, Tensor]:
    """Quantized, float, and an input."""
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 12, 12)
    return fxq.quantize(model, [x], progress=False), fxq.trace(model, x), x


class TestExport:
    """fxq.export writes it."""

    @pytest.mark.parametrize("quantized", [True, False])
    def test_float16_computes_what_float32_does(self, net: Any, tmp_path: Path, quantized: bool) -> None:
        gm, x = net[0 if quantized else 1], net[2]
        wide = Session(fxq.export(gm, tmp_path / "a.onnx")).run(x)[0]
        path = fxq.export(gm, tmp_path / "b.onnx", compute_dtype="fp16")
        half = Session(path).run(x)[0]
        assert half.dtype == torch.float32
        # INT8 rounds some values the other way; without it only float16's own rounding remains.
        assert sqnr_db(wide, half) > (28 if quantized else 60)
        kept = onnx.load(path)
        assert {p.key: p.value for p in kept.metadata_props}["fxq.compute_dtype"] == "fp16"
        casts = [node for node in kept.graph.node if node.op_type == "Cast"]
        assert len(casts) == (1 if quantized else 2)
        floats = [t.name for t in kept.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        assert floats == (["x_scale_float32"] if quantized else []) or all("scale" in name for name in floats)

    def test_bfloat16_in_torch(self, net: Any, tmp_path: Path) -> None:
        """ONNX Runtime's CPU provider has no bfloat16, so the same types run in PyTorch; the file is checked."""
        gm, _, x = net
        path = fxq.export(gm, tmp_path / "m.onnx", compute_dtype="bf16")
        onnx.checker.check_model(onnx.load(path), full_check=True)
        assert onnx.load(path).opset_import[0].version == 22
        narrow = copy.deepcopy(gm).to(torch.bfloat16)
        assert sqnr_db(gm(x), narrow(x.bfloat16()).float()) > 18

    def test_islands_by_rule(self, net: Any, tmp_path: Path) -> None:
        gm = net[1]
        matches: list[Any] = ["op:softmax", nn.LayerNorm, "fc", lambda node: node.name == "mean"]
        for match, op in zip(matches, ["Softmax", "LayerNormalization", "Gemm", "ReduceMean"], strict=True):
            path = fxq.export(gm, tmp_path / "m.onnx", compute_dtype="fp16", islands=[match])
            kept = {n.op_type for n in onnx.load(path).graph.node for p in n.metadata_props if p.key == FLOAT32_REASON}
            assert kept == {op}

    def test_overflow_on_the_example_becomes_an_island(self, tmp_path: Path) -> None:
        class Big(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.sqrt((x * 100).square() + 1)

        x = torch.randn(2, 8) * 10
        path = fxq.export(fxq.trace(Big(), x), tmp_path / "m.onnx", compute_dtype="fp16", keep_io_types=False)
        got = Session(path).run(x.half())[0]
        assert bool(got.isfinite().all())
        assert sqnr_db(torch.sqrt((x * 100).square() + 1), got) > 60

    def test_what_is_asked_for_has_to_be(self, net: Any, tmp_path: Path) -> None:
        path = tmp_path / "m.onnx"
        with pytest.raises(ExportError, match="no compute dtype is called 'half'"):
            fxq.export(net[0], path, compute_dtype="half")
        with pytest.raises(RecipeError, match="the island 'op:gelu' matches no operation"):
            fxq.export(net[0], path, compute_dtype="fp16", islands=["op:gelu"])
        with pytest.raises(RecipeError, match="is no list"):
            fxq.export(net[0], path, compute_dtype="fp16", islands="op:softmax")
        with pytest.raises(ExportError, match=r"opset 18 is too low: compute_dtype='fp16' needs 19"):
            fxq.export(net[0], path, compute_dtype="fp16", opset=18)
        assert not path.exists()


def wide_kernels(engine: Any, allowed: set[str]) -> list[str]:
    """Kernels that read or write float32, but for casts of inputs and outputs and for INT8 accumulators.

    This builder writes the accumulators of convolutions with per-channel weights as float32, and the next kernel
    scales them.
    """
    accumulators = {
        t.name for k in engine.kernels if k.kind == "correlation" and k.reads_int8 for t in k.outputs
    } | allowed
    return [
        kernel.name
        for kernel in engine.kernels
        if any(t.dtype == "float32" and t.name not in accumulators for t in (*kernel.inputs, *kernel.outputs))
    ]


@pytest.mark.usefixtures("trt")
class TestEngine:
    """The types of the kernels are those of the file."""

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    @pytest.mark.parametrize("quantized", [True, False])
    def test_no_kernel_is_float32_and_none_only_casts(
        self, net: Any, tmp_path: Path, dtype: str, quantized: bool
    ) -> None:
        gm = net[0 if quantized else 1]
        path = fxq.export(gm, tmp_path / "m.onnx", compute_dtype=dtype, dynamic_shapes=None)
        engine = build(path, tmp_path / "m.engine")
        assert wide_kernels(engine, {"x", "output"}) == []
        narrow = {"fp16": "float16", "bf16": "bfloat16"}[dtype]
        assert engine.kernels is not None
        assert any(t.dtype == narrow for kernel in engine.kernels for t in kernel.outputs)
        bare = [k.name for k in engine.kernels if k.onnx_nodes and all("_to_" in name for name in k.onnx_nodes)]
        assert bare == []
        assert len(engine.int8_kernels) == (6 if quantized else 0)

    def test_a_float32_file_gives_float32_kernels(self, net: Any, tmp_path: Path) -> None:
        path = fxq.export(net[1], tmp_path / "m.onnx", dynamic_shapes=None)
        assert len(wide_kernels(build(path, tmp_path / "m.engine"), {"x", "output"})) > 5

    def test_an_island_runs_in_float32(self, net: Any, tmp_path: Path) -> None:
        islands = [nn.LayerNorm, "op:add"]
        path = fxq.export(net[1], tmp_path / "m.onnx", compute_dtype="fp16", dynamic_shapes=None, islands=islands)
        assert wide_kernels(build(path, tmp_path / "m.engine"), {"x", "output"}) != []
