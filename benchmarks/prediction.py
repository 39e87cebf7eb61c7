"""How far predicted kernels agree with a builder's, as a markdown table.

    python prediction.py --networks resnet18,mobilenet_v2

Needs torchvision, and TensorRT: a `tensorrt` package that can build here, or none, in which case the tests' CPU builder
is set up.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fxq
from fxq.backends.onnx_graph import OnnxGraph
from fxq.backends.trt_agreement import compare_kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "vit", "densenet121")
LIBRARIES = ("tensorrt", "tensorrt-rtx")


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with seeded weights and an image of its size."""
    from torchvision_models import torchvision_model

    if name != "vit":
        return torchvision_model(name), torch.randn(2, 3, 96, 96)
    torchvision_model("alexnet", num_classes=2)  # makes torchvision importable whatever torch is installed
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(64, 16, num_layers=3, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10)
    return model.eval(), torch.randn(2, 3, 64, 64)


def files(name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """The network's float and INT8 files."""
    model, image = network(name)
    yield "FP32", fxq.export(fxq.trace(model, image), folder / f"{name}_fp32.onnx", dynamic_shapes=None)
    quantized = fxq.quantize(model, [image], progress=False)
    yield "INT8", fxq.export(quantized, folder / f"{name}_int8.onnx", dynamic_shapes=None)


def rows(name: str, folder: Path) -> Iterator[str]:
    """The table's lines for one network."""
    for kind, path in files(name, folder):
        engine = fxq.build(path, folder / "net.engine")
        graph = OnnxGraph(path)
        cells = [name, kind, str(len(engine.kernels or ()))]
        for library in LIBRARIES:
            found = compare_kernels(graph, fxq.predict(path, library=library).kernels, engine.kernels or ())
            cells += [str(found.kernels[0]), f"{found.precision_share:.0%}", f"{found.fusion_share:.1%}"]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    args = parser.parse_args()
    if importlib.util.find_spec("tensorrt") is None:
        import trt_cpu

        trt_cpu.load()
    print("| network | | built | `tensorrt` | precision | fusions | `tensorrt-rtx` | precision | fusions |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks.split(","):
            for line in rows(name, Path(folder)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
