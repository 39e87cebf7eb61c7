"""Batches of any usual form, as a model's arguments, and why one does not fit."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import CalibrationError
from .graph import STATE, State

__all__ = ["Inputs", "each_batch", "limited", "misfit", "model_inputs", "moved", "random_batches", "watched"]


class Inputs(NamedTuple):
    """One batch as a model's arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def model_inputs(model: nn.Module, batch: Any) -> Inputs:
    """A batch as the arguments of a model's forward.

    Args:
        model: Any module. Of a prepared graph the inputs that its example filled count; of another, the
            parameters without a default.
        batch: A tensor, a tuple or list of positional inputs, or a dict of inputs by name.

    Raises:
        CalibrationError: The batch holds fewer inputs than the model needs.
    """
    if isinstance(batch, Inputs):
        return batch
    names, every = _input_names(model)
    if isinstance(batch, Mapping):
        return _by_name(batch, names, every)
    values = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if names is None:
        return Inputs(values, {})
    if len(values) < len(names):
        raise CalibrationError(
            f"a batch holds {len(values)} inputs and the model takes {len(names)}: {', '.join(names)}",
            hint="let each batch be a tuple of these, or a dict by name",
        )
    if every[: len(names)] == names:
        return Inputs(values[: len(names)], {})
    return Inputs((), dict(zip(names, values, strict=False)))


def _input_names(model: nn.Module) -> tuple[list[str] | None, list[str]]:
    """Names of the inputs that a batch must fill (None: any number), and of all parameters of forward."""
    signature = inspect.signature(model.forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    every = [p.name for p in signature.parameters.values() if p.kind in kinds]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()):
        return None, every
    held = model.meta.get(STATE) if isinstance(model, fx.GraphModule) else None
    if isinstance(held, State) and (held.example_args or held.example_kwargs):
        return list(signature.bind_partial(*held.example_args, **held.example_kwargs).arguments), every
    return [name for name in every if signature.parameters[name].default is inspect.Parameter.empty], every


def _by_name(batch: Mapping[Any, Any], names: list[str] | None, every: list[str]) -> Inputs:
    if names is not None and len(names) == 1 and not set(batch) & set(every):
        return Inputs((batch,), {})  # the model's one input is a dict itself
    missing = [name for name in names or () if name not in batch]
    if missing:
        raise CalibrationError(
            f"a batch with the keys {', '.join(map(str, batch))} lacks {', '.join(missing)}",
            hint="name the inputs as the model's forward does",
        )
    return Inputs((), {name: batch[name] for name in every if name in batch})


def random_batches(
    example_args: Sequence[Any], example_kwargs: Mapping[str, Any] | None = None, *, count: int = 8
) -> list[Inputs]:
    """Random batches like the example inputs, to measure speed where there is no data.

    Floating-point tensors become N(0, 1) noise of the same shape, dtype and device, from a fixed seed;
    everything else (indices, masks, flags) stays as it is.

    Args:
        example_args: Positional inputs.
        example_kwargs: Inputs by name.
        count: How many batches.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)

    example = (tuple(example_args), dict(example_kwargs or {}))
    return [Inputs(*pytree.tree_map(noise, example)) for _ in range(count)]


def moved(inputs: Inputs, device: torch.device | None) -> Inputs:
    """The same inputs with all tensors on `device` (None leaves them); NumPy arrays become tensors."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.from_numpy(leaf)
        if isinstance(leaf, Tensor) and device is not None:
            return leaf.to(device, non_blocking=True)
        return leaf

    return Inputs(*pytree.tree_map(move, tuple(inputs)))


@contextmanager
def watched(model: nn.Module, *watchers: Callable[[Inputs], object]) -> Iterator[None]:
    """Hand what the model is called with, as it came, to each of the watchers first.

    Args:
        model: Any module; it is as it was after the block.
        watchers: What to call with the arguments of each call.
    """

    def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for watcher in watchers:
            watcher(Inputs(args, kwargs))

    hook = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def misfit(model: nn.Module, batch: Any, error: Exception) -> CalibrationError | None:
    """What to say of a batch that made a prepared graph raise; None if it is like the example that was prepared with.

    Args:
        model: The prepared graph.
        batch: The batch, as it came.
        error: What was raised.
    """
    held = model.meta.get(STATE) if isinstance(model, fx.GraphModule) else None
    if not isinstance(held, State) or not (held.example_args or held.example_kwargs):
        return None
    try:
        inputs = model_inputs(model, batch)
    except CalibrationError:
        return None  # which says it all
    signature = inspect.signature(model.forward)
    expected = signature.bind_partial(*held.example_args, **held.example_kwargs).arguments
    given = signature.bind_partial(*inputs.args, **inputs.kwargs).arguments
    unlike = [name for name, like in expected.items() if not _alike(given.get(name), like, like_shape=True)]
    if not unlike:
        return None
    facts = (
        f"{name} is {_described(given.get(name))}, the example was {_described(expected[name])}" for name in unlike
    )
    return CalibrationError(
        f"the model does not take this batch: {'; '.join(facts)} ({type(error).__name__}: {_first_line(error)})",
        hint=_way_out(batch, expected[unlike[0]]),
    )


def _way_out(batch: Any, example: Any) -> str:
    """What to do about a batch that has no such thing as `example` where the model's input should be."""
    parts = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, tuple | list) else ()
    for key, part in parts:
        if isinstance(example, Tensor) and _alike(part, example, like_shape=False):
            return f"batch[{key!r}] looks like it: pass forward=lambda model, batch: model(batch[{key!r}])"
    if isinstance(example, Tensor) and isinstance(batch, Tensor | np.ndarray):
        if batch.ndim == example.ndim - 1:
            return "is it a single sample? feed batches, or pass forward=lambda model, batch: model(batch[None])"
        if batch.shape[1:] == example.shape[1:]:
            return f"convert the data to {str(example.dtype).removeprefix('torch.')} first, as your training does"
    return (
        "let a batch be like the example: a tensor, a tuple that begins with the inputs, or a dict by their names; "
        "or run it in your own way with forward=lambda model, batch: …"
    )


def _alike(given: Any, example: Any, *, like_shape: bool) -> bool:
    """Whether an input is a tensor of the example's dtype and number of axes, and of its shape but for the first."""
    if not isinstance(example, Tensor):
        return isinstance(given, type(example))
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if not isinstance(given, Tensor) or (given.dtype, given.ndim) != (example.dtype, example.ndim):
        return False
    return not like_shape or given.shape[1:] == example.shape[1:]


def _described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value))}"
    return "missing" if value is None else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    text = error.message if isinstance(error, CalibrationError) else str(error)
    return text.partition("\n")[0]


def each_batch(batches: Any) -> Iterable[Any]:
    """The batches; one tensor, array or dict is the only one.

    Raises:
        CalibrationError: They cannot be iterated over.
    """
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        return [batches]
    try:
        iter(batches)
    except TypeError:
        raise CalibrationError(
            f"batches is a {type(batches).__name__}", hint="pass a DataLoader, a list, a generator, or one tensor"
        ) from None
    return batches  # type: ignore[no-any-return]


def limited(batches: Any, most: int | None, *, show: bool) -> Iterator[Any]:
    """The batches to feed, under a progress bar if one is wanted and stderr is a terminal."""
    from tqdm import tqdm

    batches = each_batch(batches)
    try:
        total: int | None = len(batches)
    except TypeError:
        total = None
    if most is not None:
        total = most if total is None else min(total, most)
        batches = itertools.islice(batches, most)
    yield from tqdm(batches, "calibrate", total, unit="batch", disable=not (show and sys.stderr.isatty()))
