"""Op kinds: what a node computes, however it was written.

``F.relu(x)``, ``torch.relu(x)``, ``x.relu()``, ``x.relu_()`` and ``nn.ReLU()(x)`` are one :class:`OpKind`.
The table gives each kind one canonical function and parameter list; :func:`spelling` recognizes the other
ways to write it, :func:`bind` sorts the arguments. After the ``canonicalize`` pass every known node has its
kind's own target, and :func:`kind` is one dictionary look-up.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx, nn

from .graph import SEQUENCE, origin
from .module_table import IDENTITY_MODULES, MODULES, ModuleSpelling
from .op_table import (
    FUNCTIONS,
    INPLACE,
    KIND_OF,
    KINDS,
    METHODS,
    REQUIRED,
    OpKind,
    Spelling,
)

__all__ = [
    "IDENTITY_MODULES",
    "KINDS",
    "MODULES",
    "PRODUCT_KINDS",
    "REQUIRED",
    "WEIGHTED_MODULES",
    "ModuleSpelling",
    "OpKind",
    "Spelling",
    "bind",
    "inplace_target",
    "kind",
    "kind_name",
    "named",
    "products",
    "spelling",
    "split_args",
]


def kind(node: fx.Node) -> OpKind | None:
    """The kind of a canonical node; None for everything else, a call with arguments that the kind lacks
    included.
    """
    found = KIND_OF.get(node.target) if node.op == "call_function" else None
    if found is None or len(node.args) != found.tensors:
        return None
    return found if node.kwargs.keys() <= found.keywords else None


def kind_name(node: fx.Node) -> str:
    """Name of the node's kind, however it is spelled; for anything else what it calls, for people.

    A call that has a kind's name and is none of that kind (``torch.add(x, y, alpha=2)``) is named with what
    the function belongs to: ``torch.add``, ``Tensor.add``.
    """
    found = kind(node)
    if found is not None:
        return found.name
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if node.op == "call_module" and node.graph.owning_module is not None:
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    spelled = spelling(node)
    if spelled is not None and bind(spelled, node.args, node.kwargs) is not None:
        return spelled.kind.name
    name = str(getattr(node.target, "__name__", node.target))
    if name not in KINDS:
        return name
    return f"{'Tensor' if node.op == 'call_method' else 'torch'}.{name}"


def named(node: fx.Node, pattern: str) -> bool:
    """Whether a recipe's pattern names `node`: ``op:`` and a glob over kinds, or a glob, or ``re:`` and a regular
    expression, over the path of its module or of one that this lies in.
    """
    if pattern.startswith("op:"):
        return fnmatch.fnmatchcase(kind_name(node), pattern.removeprefix("op:"))
    path = origin(node).module_path
    parts = path.split(".") if path else []
    if pattern.startswith("re:"):
        expression = re.compile(pattern.removeprefix("re:"))
        return any(expression.fullmatch(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), -1, -1))


WEIGHTED_MODULES: Final = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
)
"""Modules that multiply by weights; those that are kept whole are counted as not quantized."""

PRODUCT_KINDS: Final = frozenset(
    ("linear", "matmul", *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)))
)
"""Op kinds that convolve or multiply matrices: what a reader expects to be quantized, whatever a target names."""

_PRODUCTS: Final[Mapping[str, int]] = {
    "scaled_dot_product_attention": 2, "einsum": 1, "addmm": 1, "baddbmm": 1, "addbmm": 1, "addmv": 1, "mv": 1,
    "dot": 1, "vdot": 1, "inner": 1, "tensordot": 1, "bilinear": 1, "chain_matmul": 2,
    "multi_head_attention_forward": 6,
}  # fmt: skip


def products(node: fx.Node) -> int:
    """How many matrix products a call makes that is no kind with edges of its own (attention makes two)."""
    if node.op not in ("call_function", "call_method"):
        return 0
    return _PRODUCTS.get(str(getattr(node.target, "__name__", node.target)), 0)


def spelling(node: fx.Node) -> Spelling | None:
    """The spelling that a call_function or call_method node is, or None."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return None


