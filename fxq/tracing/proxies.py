"""What a model's forward sees while it is traced: proxies that record in-place work and refuse what cannot be
recorded.

Plain fx loses ``x += y`` on a tensor that others see too, and refuses ``x[:, 0] = y``;
:mod:`fxq.passes.functionalize` makes both safe later.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import fx

from ..errors import TraceError

__all__ = ["INPLACE_OPERATORS", "LIBRARIES", "WAYS_OUT", "AttributeProxy", "StoredProxy", "TensorProxy"]

WAYS_OUT: Final = (
    "rewrite that line with torch operations (torch.where), pass the value it depends on as "
    "concrete_args={name: value}, or keep the module whole with leaf_modules=[its type or path] or "
    'on_untraceable="leaf"'
)
_FXQ: Final = Path(__file__).parent.parent
LIBRARIES: Final = (
    f"{Path(torch.__file__).parent}/",
    f"{_FXQ}/",
    f"{_FXQ.parent}/passes/",
)
"""Where code is that is not the user's."""
_OWN_ATTRIBUTES: Final = frozenset(("tracer", "node", "root", "attr", "_node", "param", "name"))
_PLAIN_ATTRIBUTES: Final = frozenset(("ndim", "is_cuda", "is_sparse", "is_quantized", "is_complex"))


class TensorProxy(fx.Proxy):
    """A Proxy that records in-place operators and item assignment, and answers what its tracer can tell.

    Its tracer decides (:meth:`fxq.tracing.recorder.Recorder.decide`): sizes, types and lengths have an answer, the data
    of a tensor has none.
    """

    tracer: Any

    def __getattr__(self, k: str) -> Any:
        proxy = AttributeProxy(self, k)
        return self.tracer.settled(proxy) if k in _PLAIN_ATTRIBUTES else proxy

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN_ATTRIBUTES:
            raise TraceError(f"the attribute {name} of a tensor is assigned", hint=WAYS_OUT)
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __hash__(self) -> int:
        if sys._getframe(1).f_code.co_filename.startswith(LIBRARIES):
            return id(self)
        found: int = self.tracer.key(self)
        return found

    def __len__(self) -> int:
        return int(self.tracer.decide(self, len, "the length of a tensor depends on its values"))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int, "a tensor's value is used as a Python number"))

    def __index__(self) -> int:
        return int(self.tracer.index(self, sys._getframe(1)))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float, "a tensor's value is used as a Python number"))

    def __complex__(self) -> NoReturn:
        raise TraceError("a tensor's value is used as a complex number", hint=WAYS_OUT)

    def __format__(self, spec: str) -> str:
        return format(self.tracer.hint(self), spec) if spec else str(self)

    def __round__(self, digits: int | None = None) -> Any:
        given = () if digits is None else (digits,)
        return self.tracer.create_proxy("call_function", round, (self, *given), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})


class AttributeProxy(TensorProxy, fx.proxy.Attribute):
    """An attribute of a tensor (``x.T``, ``x.data``), on which in-place operators are recorded as well."""


class StoredProxy(fx.proxy.ParameterProxy, TensorProxy):
    """A parameter of the model: its shape is known and stays what it is."""

    def size(self, dim: int | None = None) -> Any:
        return self.param.size() if dim is None else self.param.size(dim)

    def __len__(self) -> int:
        return len(self.param)


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
