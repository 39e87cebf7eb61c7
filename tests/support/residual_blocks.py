"""Residual blocks from a function and a few convolutions, and the addition in them."""

from __future__ import annotations

from collections.abc import Callable

from placing import Lambda, notes, of_kind, prepared, reads
from torch import Tensor, fx, nn
from toys import seeded

from fxq.graph import edge_annotations
from fxq.recipe import Recipe

Forward = Callable[..., Tensor]
X = (2, 16, 8, 8)


def conv(inputs: int = 16, outputs: int = 16, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def block(function: Forward, **parts: nn.Module) -> nn.Module:
    """A model with the convolutions `conv1`, `conv2`, `down` of 16 channels."""
    made = {"conv1": conv(), "conv2": conv(), "down": conv(kernel=1), **parts}
    return seeded(lambda: Lambda(function, **made))


def the_addition(gm: fx.GraphModule) -> fx.Node:
    """The graph's only addition."""
    (add,) = of_kind(gm, "add")
    return add


def why_not(model: nn.Module, *args: Tensor, recipe: Recipe | None = None) -> tuple[str, str]:
    """Rule and text of the note on the only addition, which must stay float on both edges."""
    gm = prepared(model, *args, recipe=recipe)
    add = the_addition(gm)
    assert all(a.spec is None for a in edge_annotations(add).values())
    assert not any(name.endswith("_quantizer") for name in reads(gm, add.name))
    (note,) = [n for n in notes(gm) if n.node == add.name]
    assert note.kind == "declined"
    return note.rule, note.text.removeprefix("this addition stays float: ")
