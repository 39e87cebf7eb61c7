"""Propagate quantization: between quantized operations, tensors stay in integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from ..editor import Editor
from ..graph import Annotation, State, constant, edge_annotations, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..recipe import QSpec
from ..target_parts import OpPlacement
from .annotate import applied, check_spec, governing

__all__ = ["PropagateQuantization"]


@dataclass(frozen=True)
class PropagateQuantization(Pass):
    """Quantize what lies among quantized operations, and put each result's quantizer behind its activation.

    Problem: where kernels read and write integers, an addition, a pool or a concatenation in floating point between
    two of them costs a dequantization, the operation on four times the bytes, and a quantization. And a quantizer
    between a convolution and its ReLU keeps the two apart, while a range that begins at 0 is a ReLU for nothing.

    Rewrite: in the graph's order, an operation whose placement ``joins`` gets quantizers on inputs and output if all
    (or any) of its inputs are quantized anyway; operations that only move data are looked through. A quantized
    result that only one operation reads, of a kind that the target ``absorbs``, gets its quantizer behind that one.
    The target's data say which kinds those are; for a target that names none, nothing happens.

    Declines, with a note: operations with some inputs quantized and others not. In silence: operations with a
    constant or a number among their inputs; results whose quantizer a recipe asks for just there. What a recipe
    leaves float stays so.
    """

    name: ClassVar[str] = "propagate-quantization"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        now = state(editor.gm)
        for node in editor.graph.nodes:
            placement = now.target.ops.get(kind_name(node))
            if placement is not None and placement.joins is not None:
                _join(editor, node, placement, now)
            _move(editor, node, now)


def _join(editor: Editor, node: fx.Node, placement: OpPlacement, now: State) -> None:
    """Quantize an operation if its inputs are quantized anyway."""
    if any(a.rule == "recipe" and a.spec is None for a in edge_annotations(node).values()):
        return
    read = [(edge, tensor) for edge in placement.inputs for tensor in _tensors(node.args[edge])]
    if not _floating(node) or not all(isinstance(t, fx.Node) and _floating(t) and not _stored(t) for _, t in read):
        return
    low = [_is_low(tensor, now) for _, tensor in read]
    if not (all(low) if placement.joins == "all" else any(low)):
        if any(low):
            names = ", ".join(tensor.name for (_, tensor), yes in zip(read, low, strict=True) if not yes)
            text = f"this {kind_name(node)} stays float: {names} is not quantized"
            editor.note(node, placement.rule, text)
        return
    for edge, tensor in read:
        if isinstance(node.args[edge], fx.Node):
            _decide(editor, node, edge, tensor, placement, now)
        elif governing(tensor) is None:
            _decide(editor, tensor, "output", tensor, placement, now)
    if placement.output:
        _decide(editor, node, "output", node, placement, now)


def _decide(
    editor: Editor, node: fx.Node, edge: int | str, tensor: fx.Node, placement: OpPlacement, now: State
) -> None:
    """Annotate one edge, unless something is said of it."""
    if edge in edge_annotations(node):
        return
    held = governing(tensor)
    spec, priority = (now.target.activation, -1) if held is None or held.spec is None else (held.spec, held.priority)
    said = applied(node, "output" if edge == "output" else "input", now.recipe)
    wish = None if said is None else getattr(said[1].edges, "output" if edge == "output" else "input")
    if said is not None and isinstance(wish, QSpec) and said[0] > priority:
        priority, spec = said[0], wish.over(now.target.activation)
        check_spec(node, str(edge), spec, f"recipe rule {priority}, {said[1].text}", now.target)
    editor.annotate(node, edge, Annotation(spec, placement.rule, placement.reason, priority))


def _tensors(argument: Any) -> Iterator[Any]:
    yield from argument if isinstance(argument, list | tuple) else (argument,)


def _floating(node: fx.Node) -> bool:
    info = tensor_info(node)
    return info is not None and info.dtype.is_floating_point and len(info.shape) > 0


def _stored(node: fx.Node) -> bool:
    return constant(node) is not None


def _is_low(tensor: fx.Node, now: State) -> bool:
    """Whether a tensor is quantized, or only moves the values of one that is."""
    node: Any = tensor
    while isinstance(node, fx.Node):
        if governing(node) is not None:
            return True
        if kind_name(node) not in now.target.ties or not node.args:
            return False
        node = node.args[0]
    return False


def _move(editor: Editor, node: fx.Node, now: State) -> None:
    """Move the quantizer of a result behind the activation that alone reads it."""
    own = edge_annotations(node).get("output")
    reader = next(iter(node.users), None)
    if own is None or own.spec is None or reader is None or len(node.users) > 1:
        return
    asked = own.priority >= 0 and now.recipe.rules[own.priority].explicit
    if asked or kind_name(reader) not in now.target.absorbs or reader.args[0] is not node:
        return
    if edge_annotations(reader):
        return
    editor.annotate(reader, "output", replace(own, reason=f"{own.reason}; {reader} is computed in its kernel"))
    text = f"{reader} is computed in the kernel, so the quantizer of the result stands behind it"
    placement = now.target.ops.get(kind_name(node))
    editor.annotate(node, "output", Annotation(None, own.rule if placement is None else placement.rule, text))
