"""Graphs that train, and a few steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from toys import basic_net, bottleneck_net, branches, lenet, preactivation_net, seeded

import fxq
from fxq import qat
from fxq.graph import constant
from fxq.qdq import DEQUANTIZE

POLICIES = tuple(qat.POLICIES)
IMAGE = (4, 3, 16, 16)


class OddLayers(nn.Module):
    """Every kind of layer that BatchNorm folds into, with groups, a bias, and a channel whose gamma is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.n1 = nn.ConvTranspose2d(3, 8, 3, 2, groups=1), nn.BatchNorm2d(8)
        self.grouped, self.n2 = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)
        self.upgrouped, self.n3 = nn.ConvTranspose2d(8, 8, 2, groups=2, bias=False), nn.BatchNorm2d(8, affine=False)
        self.fc, self.n4 = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.n1(self.up(x)))
        x = torch.relu(self.n2(self.grouped(x)))
        x = torch.relu(self.n3(self.upgrouped(x)))
        return self.n4(self.fc(x.mean((2, 3))))


def odd_layers() -> nn.Module:
    model = seeded(OddLayers)
    with torch.no_grad():
        model.n2.weight[1] = 0  # type: ignore[union-attr,index]
        model.n2.weight[2] = -0.5  # type: ignore[union-attr,index]
    return model


class Tied(nn.Module):
    """A concatenation, and one of its parts read on its own too: their quantizers share a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.a(x)), torch.relu(3 * self.b(x))
        return self.c(torch.cat([a, b], 1)) + self.d(a)


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "basic": (basic_net, IMAGE),
    "bottleneck": (bottleneck_net, IMAGE),
    "pre-activation": (lambda: preactivation_net(norm=True), IMAGE),
    "lenet": (lenet, (4, 1, 28, 28)),
    "branches": (branches, IMAGE),
    "tied": (lambda: seeded(Tied), IMAGE),
    "odd layers": (odd_layers, IMAGE),
}


def batch(shape: tuple[int, ...] = IMAGE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prepared(net: str = "basic", scales: str | qat.ScalePolicy = "fixed", **options: Any) -> fx.GraphModule:
    """A calibrated graph that trains."""
    build, shape = NETS[net]
    gm = fxq.prepare_qat(build(), batch(shape), scales=scales, **options)
    fxq.calibrate(gm, [batch(shape, 1), batch(shape, 2)], progress=False)
    return gm


def step(gm: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = gm(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def trained(gm: fx.GraphModule, shape: tuple[int, ...] = IMAGE, steps: int = 3) -> fx.GraphModule:
    optimizer = torch.optim.SGD(qat.parameter_groups(gm, lr=0.01, scale_lr=1e-4), momentum=0.9)
    for number in range(steps):
        step(gm, optimizer, batch(shape, 10 + number))
    return gm


def integers(converted: fx.GraphModule) -> dict[str, Tensor]:
    """The integer weights of a converted graph by the key of their scale."""
    found = {}
    for node in converted.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        weight = constant(node.args[0])
        if weight is not None:
            found[str(node.args[1].target).split(".")[1]] = weight
    return found
