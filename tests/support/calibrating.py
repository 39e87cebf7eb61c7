"""A small graph with quantizers to calibrate, and batches for it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxq.graph import ORIGIN, Origin
from fxq.quantizer import Quantizer, quantizers
from fxq.recipe import QSpec


class Net(nn.Module):
    """Two inputs, a weight, a shared scale, and a place where NaN can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.weight).relu()
        ratio = hidden / y
        root = ratio.sqrt()
        return torch.cat([hidden, root], 1)


PLACES = {"x": None, "weight": None, "hidden": None, "relu": "cat", "sqrt": "cat"}


def prepared(method: str = "max") -> fx.GraphModule:
    """Net with quantizers on its input, its weight, and both inputs of the concatenation, which are tied."""
    torch.manual_seed(0)
    gm = fx.symbolic_trace(Net())
    gm.add_submodule("quantizers", nn.Module())
    spec = QSpec("int8", symmetric=True, granularity="per-tensor", method=method)
    for node in list(gm.graph.nodes):
        if node.name not in PLACES:
            continue
        node.meta[ORIGIN] = Origin(module_path=f"net.{node.name}", source="net.py:7")
        weight = node.op == "get_attr"
        quantizer = Quantizer(spec, tensor=node.name, axis=0 if weight else None, tie=PLACES[node.name], weight=weight)
        gm.add_submodule(f"quantizers.{node.name}", quantizer)
        with gm.graph.inserting_after(node):
            call = gm.graph.call_module(f"quantizers.{node.name}", (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, own=call: user is not own)
    gm.recompile()
    return gm


def batch(size: int = 4, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3) * scale, torch.rand(size, 4) + 0.5


def scales(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {name: q.scale.clone() for name, q in quantizers(gm).items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
