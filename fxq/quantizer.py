"""The module that sits on a quantized edge of a prepared graph: it observes, stands aside, or fake-quantizes.

A prepared GraphModule holds its quantizers in one container, ``gm.quantizers``, each under the name of the
tensor it quantizes; the graph calls ``quantizers.<tensor>``.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx, nn

from .buffers import FlexibleState
from .errors import CalibrationError, RecipeError
from .observing import Histogram, Observer, make_observer
from .qdq import fake_quantize
from .qparams import scale_and_zero_point, weight_range
from .recipe import METHODS, Method, QSpec

__all__ = [
    "QUANTIZERS",
    "Mode",
    "Quantizer",
    "quantized_nodes",
    "quantizers",
    "solve_all",
    "submodule_name",
    "tie_groups",
]

QUANTIZERS: Final = "quantizers"
"""Attribute of a prepared GraphModule under which its quantizers are."""

_TAKEN: Final = frozenset(dir(nn.Module()))


def submodule_name(tensor: str) -> str:
    """A tensor's name as a submodule's or buffer's: torch refuses those of Module's attributes, such as ``half``.

    Such a name gets an underscore more, and so does one that is such a name with underscores, so that no two
    tensors share one.
    """
    return f"{tensor}_" if tensor.rstrip("_") in _TAKEN or tensor in _TAKEN else tensor


class Mode(enum.Enum):
    """What a quantizer does with a tensor: collect statistics, nothing, or quantize and dequantize."""

    OBSERVE = "observe"
    OFF = "off"
    QUANTIZE = "quantize"


class Solution(NamedTuple):
    """A scale and a zero point, and by which method they were found."""

    scale: Tensor
    zero_point: Tensor
    method: str


class Quantizer(FlexibleState):
    """Quantizes one tensor.

    Args:
        spec: A complete spec.
        tensor: Name of the tensor that it quantizes, which is its own name.
        axis: The per-channel axis, or None.
        tie: Name of the group of quantizers that share one scale, or None.
        weight: Whether the tensor is a weight, whose range is its own: nothing is collected for it.

    Attributes:
        spec: As given.
        tensor: As given.
        axis: As given.
        tie: As given.
        mode: What it does; begins as :attr:`Mode.OBSERVE`.
        observer: What it collects; None for a weight.
        scale: float32, [] or [channels]; empty, shape [0], until solved.
        zero_point: int32, likewise.
        solved_by: What the scale was found by: a method's name, ``auto (mse)`` where auto chose it; empty if it
            was set from outside.
    """

    scale: Tensor
    zero_point: Tensor
    observer: Observer | None

    def __init__(
        self, spec: QSpec, *, tensor: str, axis: int | None, tie: str | None = None, weight: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.tensor, self.axis, self.tie = spec, tensor, axis, tie
        self.mode = Mode.OBSERVE
        self.solved_by = ""
        self.observer = None if weight else make_observer(spec, channels=None, axis=axis)
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int32))

    @property
    def weight(self) -> bool:
        """Whether it quantizes a weight, and never waits for batches; set to True, it drops the observer."""
        return self.observer is None

    @weight.setter
    def weight(self, value: bool) -> None:
        if value:
            self.observer = None
        elif self.observer is None:
            self.observer = make_observer(self.spec, channels=None, axis=self.axis)

    @property
    def fed(self) -> bool:
        """Whether there is something to solve from: collected batches, or for a weight the solved scale
        itself.
        """
        return self.solved if self.observer is None else self.observer.fed

    @property
    def solved(self) -> bool:
        """Whether scale and zero point are known."""
        return self.scale.numel() > 0

    def forward(self, x: Tensor) -> Tensor:
        """x itself, or in mode QUANTIZE what x becomes in quantized form, in x's shape and dtype.

        Raises:
            CalibrationError: The mode is QUANTIZE and no scale is known, or x cannot be observed.
        """
        if self.mode is Mode.QUANTIZE:
            self._require_solved()
            return fake_quantize(x, self.scale, self.zero_point, self.axis, self.spec.qdtype.name)
        if self.mode is Mode.OBSERVE and self.observer is not None:
            self.observer.collect(x)
        return x

    def reset(self) -> None:
        """Forget what was collected; scale and zero point stay until solved again."""
        if self.observer is not None:
            self.observer.reset()

    def _require_solved(self) -> None:
        if not self.solved:
            raise CalibrationError(
                f"the quantizer of {self.tensor} has no scale",
                node=self.tensor,
                hint="run fxq.calibrate first",
            )

    def solve(self, method: Method | str | None = None, others: Iterable[Quantizer] = ()) -> None:
        """Set scale and zero point from what was collected.

        Args:
            method: How to take the range; None (default) is the spec's method.
            others: Quantizers that share this one's scale; their statistics count too, and they are not
                changed.

        Raises:
            CalibrationError: Nothing was collected, or it cannot answer the method, or the quantizer is a
                weight's.
        """
        self.take(self.solution(method, others))

    def take(self, solution: Solution) -> None:
        """Set scale and zero point to what :meth:`solution` said."""
        self.set_parameters(solution.scale, solution.zero_point)
        self.solved_by = solution.method

    def solution(self, method: Method | str | None = None, others: Iterable[Quantizer] = ()) -> Solution:
        """What :meth:`solve` would set; nothing is changed."""
        try:
            observer = self._pooled(others)
            chosen = self._method(method)
            name = chosen.name
            if name == "auto" and isinstance(observer, Histogram) and observer.fed:
                chosen, amin, amax = observer.best(self.spec)
                name = f"auto ({chosen.name})"
            else:
                amin, amax = observer.compute(chosen, self.spec)
            return Solution(*scale_and_zero_point(amin, amax, self.spec), name)
        except CalibrationError as error:
            raise self._named(error) from error

    def _method(self, method: Method | str | None) -> Method:
        if method is None:
            return self.spec.calibration
        if not isinstance(method, Method | str):
            raise RecipeError(f"method is a {type(method).__name__}", hint=f"use one of {', '.join(METHODS)}")
        return Method(method) if isinstance(method, str) else method

    def range(self, method: Method | str | None = None, others: Iterable[Quantizer] = ()) -> tuple[Tensor, Tensor]:
        """The range (amin, amax) that :meth:`solve` would quantize over; nothing is changed."""
        return self._pooled(others).compute(self._method(method), self.spec)

    def _pooled(self, others: Iterable[Quantizer]) -> Observer:
        """The statistics of this and the other quantizers together."""
        if self.observer is None:
            raise CalibrationError(f"{self.tensor} is a weight: its range is its own", hint="use solve_weight")
        rest = [other.observer for other in others if other is not self and other.observer is not None]
        observer = copy.deepcopy(self.observer) if rest else self.observer
        for more in rest:
            observer.merge(more)
        return observer

    def _named(self, error: CalibrationError) -> CalibrationError:
        return CalibrationError(f"{self.tensor}: {error.message}", node=self.tensor, hint=error.hint)

    def solve_weight(self, weight: Tensor) -> None:
        """Set scale and zero point from a weight's own values.

        Args:
            weight: The tensor that is quantized, float; per channel, `axis` is its channel axis.

        Raises:
            CalibrationError: The weight is empty, or holds NaN or Inf.
        """
        try:
            amin, amax = weight_range(weight, self.spec, self.axis)
        except CalibrationError as error:
            raise self._named(error) from error
        self.set_parameters(*scale_and_zero_point(amin, amax, self.spec))

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take over a scale and a zero point; later changes of the given tensors do not show.

        Args:
            scale: Positive, [] or [channels].
            zero_point: Integers, the same shape.
        """
        with torch.inference_mode(mode=False):  # an inference tensor could not be trained or saved later
            self.scale = scale.detach().to(torch.float32, copy=True)
            self.zero_point = zero_point.detach().to(torch.int32, copy=True)
        self.solved_by = ""

    def extra_repr(self) -> str:
        """Tensor, spec and mode, for printed modules."""
        tie = "" if self.tie is None else f", tie={self.tie}"
        return f"{self.tensor}, {self.spec}{tie}, {self.mode.value}"


