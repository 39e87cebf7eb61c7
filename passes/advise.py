"""Advise: shapes that the backend runs badly in low precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Final

from torch import fx

from ..editor import Editor
from ..errors import TargetError
from ..graph import Annotation, constant, edge_annotations, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..target import Target
from ..target_parts import Heuristic

__all__ = ["CHECKS", "Advise"]


def _small_channels(node: fx.Node, few: int, multiple: int) -> str | None:
    weight = constant(node.args[1])
    if weight is None or node.kwargs["groups"] != 1:
        return None
    out, into = int(weight.shape[0]), int(weight.shape[1])
    kernel = tuple(weight.shape[2:])
    eights = out % multiple == 0 or into % multiple == 0
    fine = eights and len(set(kernel)) == 1 and (_first(node) or out >= few or into >= few)
    if min(out, into) >= few or fine:
        return None
    return f"{into} input and {out} output channels with a {_times(kernel)} kernel"


def _first(node: fx.Node) -> bool:
    return isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _narrow_convolution(node: fx.Node, inputs: int, outputs: int) -> str | None:
    weight = constant(node.args[1])
    if weight is None or node.kwargs["groups"] != 1:
        return None
    out, into = int(weight.shape[0]), int(weight.shape[1])
    if into >= inputs or out > outputs or _branches(node):
        return None
    return f"{into} input and {out} output channels"


def _branches(node: fx.Node) -> bool:
    """Whether a result is read in several places before the next operation with a weight."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if any(isinstance(a, fx.Node) and constant(a) is not None for a in node.args):
            return False
    return len(node.users) > 1


def _grouped_channels(node: fx.Node, multiple: int, kernel: int) -> str | None:
    weight = constant(node.args[1])
    if weight is None or node.kwargs["groups"] == 1:
        return None
    sizes = tuple(weight.shape[2:])
    if weight.shape[0] % multiple == 0 and min(sizes) >= kernel:
        return None
    return f"{weight.shape[0]} output channels in {node.kwargs['groups']} groups with a {_times(sizes)} kernel"


def _fp8_convolution(node: fx.Node, few: int, volume: int) -> str | None:
    weight, held = constant(node.args[1]), edge_annotations(node).get(0)
    spec = held.spec if held is not None else None
    if weight is None or spec is None or not spec.qdtype.floating:
        return None
    groups = int(node.kwargs["groups"])  # type: ignore[arg-type]
    out, into, sizes = int(weight.shape[0]), int(weight.shape[1]) * groups, tuple(weight.shape[2:])
    if groups == 1 and min(out, into) > few and prod(sizes) <= volume:
        return None
    return f"{into} input and {out} output channels in {groups} groups with a {_times(sizes)} kernel"


def _thin_matrix(node: fx.Node, few: int) -> str | None:
    left, right = (tensor_info(a) for a in node.args[:2])  # type: ignore[arg-type]
    if left is None or right is None or len(left.shape) < 2 or len(right.shape) < 2:
        return None
    linear = kind_name(node) == "linear"
    rows, inner = left.shape[-2], left.shape[-1]
    columns = right.shape[-2] if linear else right.shape[-1]
    # Without more dimensions, a linear layer's rows are the batch, which the example inputs do not fix.
    batch = linear and len(left.shape) == 2
    if (rows == 1 and not batch) or columns == 1 or inner < few or columns < few:
        return f"{'N' if batch else rows}x{inner} times {inner}x{columns}"
    return None


_BEFORE_SOFTMAX: Final = frozenset(
    ("mul", "div", "add", "sub", "reshape", "unflatten", "flatten", "masked_fill", "clamp")
)
_BEHIND_SOFTMAX: Final = frozenset(("dropout", "reshape", "unflatten", "flatten"))
_FAR: Final = 12  # nodes between a product of attention and its softmax; a mask takes most of them


def _attention(node: fx.Node, heads: list[int], longest: int) -> str | None:
    left, right = (tensor_info(a) for a in node.args[:2])  # type: ignore[arg-type]
    if left is None or right is None or min(len(left.shape), len(right.shape)) < 2:
        return None
    if kind_name(node) == "scaled_dot_product_attention":
        size, lengths = left.shape[-1], (left.shape[-2], right.shape[-2])
    elif _scores(node):
        size, lengths = left.shape[-1], (left.shape[-2], right.shape[-1])
    elif _weighs(node):
        size, lengths = right.shape[-1], (left.shape[-2], left.shape[-1])
    else:
        return None
    if size in heads and max(lengths) <= longest:
        return None
    return f"heads of {size} and sequences of {lengths[0]} and {lengths[1]}"


