"""Random models over tensors of one shape, as data that can be cut down: what passes are tested on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["SHAPE", "Layer", "Maker", "RandomModel", "kinds_with", "random_model", "random_plan", "without"]

SHAPE: Final = (2, 4, 6, 6)
"""The shape of every tensor of a random model: [N, C, H, W]."""

Maker = Callable[[], nn.Module]
"""Makes a module that takes and gives tensors of that shape."""


@dataclass(frozen=True)
class Layer:
    """One layer of a random model: what it is called, which earlier tensors it reads, what makes it."""

    kind: str
    inputs: tuple[int, ...]
    seed: int


def _call(function: Callable[..., Any]) -> Maker:
    """Makes modules whose forward is `function`, of one tensor or of two."""

    class Call(nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    return Call


class _CatConv(nn.Module):
    """Concatenate and bring back to the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        joined: Tensor = self.conv(torch.cat([x, y], 1))
        return joined


ONE_INPUT: Final[Mapping[str, Maker]] = {
    "conv3x3": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "conv1x1": lambda: nn.Conv2d(4, 4, 1, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "conv_transpose": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "conv_norm": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
    "transposed_norm": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)),
    "linear": lambda: nn.Linear(6, 6),
    "batch_norm": lambda: nn.BatchNorm2d(4),
    "relu": nn.ReLU,
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "sigmoid": _call(torch.sigmoid),
    "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
    "avg_pool": lambda: nn.AvgPool2d(3, 1, 1),
    "identity": nn.Identity,
    "dropout": nn.Dropout,
    "permute": _call(lambda x: x.permute(0, 1, 3, 2)),
    "reshape": _call(lambda x: x.flatten(2).view(-1, 4, 6, 6)),
    "scale": _call(lambda x: x * 0.5),
}
TWO_INPUTS: Final[Mapping[str, Maker]] = {
    "add": _call(lambda x, y: x + y),
    "add_swapped": _call(lambda x, y: torch.add(y, x)),
    "add_inplace": _call(lambda x, y: (x * 1).add_(y)),
    "mul": _call(lambda x, y: x * torch.sigmoid(y)),
    "cat_conv": _CatConv,
}


class RandomModel(nn.Module):
    """Layers over earlier tensors; gives the last one, and with it those that no layer reads."""

    def __init__(self, layers: Sequence[Layer], kinds: Mapping[str, Maker]) -> None:
        super().__init__()
        self.plan = tuple(layers)
        for index, layer in enumerate(layers):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(layer.seed)
                module = kinds[layer.kind]()
                for norm in module.modules():
                    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                        norm.running_mean.normal_(0, 0.3)
                        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            self.add_module(f"layer{index + 1}", module)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for index, layer in enumerate(self.plan):
            values.append(getattr(self, f"layer{index + 1}")(*(values[i] for i in layer.inputs)))
        read = {i for layer in self.plan for i in layer.inputs}
        loose = [v for i, v in enumerate(values[:-1]) if i not in read and i]
        for value in loose:
            values[-1] = values[-1] + value
        return values[-1]

    def program(self) -> str:
        """The model as text, one layer a line."""
        lines = [f"x0: float32{list(SHAPE)}"]
        for index, layer in enumerate(self.plan):
            module = str(getattr(self, f"layer{index + 1}"))
            shown = layer.kind if "\n" in module or module.startswith("Call") else module
            lines.append(f"x{index + 1} = {shown} of {', '.join(f'x{i}' for i in layer.inputs)}")
        return "\n".join(lines)


def random_model(seed: int, layers: int = 8, extra: Mapping[str, Maker] | None = None) -> nn.Module:
    """A random model over [2, 4, 6, 6] tensors, in eval mode: layers of all usual kinds, and branches.

    Args:
        seed: The same seed gives the same model.
        layers: How many layers.
        extra: Further kinds of layers by name: what makes a module that takes and gives one such tensor. Half
            of the layers are of these kinds.
    """
    return RandomModel(random_plan(seed, layers, list(extra or ())), kinds_with(extra)).eval()


def kinds_with(extra: Mapping[str, Maker] | None) -> Mapping[str, Maker]:
    """All kinds of layers by name, the caller's among them."""
    return {**ONE_INPUT, **TWO_INPUTS, **(extra or {})}


def random_plan(seed: int, count: int, extra: Sequence[str]) -> list[Layer]:
    """Layers for a random model; `extra` are the kinds of half of them."""
    chance = random.Random(seed)  # noqa: S311  repeatable, not secret
    plan: list[Layer] = []
    for index in range(count):
        if extra and chance.random() < 0.5:
            kind = chance.choice(list(extra))
        else:
            kind = chance.choice([*ONE_INPUT, *TWO_INPUTS, *TWO_INPUTS])
        near = [max(0, index - chance.choice((0, 0, 0, 1, 2, 5))) for _ in range(2)]
        plan.append(Layer(kind, tuple(near[: 2 if kind in TWO_INPUTS else 1]), chance.randrange(2**31)))
    return plan


def without(plan: Sequence[Layer], index: int) -> list[Layer]:
    """The plan without one layer; who read it reads what it read first."""
    instead = plan[index].inputs[0]

    def moved(i: int) -> int:
        if i == index + 1:
            return instead
        return i - 1 if i > index + 1 else i

    kept = [layer for number, layer in enumerate(plan) if number != index]
    return [replace(layer, inputs=tuple(map(moved, layer.inputs))) for layer in kept]