def quantizers(gm: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a prepared graph by tensor name (see :func:`submodule_name`), in the order they were inserted.

    Args:
        gm: A prepared GraphModule; any other module has none.
    """
    container = getattr(gm, QUANTIZERS, None)
    if not isinstance(container, nn.Module):
        return {}
    return {name: child for name, child in container.named_children() if isinstance(child, Quantizer)}


def quantized_nodes(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """For the name of each quantizer that a prepared graph calls, the node whose tensor it quantizes."""
    prefix = f"{QUANTIZERS}."
    calls = (n for n in gm.graph.nodes if n.op == "call_module" and str(n.target).startswith(prefix))
    return {str(n.target).removeprefix(prefix): n.args[0] for n in calls}


def tie_groups(found: Iterable[Quantizer]) -> list[list[Quantizer]]:
    """Quantizers that share a scale, together; those without a tie alone."""
    groups: dict[Any, list[Quantizer]] = {}
    for quantizer in found:
        groups.setdefault(quantizer if quantizer.tie is None else quantizer.tie, []).append(quantizer)
    return list(groups.values())


def solve_all(gm: nn.Module, method: Method | str | None = None) -> None:
    """Solve every quantizer that observes, over the merged statistics of each tie; weights' quantizers stay.

    Args:
        gm: A prepared GraphModule whose quantizers were fed.
        method: How to take the ranges; None (default) is each spec's method.

    Raises:
        CalibrationError: A quantizer saw no data, or its statistics cannot answer the method; nothing is
            changed then.
    """
    solved: list[tuple[Quantizer, Solution]] = []
    problems: list[CalibrationError] = []
    for group in tie_groups(q for q in quantizers(gm).values() if not q.weight):
        try:
            solution = group[0].solution(method, group[1:])
        except CalibrationError as error:
            problems.append(error)
        else:
            solved += [(q, solution) for q in group]
    if problems:
        reasons: dict[str, list[str]] = {}
        for problem in problems:
            reasons.setdefault(problem.message.removeprefix(f"{problem.node}: "), []).append(str(problem.node))
        raise CalibrationError(
            f"{len(problems)} quantizers cannot be solved: "
            + "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()),
            hint=problems[0].hint,
        ) from problems[0]
    for quantizer, solution in solved:
        quantizer.take(solution)
