"""What a model's forward sees while it is traced: proxies that record in-place work and refuse what cannot be
recorded.

Plain fx loses ``x += y`` on a tensor that others see too, and refuses ``x[:, 0] = y``;
:mod:`fxq.passes.functionalize` makes both safe later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .errors import TraceError

__all__ = ["INPLACE_OPERATORS", "WAYS_OUT", "NestedInputs", "TensorProxy"]

WAYS_OUT: Final = (
    "rewrite that line with torch operations (torch.where), pass the value it depends on as "
    "concrete_args={name: value}, or keep the module whole with leaf_modules=[its type or path]"
)
_OWN_ATTRIBUTES: Final = frozenset(("tracer", "node", "root", "attr", "_node"))


class TensorProxy(fx.Proxy):
    """A Proxy that records in-place operators and item assignment, and says what it cannot record."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _AttributeProxy(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN_ATTRIBUTES:
            raise TraceError(f"the attribute {name} of a tensor is assigned", hint=WAYS_OUT)
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        raise TraceError("the length of a tensor is used as a Python number", hint=WAYS_OUT)

    def __int__(self) -> NoReturn:
        raise TraceError("a tensor's value or size is used as a Python number", hint=WAYS_OUT)

    __index__ = __int__
    __float__ = __int__
    __complex__ = __int__


class _AttributeProxy(TensorProxy, fx.proxy.Attribute):
    """An attribute of a tensor (``x.T``, ``x.data``), on which in-place operators are recorded as well."""


def _inplace_operator(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


INPLACE_OPERATORS: Final = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.imatmul,
)
"""Python's augmented assignments; which of them change their left side is known only from the example run."""
for _operator in INPLACE_OPERATORS:
    setattr(TensorProxy, f"__{_operator.__name__}__", _inplace_operator(_operator))


class NestedInputs(fx.graph.CodeGen):
    """Code for a forward whose inputs nest tensors: it takes them apart by plain indexing (``a = pair[0]``).

    Args:
        names: Parameters of forward, in order.
        parts: For each placeholder, the expression over the parameters that it stands for.
    """

    def __init__(self, names: Sequence[str], parts: Sequence[str]) -> None:
        super().__init__()
        self.names, self.parts = tuple(names), tuple(parts)

    def process_inputs(self, *args: Any) -> Any:
        return [leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        definition = super().gen_fn_def(list(self.names), maybe_return_annotation, **options)
        variables = [v.split(":")[0].split("=")[0].strip() for v in free_vars]
        taken = (f"\n    {v} = {part}" for v, part in zip(variables, self.parts, strict=True) if v != part)
        return definition + "".join(taken)
