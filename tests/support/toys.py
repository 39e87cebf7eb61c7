"""Small models that several tests share, and the steps between a model and the graph a pass starts from.

Every model is deterministic (:func:`seeded`), in eval mode, and has BatchNorm statistics that differ from 0
and 1, so that a fold which forgets one of them shows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxq.arguments import example_arguments
from fxq.graph import state
from fxq.manager import PassManager, Pipeline
from fxq.passbase import Pass
from fxq.recipe import Recipe
from fxq.target import Target
from fxq.tracing import trace_model


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model that `build` makes, with seeded weights and statistics, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                randomize_norm(module)
    return model.eval()


def randomize_norm(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Give a BatchNorm statistics and an affine map away from the identity."""
    with torch.no_grad():
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.5)


def traced(
    model: nn.Module,
    *args: Any,
    recipe: Recipe | None = None,
    options: dict[str, Any] | None = None,
    target: Any = "tensorrt",
    **kwargs: Any,
) -> fx.GraphModule:
    """The traced graph of `model` on these inputs; `options` go to the tracer."""
    inputs = example_arguments(args, kwargs)
    return trace_model(model, *inputs, target=Target.load(target), recipe=recipe or Recipe(), **(options or {}))


def after(
    passes: Sequence[Pass], model: nn.Module, *args: Any, recipe: Recipe | None = None, target: Any = "tensorrt"
) -> fx.GraphModule:
    """The traced graph of `model` after these passes, run by the manager that verifies each of them."""
    return PassManager().run(
        Pipeline("test", tuple(passes)), traced(model, *args, recipe=recipe, target=target), inplace=True
    )


def plain_state(gm: fx.GraphModule, *properties: str) -> fx.GraphModule:
    """A copy of `gm` whose state claims `properties` too: to hand a pass a graph that no pipeline would
    make.
    """
    gm = copy.deepcopy(gm)
    held = state(gm)
    gm.meta["fxq"] = dataclasses.replace(held, properties=held.properties | set(properties))
    return gm


class ConvNorm(nn.Sequential):
    """Convolution without bias, BatchNorm and optionally ReLU, under torchvision's names ``0``, ``1``,
    ``2``.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, *, relu: bool = False) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


class BasicBlock(nn.Module):
    """ResNet's basic block as torchvision writes it; ``stride=2`` or other channels give it a downsample
    branch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = ConvNorm(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block (1x1, 3x3, 1x1, four times as wide at the end)."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = ConvNorm(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(out + identity)


class ResidualNet(nn.Module):
    """A stem, residual blocks, pooling and a classifier for [N, 3, 16, 16] images.

    Args:
        blocks: Builds the blocks; the first takes 8 channels.
        channels: What the last block gives.
    """

    def __init__(self, blocks: Callable[[], Sequence[nn.Module]], channels: int) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, relu=True)
        self.blocks = nn.Sequential(*blocks())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def basic_net() -> nn.Module:
    """Two basic blocks: one with an identity skip, one with a downsample branch."""
    return seeded(lambda: ResidualNet(lambda: [BasicBlock(8, 8), BasicBlock(8, 16, 2)], 16))


def bottleneck_net() -> nn.Module:
    """Two bottleneck blocks: one with a downsample branch, one with an identity skip."""
    return seeded(lambda: ResidualNet(lambda: [Bottleneck(8, 4, 2), Bottleneck(16, 4)], 16))


class PreActivationBlock(nn.Module):
    """Pre-activation block whose ReLU works in place on the tensor that is also the skip: the skip sees it
    too.
    """

    def __init__(self, channels: int, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.norm(x)))
        out = self.conv2(self.relu(out))
        return out + x


def preactivation_net(*, norm: bool = False) -> nn.Module:
    """Two pre-activation blocks after a stem that ends in a convolution."""

    def build() -> nn.Module:
        blocks = [PreActivationBlock(8, norm=norm), PreActivationBlock(8, norm=norm)]
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.ReLU(), nn.Conv2d(8, 4, 1))

    return seeded(build)


class LeNet(nn.Module):
    """conv 6, conv 16, fc 120, 84, 10 on [N, 1, 28, 28], with max-pooling and functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def lenet() -> nn.Module:
    """LeNet-5 with seeded weights."""
    return seeded(LeNet)


class NestedModel(nn.Module):
    """Takes a dict and a pair of [N, 4] tensors, gives a dict that holds a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, named: dict[str, Tensor], pair: tuple[Tensor, Tensor], scale: float = 2.0) -> dict[str, Any]:
        x = self.left(named["a"]) + self.right(pair[0])
        return {"sum": x * scale, "parts": (pair[1] - x, named["b"])}


def nested_model() -> nn.Module:
    """:class:`NestedModel` with seeded weights."""
    return seeded(NestedModel)


def nested_inputs() -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Inputs for :class:`NestedModel`: a dict and a pair of [2, 4] tensors."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(2, 4, generator=generator) for _ in range(4))
    return {"a": a, "b": b}, (c, d)


class Branches(nn.Module):
    """Two convolutions concatenated, max-pooled and classified: what concat ties are about."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        return self.head(F.max_pool2d(x, 2))


def branches() -> nn.Module:
    """:class:`Branches` with seeded weights."""
    return seeded(Branches)


def image(*shape: int, seed: int = 0) -> Tensor:
    """A seeded normal float32 tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