def _scores(node: fx.Node) -> bool:
    """Whether this product gives the scores that a softmax is taken of."""
    for _ in range(_FAR):
        kinds = {kind_name(user): user for user in node.users}
        if "softmax" in kinds:
            return True
        on = [user for kind, user in kinds.items() if kind in _BEFORE_SOFTMAX]
        if len(on) != 1:
            return False
        node = on[0]
    return False


def _weighs(node: fx.Node) -> bool:
    """Whether this product reads the probabilities that a softmax gave."""
    found: Any = node.args[0]
    for _ in range(_FAR):
        if not isinstance(found, fx.Node) or kind_name(found) == "softmax":
            return isinstance(found, fx.Node)
        if kind_name(found) not in _BEHIND_SOFTMAX:
            return False
        found = found.args[0]
    return False


def _always(_: fx.Node) -> str | None:
    return "whatever its shape"


CHECKS: Final[Mapping[str, Callable[..., str | None]]] = {
    "small-channels": _small_channels,
    "narrow-convolution": _narrow_convolution,
    "grouped-channels": _grouped_channels,
    "fp8-convolution": _fp8_convolution,
    "thin-matrix": _thin_matrix,
    "attention": _attention,
    "always": _always,
}
"""Checks that a target's heuristics may name. Each takes a quantized operation and the heuristic's
parameters, and returns what it saw, or None."""


@dataclass(frozen=True)
class Advise(Pass):
    """Apply the target's kernel heuristics (R35 to R37, R40, R43) to quantized operations.

    ``advise`` leaves the operation quantized and notes the rule; ``exclude`` makes it float; ``ignore`` does
    nothing. What a recipe asked for is never excluded, but noted.

    Raises:
        TargetError: A heuristic names a check that does not exist, or parameters that the check does not
            take.
    """

    name: ClassVar[str] = "advise"
    requires: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        target = state(editor.gm).target
        for heuristic in target.heuristics:
            _check(heuristic, target)
            if heuristic.action == "ignore":
                continue
            for node in editor.graph.nodes:
                low = any(a.spec for edge, a in edge_annotations(node).items() if edge != "output")
                if kind_name(node) in heuristic.kinds and low:
                    self._apply(editor, node, heuristic)

    @staticmethod
    def _apply(editor: Editor, node: fx.Node, heuristic: Heuristic) -> None:
        saw = CHECKS[heuristic.check](node, **heuristic.parameters)
        if saw is None:
            return
        text = f"{heuristic.reason}: {saw}"
        asked = any(a.rule == "recipe" for a in edge_annotations(node).values())
        if heuristic.action == "advise" or asked:
            editor.note(node, heuristic.rule, text, kind="advice")
            return
        for edge in edge_annotations(node):
            editor.annotate(node, edge, Annotation(None, heuristic.rule, text))


def _check(heuristic: Heuristic, target: Target) -> None:
    if heuristic.check not in CHECKS:
        raise TargetError(
            f"target {target.name}: {heuristic.rule} names the unknown check {heuristic.check!r}",
            hint=f"use one of {', '.join(CHECKS)}",
        )
    wanted = _parameters(CHECKS[heuristic.check])
    for name, value in heuristic.parameters.items():
        if not all(type(number) is int for number in (value if isinstance(value, list) else [value])):
            raise TargetError(
                f"target {target.name}: {name} of {heuristic.rule} is {value!r}",
                hint="give an integer, or a list of them",
            )
    if set(heuristic.parameters) != wanted:
        raise TargetError(
            f"target {target.name}: check {heuristic.check!r} of {heuristic.rule} got the parameters "
            f"{', '.join(sorted(heuristic.parameters)) or 'none'}",
            hint=f"it takes {', '.join(sorted(wanted)) or 'none'}",
        )


def _parameters(check: Callable[..., Any]) -> set[str]:
    code = check.__code__
    return set(code.co_varnames[1 : code.co_argcount])
