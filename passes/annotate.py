"""Annotate: which edges are quantized, and how, by target and recipe."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from ..errors import RecipeError
from ..graph import Annotation, Editor, constant, error_at, origin, state, tensor_info
from ..ops import kind_name
from ..passbase import Pass
from ..recipe import KEEP, PerChannel, PerTensor, QSpec, Recipe, Rule
from ..target import OpPlacement, Target

__all__ = ["Annotate", "matches"]

_MATMUL_WEIGHT = 1


@dataclass(frozen=True)
class Annotate(Pass):
    """Note on each operation how its inputs, weight and output are quantized.

    The target's data names the op kinds and edges that it runs in low precision (R20, R21, R32); the recipe's rules
    change that, the last match winning edge by edge. Nothing is inserted yet: an annotation says what and why.

    Declines, with a note: operations whose weight is computed in the graph (R35), and tensors that are not floating.

    Raises (RecipeError): a rule matches nothing; a spec that the edge cannot have.
    """

    name: ClassVar[str] = "annotate"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    provides: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        now = state(editor.gm)
        hit: set[int] = set()
        for node in editor.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            rules = [(i, r) for i, r in enumerate(now.recipe.rules) if matches(r, node)]
            hit.update(i for i, _ in rules)
            placement = now.target.ops.get(kind_name(node))
            if placement is not None and _computed_weight(node, placement):
                editor.note(node, "R35", "its weight is computed in the graph, so it stays float")
                placement = None
            self._edges(editor, node, now.target, placement, rules)
        _all_hit(now.recipe, hit, editor.gm)

    @staticmethod
    def _edges(
        editor: Editor,
        node: fx.Node,
        target: Target,
        placement: OpPlacement | None,
        rules: Sequence[tuple[int, Rule]],
    ) -> None:
        for edge in _edges_of(node, placement, rules):
            default = _default(node, edge, target, placement)
            chosen = _decide(edge, default, target, placement, rules)
            if chosen is None:
                continue
            if chosen.spec is not None:
                chosen = replace(chosen, spec=_with_axis(node, edge, chosen.spec, placement))
            editor.annotate(node, edge.key, chosen)


@dataclass(frozen=True)
class _Edge:
    """One edge of an operation: its key among the annotations and what a recipe calls it."""

    key: int | str
    role: str


def matches(rule: Rule, node: fx.Node) -> bool:
    """Whether `rule` speaks of `node`."""
    match = rule.match
    where = origin(node)
    if isinstance(match, str):
        if match.startswith("op:"):
            return fnmatch.fnmatchcase(kind_name(node), match.removeprefix("op:"))
        parts = where.module_path.split(".") if where.module_path else []
        paths = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return any(fnmatch.fnmatchcase(path, match) for path in paths)
    if isinstance(match, type):
        return where.module_type is not None and issubclass(where.module_type, match)
    return bool(match(node))


def _all_hit(recipe: Recipe, hit: set[int], gm: fx.GraphModule) -> None:
    for index, rule in enumerate(recipe.rules):
        if index not in hit:
            paths = sorted({p for n in gm.graph.nodes if (p := origin(n).module_path)})
            kinds = sorted({kind_name(n) for n in gm.graph.nodes if n.op == "call_function"})
            raise RecipeError(
                f"rule {index} ({rule.text}) matches no operation",
                hint=f"module paths here: {', '.join(paths[:12])}{' …' if len(paths) > 12 else ''}; "
                f"op kinds: {', '.join(kinds)}",
            )


def _computed_weight(node: fx.Node, placement: OpPlacement) -> bool:
    return placement.weight is not None and constant(node.args[placement.weight]) is None


def _edges_of(
    node: fx.Node, placement: OpPlacement | None, rules: Sequence[tuple[int, Rule]]
) -> Iterator[_Edge]:
    inputs: tuple[int, ...] = placement.inputs if placement else ()
    if not placement and any(isinstance(r.edges.input, QSpec) for _, r in rules):
        inputs = tuple(i for i, a in enumerate(node.args) if isinstance(a, fx.Node))
    for index in inputs:
        if _floating(node.args[index]):
            yield _Edge(index, "weight" if constant(node.args[index]) is not None else "input")
    if placement and placement.weight is not None and _floating(node.args[placement.weight]):
        yield _Edge(placement.weight, "weight")
    if _floating(node) and (
        (placement and placement.output) or any(r.edges.output != KEEP for _, r in rules)
    ):
        yield _Edge("output", "output")


def _floating(node: Any) -> bool:
    info = tensor_info(node) if isinstance(node, fx.Node) else None
    return info is not None and info.dtype.is_floating_point


def _default(node: fx.Node, edge: _Edge, target: Target, placement: OpPlacement | None) -> Annotation | None:
    if placement is None or (edge.key == "output" and not placement.output):
        return None
    spec = target.weight if edge.role == "weight" else target.activation
    return Annotation(spec, placement.rule, placement.reason)


def _decide(
    edge: _Edge,
    default: Annotation | None,
    target: Target,
    placement: OpPlacement | None,
    rules: Sequence[tuple[int, Rule]],
) -> Annotation | None:
    chosen = default
    base = target.weight if edge.role == "weight" else target.activation
    for index, rule in rules:
        wish = getattr(rule.edges, edge.role)
        if wish == KEEP or (wish is None and chosen is None):
            continue
        reason = rule.reason or f"recipe rule {index}, {rule.text}"
        chosen = Annotation(None if wish is None else wish.over(base), "recipe", reason, index)
    return chosen


def _with_axis(node: fx.Node, edge: _Edge, spec: QSpec, placement: OpPlacement | None) -> QSpec:
    """The spec with its per-channel axis filled in (R16)."""
    if not isinstance(spec.granularity, PerChannel):
        return spec
    if spec.granularity.axis is not None:
        return spec
    if edge.role != "weight":
        raise error_at(
            RecipeError,
            f"{edge.role} {edge.key} of {node.name} is to be quantized per channel without an axis",
            node,
            "give PerChannel(axis=...), or per-tensor, which TensorRT wants for activations (R32)",
        )
    axis = placement.weight_axis if placement else None
    if axis is None and kind_name(node) == "matmul" and edge.key == _MATMUL_WEIGHT:
        info = tensor_info(node.args[_MATMUL_WEIGHT])  # type: ignore[arg-type]
        axis = len(info.shape) - 1 if info is not None and len(info.shape) == 2 else None
    grouped = node.kwargs.get("groups", 1) != 1
    if axis is None or (grouped and placement is not None and placement.grouped_per_tensor):
        return replace(spec, granularity=PerTensor())
    return replace(spec, granularity=PerChannel(axis))