def inplace_target(node: fx.Node) -> Callable[..., Any] | str | None:
    """What computes out of place the thing that `node` computes in place; None if it is no in-place call by
    name.
    """
    if node.op == "call_function":
        return INPLACE.get(node.target)
    if node.op == "call_method":
        name = str(node.target)
        if name.endswith("_") and not name.startswith("__") and not name.endswith("__"):
            return name[:-1]
        if name.startswith("__i") and name.endswith("__") and hasattr(torch.Tensor, f"__{name[3:]}"):
            return f"__{name[3:]}"
    return None


def bind(spelled: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The canonical arguments of one spelled call: every parameter by name, defaults filled in.

    Returns:
        None if the call has an argument that the kind does not (``out=``, ``alpha=2``, a dtype), or lacks
        one.
    """
    if spelled.variadic is not None and len(args) > 1:
        args = (args[0], _sequence(args[1:]))
    if len(args) > len(spelled.params):
        return None
    given = dict(zip(spelled.params, args, strict=False))
    for word, value in kwargs.items():
        name = _named(spelled.kind, word)
        if name in given:
            return None
        given[name] = value
    for ignored, neutral in _IGNORED.items():
        if ignored in given and (neutral is None or given[ignored] in neutral):
            given.pop(ignored)
    if set(given) - set(spelled.kind.params):
        return None
    full = {**spelled.kind.params, **given}
    if any(value is REQUIRED for value in full.values()) or _unusual(spelled.kind, full):
        return None
    return _spatial(spelled.kind, full)


_IGNORED: Final[Mapping[str, tuple[Any, ...] | None]] = {
    "inplace": (True, False),
    "alpha": (1,),
    "rounding_mode": (None,),
    "out": (None,),
    "_stacklevel": None,
}
"""Arguments without effect, by the values at which they have none; None for any value."""
_SYNONYMS: Final[Mapping[str, str]] = {
    "axis": "dim",
    "axes": "dims",
    "axis0": "dim0",
    "axis1": "dim1",
    "mat2": "other",
    "size": "shape",
    "split_size": "split_size_or_sections",
}


def _named(kind_: OpKind, word: str) -> str:
    """The canonical name of a keyword."""
    if word in kind_.params:
        return word
    name = next(iter(kind_.params)) if word == "self" else _SYNONYMS.get(word, word)
    return name if name in kind_.params else word


def _unusual(kind_: OpKind, full: Mapping[str, Any]) -> bool:
    """Whether a required number or shape is none: softmax over an implicit dimension, a view of another
    dtype.
    """
    names = list(kind_.params)[kind_.tensors :]
    required = (full[name] for name in names if kind_.params[name] is REQUIRED)
    return any(value is None or isinstance(value, torch.dtype) for value in required)


def _sequence(values: tuple[Any, ...]) -> Any:
    """What a variadic parameter takes: ``x.view(2, 3)``, ``x.view((2, 3))``, ``x.view(y.shape)``."""
    first = values[0]
    whole = isinstance(first, tuple | list | torch.dtype) or (isinstance(first, fx.Node) and SEQUENCE in first.meta)
    return first if len(values) == 1 and whole else tuple(values)


def _spatial(kind_: OpKind, arguments: dict[str, Any]) -> dict[str, Any]:
    """One number for all spatial dimensions becomes one number each; an omitted stride becomes the kernel's
    size.
    """
    names, dims = kind_.spatial
    for name in names:
        value = arguments[name]
        if isinstance(value, int) and not isinstance(value, bool):
            arguments[name] = (value,) * dims
        elif isinstance(value, list | tuple):
            arguments[name] = tuple(value) * (dims if len(value) == 1 else 1)
    if "stride" in names and arguments["stride"] in (None, ()):
        arguments["stride"] = arguments["kernel_size"]
    return arguments


def split_args(kind_: OpKind, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Canonical arguments as args (the tensors) and kwargs (the rest)."""
    names = list(kind_.params)
    args = tuple(arguments[n] for n in names[: kind_.tensors])
    rest = {n: arguments[n] for n in names[kind_.tensors :]}
    return args, {n: v for n, v in rest.items() if v is not None or n not in kind_.optional}
