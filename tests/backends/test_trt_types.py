"""What stays float32 in an engine whose file says float16 or bfloat16: nothing that 16 bits could hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import image, seeded

import fxq
from fxq.backends.onnx_graph import OnnxGraph

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from compute_types import causes

SHAPE = (2, 16, 16, 16)


class Mixed(nn.Module):
    """A residual block, squeeze and excitation, a hard swish, a pool in float and a convolution left float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
        self.plain = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.conv(x)).relu()
        x = x * torch.sigmoid(self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()))
        x = nn.functional.avg_pool2d(self.plain(nn.functional.hardswish(x)), 2)
        return self.head(x.mean((2, 3)))


@pytest.mark.usefixtures("trt")
class TestFloat32:
    def built(self, compute_dtype: str, folder: Path, **options: object) -> dict[str, object]:
        recipe = fxq.Recipe([fxq.Rule("plain", None)])
        quantized = fxq.quantize(seeded(Mixed), [image(*SHAPE)], recipe=recipe, progress=False)
        path = folder / f"{compute_dtype}.onnx"
        fxq.export(quantized, path, compute_dtype=compute_dtype, dynamic_shapes=None, **options)  # type: ignore[arg-type]
        kernels = fxq.build(path, folder / f"{compute_dtype}.engine").kernels
        assert kernels is not None
        assert any(k.weighted and not k.reads_int8 for k in kernels), "a float convolution was wanted"
        graph = OnnxGraph(path)
        return causes(kernels, frozenset(graph.inputs | graph.outputs))

    @pytest.mark.parametrize("compute_dtype", ["fp16", "bf16"])
    def test_only_edges_and_sums(self, compute_dtype: str, tmp_path: Path) -> None:
        """Inputs and outputs keep their type; sums of INT8 convolutions and bfloat16 pools are this builder's own."""
        found = self.built(compute_dtype, tmp_path)
        assert found["float32_left"] == []
        assert (found["pools"] > 0) == (compute_dtype == "bf16")  # type: ignore[operator]
        assert found["float"] > 0  # type: ignore[operator]
        assert found["sums"] > 0  # type: ignore[operator]

    def test_the_check_sees_what_is_left(self, tmp_path: Path) -> None:
        """In a float32 file nearly all is, and in a float16 one what an island of the user's holds."""
        assert self.built("fp32", tmp_path)["float32_left"]
        assert self.built("fp16", tmp_path, islands=["plain"])["float32_left"]

    def test_half_the_bytes(self, tmp_path: Path) -> None:
        single, half = (self.built(name, tmp_path) for name in ("fp32", "fp16"))
        assert half["float"] == (single["float"] + single["pools"]) / 2  # type: ignore[operator]
        assert half["io"] == single["io"]
        assert half["int8"] == single["int8"]


class Refused(nn.Module):
    """What TensorRT does not take in bfloat16 as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(16, 32, 3, padding=1), nn.ConvTranspose2d(32, 16, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.mish(nn.functional.hardswish(self.stem(x)))
        return self.up(x)


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("quantized", [True, False])
def test_what_tensorrt_refuses_in_bfloat16(quantized: bool, tmp_path: Path) -> None:
    """Products with a gate are written out, a transposed convolution is a float32 island: either way it builds."""
    model = seeded(Refused)
    graph = fxq.quantize(model, [image(*SHAPE)], progress=False) if quantized else fxq.trace(model, image(*SHAPE))
    path = fxq.export(graph, tmp_path / "m.onnx", compute_dtype="bf16", dynamic_shapes=None)
    nodes = {node.op: node for node in OnnxGraph(path).nodes}
    assert not nodes.keys() & {"HardSwish", "Mish"}
    assert {nodes[op].fx_node for op in ("HardSigmoid", "Softplus", "Tanh")} == {"hardswish", "mish"}
    assert fxq.build(path, tmp_path / "m.engine").kernels
