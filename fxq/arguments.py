"""What a model is called with: example inputs in every form users give them, and forward's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import TraceError

__all__ = ["bind_arguments", "example_arguments", "forward_values", "has_tensor", "kept_arguments"]

_STARS: Final[dict[Any, str]] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def example_arguments(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs).

    Args:
        example_inputs: A tensor, a tuple or list of positional inputs, or a dict of inputs by name.
        example_kwargs: More inputs by name.

    Raises:
        TraceError: There is no input at all.
    """
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = {**example_inputs, **kwargs}
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    else:
        args = () if example_inputs is None else (example_inputs,)
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise TraceError("example_inputs hold no tensor", hint="pass a tensor, a tuple of inputs or a dict of them")
    return args, kwargs


def bind_arguments(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], concrete: Mapping[str, Any]
) -> dict[str, Any]:
    """Values by parameter name of forward, defaults included; `concrete` wins over examples and defaults."""
    signature = inspect.signature(root.forward)
    strange = [name for name in concrete if name not in signature.parameters]
    if strange:
        raise TraceError(
            f"concrete_args names {', '.join(strange)}, which {type(root).__name__}.forward does not take",
            hint=f"it takes {', '.join(signature.parameters)}",
        )
    given = list(signature.parameters)[: len(args)]
    try:
        bound = signature.bind(*args, **{k: v for k, v in {**kwargs, **concrete}.items() if k not in given})
    except TypeError as error:
        raise TraceError(
            f"example inputs do not fit {type(root).__name__}.forward{signature}: {error}",
            hint="a tuple gives positional inputs, a dict inputs by name; wrap a lone dict input in a tuple",
        ) from error
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        stars = _STARS.get(signature.parameters[name].kind)
        if stars is None:
            values[name] = concrete.get(name, value)
        elif value:
            raise TraceError(
                f"{type(root).__name__}.forward takes {stars}{name}, which has no fixed inputs",
                hint="wrap the model in a module whose forward names its inputs",
            )
    return values


def forward_values(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What each parameter of forward gets in a call, in order, defaults included.

    Raises:
        TypeError: The call does not fit.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def kept_arguments(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs without those that tracing fixed to a value, which the graph no longer takes."""
    names = inspect.signature(root.forward).parameters
    kept = tuple(value for name, value in zip(names, args, strict=False) if name in inputs)
    return kept, {k: v for k, v in kwargs.items() if k in inputs}


def has_tensor(value: Any) -> bool:
    """Whether a tensor is nested anywhere in `value`."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
