"""Decompose products: einsum, addmm and their like become matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import fx

from ..editor import Editor
from ..graph import constant, tensor_info
from ..passbase import Numeric, Pass
from .expand_attention import Builder

__all__ = ["DecomposeProducts"]


@dataclass(frozen=True)
class DecomposeProducts(Pass):
    """Write matrix products that carry something else along as plain ones.

    Problem: ``einsum``, ``addmm`` and ``baddbmm`` have no edges that could be quantized, and TensorRT's parser refuses
    the equations that PyTorch's exporter writes for ``einsum``.

    Rewrite: ``addmm(c, a, b)`` and ``baddbmm(c, a, b)`` become ``a @ b + c``; an ``einsum`` of two operands that sums
    over one index becomes a permutation of each, a ``matmul`` (``linear``, where the second operand is a stored
    weight) and a permutation of the result.

    Declines: other equations (one operand, several sums, repeated indices, ``...``), and ``alpha`` and ``beta`` other
    than 1.
    """

    name: ClassVar[str] = "decompose-products"
    requires: ClassVar[tuple[str, ...]] = ("functional",)
    numeric: ClassVar[Numeric] = "rounding"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            known = node.op in ("call_function", "call_method") and tensor_info(node) is not None
            write = _WAYS.get(str(getattr(node.target, "__name__", node.target))) if known else None
            if write is None:
                continue
            with editor.before(node):
                made = write(Builder(editor, node), node)
            if made is not None:
                editor.replace(node, made)
                editor.erase(node)


def _with_sum(build: Builder, node: fx.Node) -> fx.Node | None:
    """``a @ b + c`` of ``addmm(c, a, b)``."""
    given = dict(zip(("input", "mat1", "mat2"), node.args, strict=False)) | dict(node.kwargs)
    third, first, second = (given.get(n, given.get(m)) for n, m in _OPERANDS)
    if len(node.args) > len(_OPERANDS) or given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return None
    if not all(isinstance(tensor, fx.Node) for tensor in (third, first, second)):
        return None
    return build("add", build("matmul", first, second, name="product"), third, name="sum")


_OPERANDS: Final = (("input", "self"), ("mat1", "batch1"), ("mat2", "batch2"))


def _einsum(build: Builder, node: fx.Node) -> fx.Node | None:
    """An equation of two operands as one product."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or node.kwargs:
        return None
    first, second = operands
    indices = _indices(equation)
    if indices is None or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    left, right, out = indices
    shared = [i for i in out if i in left and i in right]
    rows, columns = [i for i in out if i not in right], [i for i in out if i not in left]
    (summed,) = [i for i in left if i not in out]
    stored = constant(second) is not None and right == [*columns, summed] and not shared
    above = rows[:-1] if shared else []  # matmul broadcasts the second operand over these
    batch = [*above, *shared]
    rows = rows[len(above) :]
    first = _permuted(build, first, left, [*batch, *rows, summed], "first")
    if stored:
        made = build("linear", first, second, name="linear")
    else:
        second = _permuted(build, second, right, [*shared, summed, *columns], "second")
        made = build("matmul", first, second, name="product")
    return _permuted(build, made, [*batch, *rows, *columns], out, "result")


def _indices(equation: str) -> tuple[list[str], list[str], list[str]] | None:
    """The indices of both operands and of the result, if one matmul can compute the equation."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if "." in equation or len(parts) != 2:
        return None
    left, right = (list(part) for part in parts)
    every = left + right
    out = list(result) if arrow else sorted(i for i in every if every.count(i) == 1)
    sides = [set(left), set(right), set(out)]
    if any(len(side) != len(part) for side, part in zip(sides, (left, right, out), strict=True)):
        return None
    summed = (sides[0] & sides[1]) - sides[2]
    rows, columns = sides[0] - sides[1], sides[1] - sides[0]
    if len(summed) != 1 or not (rows | columns) <= sides[2]:
        return None
    return (left, right, out) if len(columns) == 1 and rows else None


def _permuted(build: Builder, tensor: fx.Node, have: list[str], want: list[str], name: str) -> fx.Node:
    if have == want:
        return tensor
    return build("permute", tensor, dims=tuple(have.index(i) for i in want), name=f"{name}_permuted")


_WAYS: Final[Mapping[str, Callable[[Builder, fx.Node], Any]]] = {
    torch.einsum.__name__: _einsum,
    torch.addmm.__name__: _with_sum,
    torch.baddbmm.__name__: _with_sum,
}
