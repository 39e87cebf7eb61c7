"""Passes with options of every sort, which do what they declare or not."""

from __future__ import annotations

import enum
import operator
from dataclasses import dataclass
from typing import Any

import torch

from fxq.editor import Editor
from fxq.passbase import Pass


class Shape(enum.Enum):
    HARD = "hard"
    SOFT = "soft"


@dataclass(frozen=True)
class Part:
    """An option that is a dataclass."""

    a: int = 1
    b: str = "{}, "


@dataclass(frozen=True)
class Scaled(Pass):
    """Multiply what ReLUs give."""

    name = "scaled"

    factor: float = 1.0
    shape: Shape = Shape.HARD
    parts: tuple[Part, ...] = ()
    label: str = ""
    sizes: Any = None

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.target is torch.relu:
                with editor.after(node):
                    made = editor.call(operator.mul, (node, self.factor), like=node)
                editor.replace(node, made)


@dataclass(frozen=True)
class RoundedScaled(Scaled):
    """The same, declared as rounding."""

    name = "rounded-scaled"
    numeric = "rounding"
