"""Which input dimensions of an ONNX file are dynamic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.export import Dim

from ..errors import ExportError

__all__ = ["DynamicShapes", "dynamic_dims"]

DimSpec: TypeAlias = "str | tuple[int, int]"
DynamicShapes: TypeAlias = "str | Mapping[str, Mapping[int, DimSpec]] | None"

BATCH: Final = "batch"
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
                raise ExportError(
                    f"dimension {label!r} is {size} in input {first!r} and {tensor.shape[axis]} in {name!r}",
                    hint=f"give different dimensions different names: dynamic_shapes={_ALLOWED}",
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
