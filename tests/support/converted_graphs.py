"""Converted graphs made by hand, as ``fxq.convert`` gives them, for tests of what comes after it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxq.backends.onnx_export import export_onnx
from fxq.graph import ORIGIN, Origin
from fxq.qdq import DEQUANTIZE, QUANTIZE, quantize


class GraphBuilder:
    """Builds a GraphModule node by node; every node gets an origin with a line number of its own."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.line = 0

    def input(self, name: str) -> fx.Node:
        return self.graph.placeholder(name)

    def tensor(self, path: str, value: Tensor) -> fx.Node:
        owner = self.root
        *folders, name = path.split(".")
        for folder in folders:
            if not hasattr(owner, folder):
                owner.add_module(folder, torch.nn.Module())
            owner = getattr(owner, folder)
        if not hasattr(owner, name):
            owner.register_buffer(name, value)
        return self.graph.get_attr(path)

    def call(
        self, target: Callable[..., Any], *args: Any, name: str, module: str | None = None, **kwargs: Any
    ) -> fx.Node:
        """A call; `module` is the path of the module of which it is the whole call."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.line += 1
        node.meta[ORIGIN] = Origin(
            module_path=module or name.rpartition("_")[0],
            source=f"model.py:{self.line}",
            code=f"line {self.line}",
            call=module is not None,
        )
        return node

    def qdq(
        self,
        x: fx.Node,
        scale: float | Tensor,
        zero_point: int = 0,
        *,
        dtype: str = "int8",
        axis: int | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """An activation's quantizer."""
        name = name or x.name
        values = torch.as_tensor(scale)
        rest = (
            self.tensor(f"quantizers.{name}.scale", values),
            self.tensor(f"quantizers.{name}.zero_point", torch.full(values.shape, zero_point, dtype=torch.int32)),
            axis,
        )
        integers = self.call(QUANTIZE, x, *rest, dtype, name=f"{name}_quantize")
        return self.call(DEQUANTIZE, integers, *rest, name=f"{name}_quantizer")

    def weight(self, path: str, value: Tensor, axis: int | None = 0, *, dtype: str = "int8") -> fx.Node:
        """A weight stored as integers, with its DQ."""
        flat = value.abs().amax() if axis is None else value.transpose(0, axis).flatten(1).abs().amax(dim=1)
        scale = flat / {"int8": 127, "float8_e4m3fn": 448}[dtype]
        zero = torch.zeros(scale.shape, dtype=torch.int32)
        name = path.replace(".", "_")
        return self.call(
            DEQUANTIZE,
            self.tensor(path, quantize(value, scale, zero, axis, dtype)),
            self.tensor(f"quantizers.{name}.scale", scale),
            self.tensor(f"quantizers.{name}.zero_point", zero),
            axis,
            name=f"{name}_quantizer",
        )

    def conv(
        self,
        x: fx.Node,
        path: str,
        channels: tuple[int, int],
        *,
        groups: int = 1,
        stride: int = 1,
        bias: bool = True,
    ) -> fx.Node:
        """A 3x3 convolution with an INT8 weight; channels are (in, out)."""
        weight = self.weight(f"{path}.weight", torch.randn(channels[1], channels[0] // groups, 3, 3) * 0.1)
        shift = self.tensor(f"{path}.bias", torch.randn(channels[1]) * 0.1) if bias else None
        name = path.replace(".", "_")
        return self.call(F.conv2d, x, weight, shift, name=name, module=path, stride=stride, padding=1, groups=groups)

    def linear(self, x: fx.Node, path: str, features: tuple[int, int], *, bias: bool = True) -> fx.Node:
        """A linear layer with an INT8 weight; features are (in, out)."""
        weight = self.weight(f"{path}.weight", torch.randn(features[1], features[0]) * 0.2)
        shift = self.tensor(f"{path}.bias", torch.randn(features[1]) * 0.1) if bias else None
        return self.call(F.linear, x, weight, shift, name=path.replace(".", "_"), module=path)

    def build(self, result: Any) -> fx.GraphModule:
        self.graph.output(result)
        return fx.GraphModule(self.root, self.graph).eval()


def residual_net() -> tuple[fx.GraphModule, tuple[Tensor]]:
    """A residual block with grouped convolution, hardswish and a skip in INT8, and a classifier."""
    b = GraphBuilder()
    x = b.input("x")
    stem = b.conv(b.qdq(x, 0.03), "stem", (3, 8))
    stem = b.call(F.hardswish, stem, name="act", module="act")
    skip = b.qdq(stem, 0.012)
    body = b.conv(skip, "layer1.0.conv1", (8, 8), groups=2, bias=False)
    body = b.call(torch.relu, body, name="layer1_0_relu", module="layer1.0.relu")
    body = b.conv(b.qdq(body, 0.008), "layer1.0.conv2", (8, 8))
    total = b.call(operator.add, body, skip, name="layer1_0_add")
    out = b.call(torch.relu, total, name="layer1_0_relu_1", module="layer1.0.relu")
    pooled = b.call(F.adaptive_avg_pool2d, out, (1, 1), name="avgpool", module="avgpool")
    flat = b.call(torch.flatten, pooled, 1, name="flatten")
    logits = b.linear(b.qdq(flat, 0.01), "fc", (8, 10))
    return b.build(logits), (torch.randn(4, 3, 8, 8),)


def export(gm: fx.GraphModule, args: tuple[Any, ...], path: Path, **options: Any) -> onnx.ModelProto:
    """Export a graph, and read the file."""
    assert export_onnx(gm, args, options.pop("kwargs", None), path, **options) == path
    return onnx.load(path)
