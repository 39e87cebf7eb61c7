"""Correct biases: add what calibration found to take out mean errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from ..bias_correction import BIAS, CORRECTIONS, has_quantized_weight, has_stored_bias
from ..editor import Editor
from ..graph import constant
from ..passbase import Numeric, Pass
from ..quantizer import submodule_name

__all__ = ["CorrectBiases"]


@dataclass(frozen=True)
class CorrectBiases(Pass):
    """Add the bias corrections of calibration to the biases (see :mod:`fxq.bias_correction`).

    Rewrite: the bias of each operation that has a correction becomes their sum, at its old path unless others
    read it; an operation without a bias gets one.

    Declines: a bias that is computed in the graph; calibration measures none for it either, so that the layers behind
    it are corrected for what it gives.
    """

    name: ClassVar[str] = "correct-biases"
    requires: ClassVar[tuple[str, ...]] = ("observed",)
    numeric: ClassVar[Numeric] = "changes-values"

    def call(self, editor: Editor) -> None:
        holder = getattr(editor.gm, CORRECTIONS, None)
        if holder is None:
            return
        corrections = {name: c for name, c in holder.named_buffers() if bool(c.any())}
        if not corrections:
            return
        for node in list(editor.graph.nodes):
            if has_quantized_weight(node) and not has_stored_bias(node):
                editor.note(node, "correct-biases", "its bias is computed in the graph, so it is not corrected")
            elif (found := corrections.get(submodule_name(node.name))) is not None and has_stored_bias(node):
                self._correct(editor, node, found)

    @staticmethod
    @torch.no_grad()
    def _correct(editor: Editor, node: fx.Node, correction: torch.Tensor) -> None:
        bias, weight = node.args[BIAS], node.args[1]
        old = constant(bias)
        new = correction if old is None else old + correction.to(old.dtype)
        parameter = nn.Parameter(new.clone(), requires_grad=False)
        if isinstance(bias, fx.Node) and len(bias.users) == 1 and _only_reader(editor, bias):
            editor.set_tensor(str(bias.target), parameter)
            return
        path = editor.free_path(_beside(weight))
        editor.set_tensor(path, parameter)
        with editor.before(node):
            editor.set_arg(node, BIAS, editor.get_attr(path, like=node))


def _only_reader(editor: Editor, bias: fx.Node) -> bool:
    return sum(1 for _ in editor.graph.find_nodes(op="get_attr", target=bias.target)) == 1


def _beside(weight: object) -> str:
    """Where the bias of the weight behind a quantizer belongs."""
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0]
    owner = str(weight.target).rpartition(".")[0] if isinstance(weight, fx.Node) else ""
    return f"{owner}.bias" if owner else "bias"
