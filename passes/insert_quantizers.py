"""Insert quantizers: annotated edges read their tensor through a quantizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from ..editor import Editor
from ..errors import TraceError
from ..graph import Annotation, constant, edge_annotations, error_at
from ..passbase import Pass
from ..quantizer import QUANTIZERS, Quantizer, submodule_name
from ..verify import is_quantizer
from .annotate import governing, quantized_edges

__all__ = ["InsertQuantizers"]


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Put one quantizer on each tensor that an annotated edge reads.

    Rewrite: the quantizer goes right behind the tensor, under ``quantizers.<tensor>`` and named after it, on the
    device of the model's first parameter; edges that are annotated read it, others keep reading the float
    tensor. A quantized output is read by everyone through the quantizer. One tensor has one quantizer (R29):
    where edges ask for different specs, the one from the later recipe rule holds; a tensor that has a quantizer
    keeps it.

    Raises:
        TraceError: The model has an attribute of its own that is called ``quantizers``.
    """

    name: ClassVar[str] = "insert-quantizers"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)
    provides: ClassVar[tuple[str, ...]] = ("observed",)

    def call(self, editor: Editor) -> None:
        _check_container(editor)
        for tensor in list(editor.graph.nodes):
            annotation = None if is_quantizer(tensor) else governing(tensor)
            if annotation is not None:
                self._insert(editor, tensor, annotation)

    @staticmethod
    def _insert(editor: Editor, tensor: fx.Node, annotation: Annotation) -> None:
        edges = quantized_edges(tensor)
        quantizer = next(filter(is_quantizer, tensor.users), None) or _new_quantizer(editor, tensor, annotation)
        for user, edge, own in edges:
            if own.spec != annotation.spec:
                reason = f"{own.reason}; {tensor} has one quantizer (R29), and {annotation.reason} decides on it"
                editor.annotate(user, edge, replace(annotation, reason=reason))
        if any(edge == "output" for _, edge, _ in edges):
            editor.replace(
                tensor, quantizer, only=lambda user: user is not quantizer and not _reads_float(user, tensor)
            )
        for user, edge, _ in edges:
            if isinstance(edge, int):
                editor.set_arg(user, edge, quantizer)


def _reads_float(user: fx.Node, tensor: fx.Node) -> bool:
    """Whether an edge of `user` was decided to read `tensor` in float."""
    return any(
        annotation.spec is None and isinstance(edge, int) and user.args[edge] is tensor
        for edge, annotation in edge_annotations(user).items()
    )


def _new_quantizer(editor: Editor, tensor: fx.Node, annotation: Annotation) -> fx.Node:
    spec = annotation.spec
    assert spec is not None
    weight = constant(tensor) is not None
    path = f"{QUANTIZERS}.{submodule_name(tensor.name)}"
    made = Quantizer(spec, tensor=tensor.name, axis=spec.axis, tie=annotation.tie, weight=weight)
    device = next((p.device for p in editor.gm.parameters()), torch.device("cpu"))
    editor.set_module(path, made.to(device))
    with editor.after(tensor):
        return editor.call_module(path, (tensor,), like=tensor, name=f"{tensor.name}_quantizer")


def _check_container(editor: Editor) -> None:
    held = getattr(editor.gm, QUANTIZERS, None)
    nodes = [node for node in editor.graph.nodes if is_quantizer(node)]
    if held is None or any(str(node.target).startswith(f"{QUANTIZERS}.") for node in nodes):
        return
    reads = [n for n in editor.graph.nodes if str(n.target).split(".")[0] == QUANTIZERS]
    raise error_at(
        TraceError,
        f"the model has an attribute called {QUANTIZERS!r}, which fxq needs",
        reads[0] if reads else next(iter(editor.graph.nodes)),
        "rename it in the model",
    )
