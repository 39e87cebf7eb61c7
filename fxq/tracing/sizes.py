"""Short names for long sizes, so that what is computed with them stays quick.

Where a model pads to a multiple and divides again (windows of attention), the sizes of its tensors become nested floor
divisions and remainders, and simplifying these takes time that grows with the power of the depth. A symbol of its own
in place of the expression keeps every later one short; a guard writes it out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

__all__ = ["Abbreviations", "ExampleEnv"]

_LONG: Final = 8
"""Operations of an expression beyond which a symbol takes its place."""


class ExampleEnv(ShapeEnv):
    """Torch's symbolic shapes, where operations decide by the example's sizes at once.

    What an operation asks of its shapes while it computes its own is no decision of the model, so nothing has to be
    proved, and sympy need not be asked.
    """

    by_example = False

    @contextmanager
    def operating(self) -> Iterator[None]:
        """Inside, questions have the example's answer and leave no guard."""
        before, self.by_example = self.by_example, True
        try:
            with self.suppress_guards():
                yield
        finally:
            self.by_example = before

    def evaluate_sym_node(self, sym_node: Any, *args: Any, **kwargs: Any) -> Any:
        if self.by_example and sym_node.has_hint():
            return sym_node.hint
        return super().evaluate_sym_node(sym_node, *args, **kwargs)


class Abbreviations:
    """Symbols that stand for sizes of tensors, and what each of them means.

    Args:
        env: Where the symbols live.

    Attributes:
        meant: By the symbol's name, the expression that it stands for, in which older such symbols may occur.
    """

    def __init__(self, env: ShapeEnv) -> None:
        self.env = env
        self.meant: dict[str, Any] = {}
        self._known: dict[Any, torch.SymInt] = {}

    def shortened(self, result: Any, inputs: Any) -> Any:
        """What a node gives, its tensors' long sizes abbreviated.

        Args:
            result: A tensor without data, or a structure of such.
            inputs: What the node was given: a tensor that is handed on stays the object that it is.
        """
        given = {id(leaf) for leaf in pytree.tree_leaves(inputs)}
        return pytree.tree_map_only(torch.Tensor, lambda t: t if id(t) in given else self._tensor(t), result)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        sizes = [self._size(size) for size in tensor.shape]
        if all(new is old for new, old in zip(sizes, tensor.shape, strict=True)) or not _dense(tensor):
            return tensor
        return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        if not isinstance(size, torch.SymInt) or not size.node.has_hint():
            return size
        expression = size.node.expr
        if expression in self._known:
            return self._known[expression]
        if expression.count_ops() <= _LONG:
            return size
        self._known[expression] = short = self._symbol(int(size.node.hint))
        self.meant[str(short.node.expr)] = expression
        return short

    def _symbol(self, hint: int) -> torch.SymInt:
        """A new symbol of which nothing is known but the example's value: what is asked of it becomes a guard."""
        from torch._dynamo.source import ConstantSource  # loads half of the compiler, as from_tensor does anyway

        source = ConstantSource(f"fxq_size_{len(self._known)}")
        symbol = self.env.create_unspecified_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        return cast("torch.SymInt", self.env.create_symintnode(symbol, hint=hint, source=source))


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor is contiguous in the example: others keep their strides, and so their sizes."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        extent, step = _hint(size), _hint(stride)
        if extent is None or (extent != 1 and step != expected):
            return False
        expected *= extent
    return True


def _hint(size: int | torch.SymInt) -> int | None:
    """The example's value; None where it depends on data."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.hint) if size.node.has_hint() else None
