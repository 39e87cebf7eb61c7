"""Kernels for weights that are quantized together, and for learned scales' gradients of a weight.

As :mod:`fxq.triton_kernels`, whose arithmetic they have: the same weight comes out to the last bit.
"""

# ruff: noqa: PLR0913, PLR0915, PLR0917 - a kernel takes each pointer and each size by itself
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .qparams import DEAD_SCALE, SMALLEST_NORMAL
from .triton_kernels import _on, _round, _scale_of, mask_type
from .weight_batch import Made, WeightRequest

__all__ = ["WeightTable", "weight_backward"]

_BLOCK: Final = 1024
_ALIGNED: Final = 8
"""Each weight begins at a multiple of so many elements."""


@triton.jit
def _weights(
    table_ptr,
    eps_ptr,
    programs_ptr,
    y_ptr,
    rest_ptr,
    undone_ptr,
    fields: tl.constexpr,
    refreshes: tl.constexpr,
    learns: tl.constexpr,
    least: tl.constexpr,
    tiny: tl.constexpr,
    dead: tl.constexpr,
    block: tl.constexpr,
):
    program = programs_ptr + tl.program_id(0) * 3
    member, row, first = tl.load(program), tl.load(program + 1), tl.load(program + 2)
    entry = table_ptr + member * fields
    weight_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    scale_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    var = tl.load(entry + 2)
    gamma = tl.load(entry + 3)
    columns = tl.load(entry + 4)
    stride = tl.load(entry + 5)
    start = tl.load(entry + 6)
    low, high = tl.load(entry + 7).to(tl.float32), tl.load(entry + 8).to(tl.float32)
    column = first + tl.arange(0, block)
    valid = column < columns
    at = row.to(tl.int64) * columns + column
    weight = tl.load(weight_ptr + at, mask=valid, other=0.0)
    factor = tl.full((), 1.0, tl.float32)
    if var != 0:
        value = tl.load(var.to(tl.pointer_type(tl.float32)) + row)
        exact = tl.rsqrt(value.to(tl.float64) + tl.load(eps_ptr + member))
        if gamma != 0:
            exact = exact * tl.load(gamma.to(tl.pointer_type(tl.float32)) + row).to(tl.float64)
        factor = exact.to(tl.float32)
    folded = weight * factor
    if refreshes:  # each program of a row sees the whole of it, and they all store the same
        least_seen = tl.full((block,), float("inf"), tl.float32)
        most_seen = tl.full((block,), float("-inf"), tl.float32)
        for begin in range(0, columns, block):
            other = begin + tl.arange(0, block)
            rest = tl.load(weight_ptr + row.to(tl.int64) * columns + other, mask=other < columns, other=0.0) * factor
            least_seen = tl.minimum(least_seen, rest, propagate_nan=tl.PropagateNan.ALL)
            most_seen = tl.maximum(most_seen, rest, propagate_nan=tl.PropagateNan.ALL)
        scale = _scale_of(tl.min(least_seen, axis=0), tl.max(most_seen, axis=0), high, tiny, dead)
        tl.store(scale_ptr + row, scale)
    else:
        scale = tl.load(scale_ptr + row * stride)
    if learns:
        scale = tl.maximum(scale, least)
        if first == 0:
            undone = tl.where(factor == 0.0, 0.0, 1.0 / tl.where(factor == 0.0, 1.0, factor))
            tl.store(undone_ptr + tl.load(entry + 9) + row, undone)
    real = scale / tl.where(factor == 0.0, 1.0, factor)
    steps = tl.div_rn(folded, scale)
    near = tl.maximum(steps, low - 1.0, propagate_nan=tl.PropagateNan.ALL)
    near = _round(tl.minimum(near, high + 1.0, propagate_nan=tl.PropagateNan.ALL))
    rounded = tl.maximum(near, low, propagate_nan=tl.PropagateNan.ALL)
    rounded = tl.minimum(rounded, high, propagate_nan=tl.PropagateNan.ALL)
    y = tl.where(factor == 0.0, weight, rounded * real)
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=valid)
    if learns:
        tl.store(rest_ptr + start + at, steps, mask=valid)
    else:
        inside = (near >= low) & (near <= high)
        tl.store(rest_ptr + start + at, inside.to(rest_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _backward(
    grad_ptr,
    steps_ptr,
    undone_ptr,
    to_weight_ptr,
    to_scale_ptr,
    columns,
    gradient_scale,
    low: tl.constexpr,
    high: tl.constexpr,
    errors: tl.constexpr,
    folds: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((block,), dtype=tl.float32)
    for first in range(0, columns, block):
        column = first + tl.arange(0, block)
        valid = column < columns
        at = row * columns + column
        grad = tl.load(grad_ptr + at, mask=valid, other=0.0)
        steps = tl.load(steps_ptr + at, mask=valid, other=0.0)
        near = tl.maximum(steps, low - 1.0, propagate_nan=tl.PropagateNan.ALL)
        near = tl.minimum(near, high + 1.0, propagate_nan=tl.PropagateNan.ALL)
        rounded = _round(near)
        inside = (rounded >= low) & (rounded <= high)
        tl.store(to_weight_ptr + at, tl.where(inside, grad, 0.0).to(to_weight_ptr.dtype.element_ty), mask=valid)
        ends = tl.where(rounded < low, low, high)
        within = rounded - steps if errors else 0.0 * steps
        total += grad.to(tl.float32) * tl.where(inside, within, ends)
    found = tl.sum(total, axis=0) * gradient_scale
    if folds:
        found = found * tl.load(undone_ptr + row)
    tl.store(to_scale_ptr + row, found)


class WeightTable:
    """Where the tensors of several weights lie, on the GPU, and which program computes what of them.

    Args:
        requests: The weights, all on one device and of one mode.
        least: What a learned scale counts as where it is less.
    """

    def __init__(self, requests: Sequence[WeightRequest], least: float) -> None:
        mode = requests[0].mode
        self._mode, self._least, self._compute = mode, least, requests[0].compute
        self._addresses = _addresses(requests)
        self._shapes = [r.weight.shape for r in requests]
        device = requests[0].weight.device
        self._starts, self._rows = [0], [0]
        entries, programs = [], []
        for member, request in enumerate(requests):
            rows = request.weight.shape[0]
            columns = request.weight.numel() // rows
            entries.append(
                [*self._addresses[member][:4], columns, request.scale.dim(), self._starts[-1],
                 int(request.qmin), int(request.qmax), self._rows[-1]]
            )  # fmt: skip
            programs.append(_programs(member, rows, columns, _BLOCK))
            self._starts.append(self._starts[-1] + -(-request.weight.numel() // _ALIGNED) * _ALIGNED)
            self._rows.append(self._rows[-1] + rows)
        self._table = torch.tensor(entries, dtype=torch.int64).to(device)
        eps = [0.0 if r.fold is None else r.fold.eps for r in requests]
        self._eps = torch.tensor(eps, dtype=torch.float64).to(device)
        self._programs = torch.cat(programs).to(device)

    def fits(self, requests: Sequence[WeightRequest]) -> bool:
        """Whether the table is the one of these weights, which are of its mode and type."""
        return _addresses(requests) == self._addresses

    def launch(self) -> list[Made]:
        """Quantize all of them, from what their tensors hold now."""
        device, learns = self._table.device, self._mode == "learned"
        y = torch.empty(self._starts[-1], dtype=self._compute, device=device)
        kind = torch.float32 if learns else mask_type(torch.float32, self._compute)
        rest = torch.empty(self._starts[-1], dtype=kind, device=device)
        undone = torch.empty(self._rows[-1], dtype=torch.float32, device=device) if learns else self._eps
        with _on(y):
            _weights[(len(self._programs),)](
                self._table, self._eps, self._programs, y, rest, undone, self._table.shape[1], self._mode == "max",
                learns, self._least, SMALLEST_NORMAL, DEAD_SCALE, _BLOCK,
            )  # fmt: skip
        made = []
        for member, shape in enumerate(self._shapes):
            start, row = self._starts[member], self._rows[member]
            numbers = slice(start, start + shape.numel())
            rows = undone[row : self._rows[member + 1]] if learns else None
            made.append(Made(y[numbers].view(shape), rest[numbers].view(shape), rows))
        return made


def _addresses(requests: Sequence[WeightRequest]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for weight, scale, fold, qmin, qmax, _, _ in requests:
        var = 0 if fold is None else fold.var.data_ptr()
        gamma = 0 if fold is None or fold.gamma is None else fold.gamma.data_ptr()
        found.append((weight.data_ptr(), scale.data_ptr(), var, gamma, weight.numel(), int(qmin), int(qmax)))
    return found


def _programs(member: int, rows: int, columns: int, block: int) -> Tensor:
    """Member, row and first column of each program, int32, [programs, 3]."""
    row = torch.arange(rows, dtype=torch.int32)
    first = torch.arange(0, columns, block, dtype=torch.int32)
    grid = torch.cartesian_prod(row, first)
    return torch.cat([torch.full((len(grid), 1), member, dtype=torch.int32), grid], 1).contiguous()


def weight_backward(
    grad: Tensor, steps: Tensor, undone: Tensor | None, qmin: float, qmax: float, *, errors: bool, gradient_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients for a weight, [rows, …], and for a scale of each row, float32, [rows].

    Args:
        grad: Float, [rows, …].
        steps: The weight's unrounded steps, float32, contiguous, likewise.
        undone: What undoes the fold, float32, [rows]; None for none.
        qmin: Smallest integer.
        qmax: Largest integer; magnitudes are below 2**22.
        errors: Whether the scale learns from the rounding errors too.
        gradient_scale: What the scale's gradient is multiplied by.
    """
    grad = grad.contiguous()
    rows = steps.shape[0]
    columns = steps.numel() // max(rows, 1)
    to_weight = torch.empty_like(steps)
    to_scale = torch.zeros(rows, dtype=torch.float32, device=grad.device)
    if columns:
        with _on(grad):
            _backward[(rows,)](
                grad, steps, steps if undone is None else undone, to_weight, to_scale, columns, float(gradient_scale),
                float(qmin), float(qmax), errors, undone is not None, _BLOCK,
            )  # fmt: skip
    return to_weight, to_scale
