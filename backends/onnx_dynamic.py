"""Which input dimensions of an ONNX file are dynamic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.export import Dim

from ..errors import ExportError
from ..guards import Guard

__all__ = ["DynamicShapes", "check_guards", "dynamic_dims"]

DimSpec: TypeAlias = "str | tuple[int, int]"
DynamicShapes: TypeAlias = "str | Mapping[str, Mapping[int, DimSpec]] | None"

BATCH: Final = "batch"
_TRIED: Final = 64
_ALLOWED: Final = '"batch", None, or {input name: {dimension: name or (min, max)}}'


def dynamic_dims(
    names: Sequence[str], tensors: Sequence[Tensor], shapes: DynamicShapes
) -> tuple[list[dict[int, Any]], list[Tensor]]:
    """Symbolic dimensions for each input, and examples that fit them.

    torch.export takes a size of 1 for a constant, so an example that has it along a dynamic dimension is
    repeated to 2.

    Args:
        names: Input names.
        tensors: The example for each.
        shapes: See :func:`fxq.backends.onnx_export.export_onnx`.

    Returns:
        For each input ``{dimension: torch.export.Dim}``, and the examples.

    Raises:
        ExportError: `shapes` has another form, names what there is not, or contradicts the examples.
    """
    wanted = _spelled_out(names, tensors, shapes)
    sizes: dict[str, tuple[int, str]] = {}
    known: dict[str, Any] = {}
    dims: list[dict[int, Any]] = []
    fitted: list[Tensor] = []
    for name, example in zip(names, tensors, strict=True):
        made, tensor = {}, example
        for dim, spec in wanted.get(name, {}).items():
            axis = _axis(name, tensor, dim)
            label = spec if isinstance(spec, str) else f"{name}_dim{axis}"
            size, first = sizes.setdefault(label, (tensor.shape[axis], name))
            if size != tensor.shape[axis]:
                same = {
                    n: {axis: label} for n, t in zip(names, tensors, strict=True) if t.shape[axis : axis + 1] == (size,)
                }
                raise ExportError(
                    f"dimension {label!r} is {size} in input {first!r} and {tensor.shape[axis]} in {name!r}",
                    hint=f"name the inputs that have it, dynamic_shapes={same}, and give other dimensions other names",
                )
            if label not in known:
                known[label] = _dim(label, name, size, spec)
            made[axis] = known[label]
            if size == 1:
                tensor = torch.cat([tensor, tensor], dim=axis)
        dims.append(made)
        fitted.append(tensor)
    return dims, fitted


def _spelled_out(
    names: Sequence[str], tensors: Sequence[Tensor], shapes: DynamicShapes
) -> Mapping[str, Mapping[int, Any]]:
    if shapes is None:
        return {}
    if shapes == BATCH:
        return {name: {0: BATCH} for name, tensor in zip(names, tensors, strict=True) if tensor.ndim}
    if not isinstance(shapes, Mapping) or not all(isinstance(dims, Mapping) for dims in shapes.values()):
        raise ExportError(f"dynamic_shapes={shapes!r} is not understood", hint=f"use {_ALLOWED}")
    unknown = sorted(set(shapes) - set(names))
    if unknown:
        raise ExportError(f"dynamic_shapes names {unknown}, which are no inputs", hint=f"inputs: {', '.join(names)}")
    return shapes


def _axis(name: str, tensor: Tensor, dim: Any) -> int:
    if not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
        raise ExportError(f"input {name!r} has no dimension {dim!r}", hint=f"it has {tensor.ndim} dimensions")
    return dim % tensor.ndim


def _dim(label: str, name: str, size: int, spec: Any) -> Any:
    if isinstance(spec, str) and spec.isidentifier():
        low, high = 1, None
    elif isinstance(spec, tuple | list) and len(spec) == 2 and all(isinstance(bound, int) for bound in spec):
        low, high = max(spec[0], 1), spec[1]
    else:
        raise ExportError(f"{spec!r} is no dimension of input {name!r}", hint=f"use {_ALLOWED}; names are identifiers")
    if high is not None and not (low <= size <= high and high > 1):
        raise ExportError(
            f"input {name!r} has size {size} along {label!r}, outside {spec}",
            hint="choose a range of more than one size that holds the example's, or leave the dimension out",
        )
    if size == 0:
        raise ExportError(f"input {name!r} is empty along {label!r}", hint="give an example with at least one element")
    return Dim(label, min=low, max=high)


def check_guards(
    guards: Sequence[Guard], names: Sequence[str], tensors: Sequence[Tensor], dims: Sequence[Mapping[int, Any]]
) -> None:
    """What tracing decided holds for every size that is promised.

    Each dynamic dimension is tried alone, at the 64 sizes from its least on and at its largest.

    Args:
        guards: What tracing decided.
        names: The graph's own names of the inputs.
        tensors: The example for each.
        dims: For each input ``{dimension: torch.export.Dim}``.

    Raises:
        ExportError: A guard fixes or limits a dynamic dimension; it names the guard and the line that decided.
    """
    shapes = {name: list(tensor.shape) for name, tensor in zip(names, tensors, strict=True)}
    places: dict[str, list[tuple[str, int]]] = {}
    known: dict[str, Any] = {}
    for name, own in zip(names, dims, strict=True):
        for axis, dim in own.items():
            places.setdefault(dim.__name__, []).append((name, axis))
            known[dim.__name__] = dim
    for label, held in places.items():
        least, most = known[label].min, min(known[label].min + _TRIED - 1, known[label].max)
        sizes = [*range(least, most + 1), known[label].max]
        for guard in guards:
            if not {name for name, _ in held} & set(guard.inputs):
                continue
            good = [size for size in sizes if guard.holds(_resized(shapes, held, size))]
            if len(good) < len(sizes):
                raise _narrow(guard, label, good, held)


def _resized(shapes: Mapping[str, list[int]], places: Sequence[tuple[str, int]], size: int) -> dict[str, list[int]]:
    """The shapes with one dynamic dimension at `size`."""
    changed = {name: list(shape) for name, shape in shapes.items()}
    for name, axis in places:
        changed[name][axis] = size
    return changed


def _narrow(guard: Guard, label: str, good: Sequence[int], places: Sequence[tuple[str, int]]) -> ExportError:
    """The error for a guard that holds for the sizes `good` alone."""
    hint = "export static shapes with dynamic_shapes=None, or rewrite that line without a decision"
    good = good[:-1] if len(good) > 1 and good[-1] - good[-2] > 1 else good  # the largest of all was tried too
    if len(good) > 1 and good[-1] - good[0] == len(good) - 1:
        dims = ", ".join(f"{name!r}: {{{axis}: ({good[0]}, {good[-1]})}}" for name, axis in places)
        hint = f"export the sizes for which it holds, dynamic_shapes={{{dims}}}, or {hint}"
    return ExportError(
        f"{label} cannot be dynamic: the graph was traced for {guard.shown}",
        module_path=guard.module_path or None,
        source=guard.where(),
        hint=hint,
    )
