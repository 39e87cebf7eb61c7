"""What would pass the proxies by while a model's forward runs, recorded all the same.

Both patches are global, as fx's own are, and hold for the time of the forward alone.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx

from .proxies import LIBRARIES, AttributeProxy, StoredProxy, TensorProxy

__all__ = ["questions", "stored_tensors"]

_PROXIES: Final = (TensorProxy, AttributeProxy, StoredProxy)
_METHODS: Final = (
    *("__getitem__", "expand", "narrow", "repeat", "reshape", "tile", "unflatten", "view"),
    *("new_empty", "new_full", "new_ones", "new_zeros"),
)
"""Methods of tensors that take sizes and that torch does not let a proxy into."""


@contextmanager
def stored_tensors(tracer: Any) -> Iterator[None]:
    """Record calls on stored tensors where an argument is traced: ``self.table[:, :n]``.

    Args:
        tracer: Makes the proxies.
    """
    patched = {name: vars(torch.Tensor).get(name) for name in _METHODS}
    for name in _METHODS:
        setattr(torch.Tensor, name, _recorded(tracer, name, getattr(torch.Tensor, name)))
    try:
        yield
    finally:
        for name, own in patched.items():
            if own is None:
                delattr(torch.Tensor, name)  # what torch.Tensor inherits is there again
            else:
                setattr(torch.Tensor, name, own)


def _recorded(tracer: Any, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _holds_proxy((*args, *kwargs.values())):
            return plain(tensor, *args, **kwargs)
        if name == "__getitem__":
            return tracer.create_proxy("call_function", operator.getitem, (tensor, *args), {})
        return tracer.create_proxy("call_method", name, (tensor, *args), kwargs)

    return call


def _holds_proxy(index: Any) -> bool:
    """Whether an index, or a part of it, is traced."""
    if type(index) in (tuple, list):
        return any(map(_holds_proxy, index))
    if type(index) is slice:
        return any(type(part) in _PROXIES for part in (index.start, index.stop, index.step))
    return isinstance(index, fx.Proxy)


@contextmanager
def questions(tracer: Any) -> Iterator[None]:
    """Let ``isinstance`` in a model's code take a proxy for what it stands for.

    A ``__class__`` of the proxy would do that too, and would make torch's own C++ take it for a tensor.

    Args:
        tracer: Knows the types (``type_of``).
    """
    plain = builtins.isinstance

    def ask(value: Any, kinds: Any) -> bool:
        if type(value) in _PROXIES:
            code = sys._getframe(1).f_code
            if not code.co_filename.startswith(LIBRARIES) or code.co_name == "is_tensor":
                return issubclass(tracer.type_of(value), kinds)
        return plain(value, kinds)

    builtins.isinstance = ask
    try:
        yield
    finally:
        builtins.isinstance = plain
