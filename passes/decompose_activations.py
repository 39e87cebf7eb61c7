"""Decompose activations: SiLU and HardSwish become the product that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from torch import fx

from ..editor import Editor
from ..graph import state
from ..ops import KINDS, kind_name
from ..passbase import Numeric, Pass
from .expand_attention import Builder

__all__ = ["DecomposeActivations"]

_GATES: Final[Mapping[str, str]] = {"silu": "sigmoid", "hardswish": "hardsigmoid"}
"""Activation to the one that multiplies its input (Ramachandran et al. 2017; Howard et al. 2019)."""


@dataclass(frozen=True)
class DecomposeActivations(Pass):
    """Write the activations that the target ``decomposes`` as products, whose parts can be quantized.

    Problem: a backend that has integer kernels for a sigmoid and for a product, and none for SiLU, leaves integers for
    it: a dequantization, the activation on four times the bytes, and a quantization (ORT8).

    Rewrite: ``silu(x)`` becomes ``x * sigmoid(x)`` and ``hardswish(x)`` becomes ``x * hardsigmoid(x)``. The product
    keeps the activation's name.

    Raises:
        TargetError: The target decomposes a kind that is no such product.
    """

    name: ClassVar[str] = "decompose-activations"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        target = state(editor.gm).target
        target.require_known("decomposes", _GATES, "product")
        for node in list(editor.graph.nodes):
            if kind_name(node) in target.decomposes:
                self._decompose(editor, node, _GATES[kind_name(node)])

    @staticmethod
    def _decompose(editor: Editor, node: fx.Node, gate: str) -> None:
        source = node.args[0]
        with editor.before(node):
            factor = Builder(editor, node)(gate, source, name="gate")
        editor.retarget(node, KINDS["mul"].target, (source, factor))
