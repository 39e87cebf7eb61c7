"""Annotate: which edges are quantized, and how, by target and recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Final

from torch import fx

from ..editor import Editor
from ..errors import RecipeError, TargetError
from ..graph import Annotation, State, constant, edge_annotations, error_at, origin, state, stored_alone, tensor_info
from ..ops import KINDS, kind_name, named, products
from ..passbase import Pass
from ..recipe import KEEP, PerChannel, PerTensor, QSpec, Recipe, Rule
from ..target import Target
from ..target_parts import OpPlacement

__all__ = ["SUMS", "Annotate", "applied", "asked", "check_spec", "governing", "matches", "quantized_edges"]

SUMS: Final = frozenset(("add",))
"""Op kinds whose edges :class:`~fxq.passes.residual_add.ResidualAdd` decides on, unless a recipe did."""

_SHOWN: Final = 12


@dataclass(frozen=True)
class Annotate(Pass):
    """Note on each operation how its inputs, weight and output are quantized.

    The target's data names the op kinds and edges that it runs in low precision (R20, R21, R32); the
    recipe's rules change that, the last match winning edge by edge. Nothing is inserted yet: an annotation
    says what and why.

    Declines, with a note: operations whose weight is computed in the graph (R35), and those that read stored tensors
    alone, which the builder computes once (R18), unless a recipe speaks of them. Tensors that are not
    floating have nothing to quantize.

    Raises:
        RecipeError: A rule matches nothing, or matches and changes nothing; a spec that the edge cannot
            have, or that the target refuses.
        TargetError: The target names an op kind that does not exist.
    """

    name: ClassVar[str] = "annotate"
    requires: ClassVar[tuple[str, ...]] = ("canonical",)
    provides: ClassVar[tuple[str, ...]] = ("annotated",)

    def call(self, editor: Editor) -> None:
        now = state(editor.gm)
        _check_kinds(now.target)
        matched: set[int] = set()
        effective: set[int] = set()
        computed_once = stored_alone(editor.graph)
        for node in editor.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module"):
                continue
            rules = [(i, r) for i, r in enumerate(now.recipe.rules) if matches(r, node)]
            matched.update(i for i, _ in rules)
            explicit = any(rule.explicit for _, rule in rules)
            if node in computed_once and kind_name(node) in now.target.ops and not explicit:
                editor.note(node, "R18", "it reads stored tensors alone, so it is computed once, and stays float")
                continue
            effective.update(self._annotate(editor, node, now.target, rules))
        _check_rules(now.recipe, matched, effective, editor.gm)

    @staticmethod
    def _annotate(editor: Editor, node: fx.Node, target: Target, rules: Sequence[tuple[int, Rule]]) -> set[int]:
        """Annotate one node; gives the indices of the rules that had a say."""
        placement = target.ops.get(kind_name(node))
        sums = target.residual.policy != "none" and kind_name(node) in SUMS
        later = sums or kind_name(node) in target.concat.kinds | target.norms.kinds
        if placement is not None and placement.joins is not None:
            placement, later = None, True
        said = any(note.node == node.name and note.kind == "opaque" for note in state(editor.gm).notes)
        if placement is None and products(node) and not said and "matmul" in target.weighted:
            text = f"{kind_name(node)} stays float: write it as torch.matmul or F.linear to quantize it"
            editor.note(node, "R20", text, kind="opaque")
        if placement is not None and _computed_weight(node, placement):
            editor.note(node, "R35", "its weight is computed in the graph, so it stays float")
            placement = None
        effective = {i for i, r in rules if later and not r.explicit}
        for edge in _edges_of(node, placement):
            chosen, used = _decide(edge, target, placement, rules, later=later)
            effective.update(used)
            if chosen is None:
                continue
            if chosen.spec is not None:
                if used:
                    check_spec(node, _words(edge), chosen.spec, chosen.reason, target)
                chosen = replace(chosen, spec=_with_axis(node, edge, chosen.spec, placement))
            editor.annotate(node, edge.key, chosen)
        if placement is not None:
            _advise_half(editor, node)
            _note_float(editor, node)
        return effective


def _note_float(editor: Editor, node: fx.Node) -> None:
    """Pass on why a recipe leaves a weighted operation float."""
    reasons = [a.reason for a in edge_annotations(node).values() if a.rule == "recipe" and a.spec is None]
    if reasons:
        editor.note(node, "recipe", f"this {kind_name(node)} stays float: {reasons[0]}")


@dataclass(frozen=True)
class _Edge:
    """One edge of an operation.

    Attributes:
        key: Its key among the annotations.
        role: What a recipe calls it.
        placed: Whether the target quantizes it.
    """

    key: int | str
    role: str
    placed: bool


def matches(rule: Rule, node: fx.Node) -> bool:
    """Whether `rule` speaks of `node`.

    Raises:
        RecipeError: The rule's predicate failed.
    """
    match = rule.match
    where = origin(node)
    if isinstance(match, str):
        return named(node, match)
    if isinstance(match, type):
        return any(issubclass(kind, match) for kind in where.module_types)
    try:
        return bool(match(node))
    except Exception as error:
        message = f"the predicate {rule.text} failed on {node.name}: {type(error).__name__}: {error}"
        raise error_at(RecipeError, message, node, "it is asked about every operation of the graph") from error


def applied(node: fx.Node, role: str, recipe: Recipe) -> tuple[int, Rule] | None:
    """The rule that decides on the edges of `node` in this role, with its index; None if none does."""
    found = None
    for index, rule in enumerate(recipe.rules):
        if getattr(rule.edges, role) != KEEP and matches(rule, node):
            found = index, rule
    return found


def asked(node: fx.Node, role: str, edge: str, now: State) -> tuple[QSpec, int, str]:
    """How an edge is quantized that a pass decides on: as the target says, or a recipe rule about `node`.

    Args:
        node: The operation.
        role: ``input`` or ``output``.
        edge: Its edge in words, for errors.
        now: What is known of the graph.

    Returns:
        The spec, the rule's index (-1 without one), and what the rule adds to a reason.

    Raises:
        RecipeError: The rule's spec is one that the target refuses.
    """
    said, base = applied(node, role, now.recipe), now.target.activation
    wish = None if said is None else getattr(said[1].edges, role)
    if said is None or not isinstance(wish, QSpec):
        return base, -1, ""
    spec = wish.over(base)
    check_spec(node, edge, spec, f"recipe rule {said[0]}, {said[1].text}", now.target)
    return spec, said[0], f"; how is recipe rule {said[0]}'s, {said[1].text}"


def quantized_edges(tensor: fx.Node) -> list[tuple[fx.Node, int | str, Annotation]]:
    """Every annotation that quantizes `tensor`, with the node and edge that it is noted on."""
    found: list[tuple[fx.Node, int | str, Annotation]] = [
        (user, edge, a)
        for user in tensor.users
        for edge, a in edge_annotations(user).items()
        if isinstance(edge, int) and user.args[edge] is tensor and a.spec is not None
    ]
    own = edge_annotations(tensor).get("output")
    if own is not None and own.spec is not None:
        found.append((tensor, "output", own))
    return found


def governing(tensor: fx.Node) -> Annotation | None:
    """What holds for `tensor` among its edges' wishes: that of the latest recipe rule; None if float."""
    wishes = [annotation for _, _, annotation in quantized_edges(tensor)]
    return max(wishes, key=lambda a: a.priority, default=None)


def _check_kinds(target: Target) -> None:
    """Stop at kinds that do not exist, and at edges that a kind does not have."""
    strange = sorted(target.kinds - set(KINDS))
    if strange:
        alike = dict.fromkeys(name for kind in strange for name in get_close_matches(kind, KINDS, 2))
        raise TargetError(
            f"target {target.name} speaks of {', '.join(strange)}, which are no op kinds",
            hint=f"{'is ' + ' or '.join(alike) + ' meant? ' if alike else ''}there are {', '.join(sorted(KINDS))}",
        )
    for kind, placement in target.ops.items():
        names = list(KINDS[kind].params)[: KINDS[kind].tensors]
        if any(index >= len(names) for index in placement.arguments):
            raise TargetError(
                f"target {target.name} quantizes argument {max(placement.arguments)} of {kind}, which it does not have",
                hint=f"its tensors are {', '.join(f'{index} ({name})' for index, name in enumerate(names))}",
            )


def _check_rules(recipe: Recipe, matched: set[int], effective: set[int], gm: fx.GraphModule) -> None:
    for index, rule in enumerate(recipe.rules):
        if index not in matched:
            paths = sorted({p for n in gm.graph.nodes if (p := origin(n).module_path)})
            kinds = sorted({kind_name(n) for n in gm.graph.nodes if n.op.startswith("call_")})
            more = " …" if len(paths) > _SHOWN else ""
            raise RecipeError(
                f"rule {index} ({rule.text}) matches no operation",
                hint=f"module paths here: {', '.join(paths[:_SHOWN])}{more}; op kinds: {', '.join(kinds)}",
            )
        speaks = any(isinstance(getattr(rule.edges, role), QSpec) for role in ("input", "weight", "output"))
        if index not in effective and speaks:
            hint = (
                "the operations it matches have no such edge with floating-point values"
                if rule.explicit
                else "EdgeSpecs(input=..., weight=..., output=...) quantizes what the target leaves float"
            )
            raise RecipeError(
                f"rule {index} ({rule.text}) changes nothing: no edge of what it matches is quantized",
                hint=hint,
            )


def _computed_weight(node: fx.Node, placement: OpPlacement) -> bool:
    return placement.weight is not None and constant(node.args[placement.weight]) is None


def _edges_of(node: fx.Node, placement: OpPlacement | None) -> list[_Edge]:
    """The edges that target or recipe may quantize: of a placed operation those that its placement names
    (never the bias, R17), of another one all its tensors.
    """
    keys = placement.arguments if placement is not None else range(len(node.args))
    edges = [
        _Edge(k, "input" if constant(node.args[k]) is None else "weight", placement is not None)
        for k in keys
        if _floating(node.args[k])
    ]
    if _floating(node):
        edges.append(_Edge("output", "output", placement is not None and placement.output))
    return edges


def _floating(node: Any) -> bool:
    info = tensor_info(node) if isinstance(node, fx.Node) else None
    return info is not None and info.dtype.is_floating_point


def _decide(
    edge: _Edge,
    target: Target,
    placement: OpPlacement | None,
    rules: Sequence[tuple[int, Rule]],
    *,
    later: bool,
) -> tuple[Annotation | None, set[int]]:
    """What holds for one edge (None: nothing was said), and the rules that had a say.

    `later` says that another pass decides on the operation's inputs, unless a recipe leaves them float.
    """
    base = target.weight if edge.role == "weight" else target.activation
    chosen = Annotation(base, placement.rule, placement.reason) if placement is not None and edge.placed else None
    used: set[int] = set()
    for index, rule in rules:
        wish = getattr(rule.edges, edge.role)
        bare = isinstance(wish, QSpec) and not rule.explicit and not edge.placed
        idle = wish is None and chosen is None and not (later and edge.role == "input")
        if wish == KEEP or bare or idle:
            continue
        reason = rule.reason or f"recipe rule {index}, {rule.text}"
        chosen = Annotation(None if wish is None else wish.over(base), "recipe", reason, index)
        used.add(index)
    return chosen, used


def _words(edge: _Edge) -> str:
    return edge.role if edge.key == edge.role else f"{edge.role} {edge.key}"


def check_spec(node: fx.Node, edge: str, spec: QSpec, why: str, target: Target) -> None:
    """Stop at a spec of the recipe that the target refuses.

    Args:
        node: The operation.
        edge: Its edge in words, such as ``input 0``.
        spec: What the recipe asks for, complete.
        why: The reason that the recipe's rule gives.
        target: What the graph is prepared for.

    Raises:
        RecipeError: The target refuses it.
    """
    refusal = next((r for r in target.refuses if r.meets(spec)), None)
    if refusal is not None:
        raise error_at(
            RecipeError,
            f"{refusal.rule}: {edge} of {node.name} is to be {spec} ({why}), "
            f"which target {target.name} refuses: {refusal.reason}",
            node,
            refusal.fix,
        )


def _with_axis(node: fx.Node, edge: _Edge, spec: QSpec, placement: OpPlacement | None) -> QSpec:
    """The spec with its per-channel axis filled in (R16), counted from the front."""
    if not isinstance(spec.granularity, PerChannel):
        return spec
    source = node if edge.key == "output" else node.args[edge.key]  # type: ignore[index]
    info = tensor_info(source)  # type: ignore[arg-type]
    rank = len(info.shape) if info is not None else 0
    axis = spec.granularity.axis
    if axis is None and edge.role != "weight":
        raise error_at(
            RecipeError,
            f"{edge.role} {edge.key} of {node.name} is to be quantized per channel without an axis",
            node,
            "give PerChannel(axis=...), or per-tensor, which TensorRT wants for activations (R32)",
        )
    if axis is not None and not -rank <= axis < rank:
        raise error_at(
            RecipeError,
            f"{edge.role} {edge.key} of {node.name} has {rank} dimensions and no axis {axis}",
            node,
            "give PerChannel() for the output channels of the operation",
        )
    if axis is None:
        axis = _output_channels(node, edge, rank, placement)
        if axis is not None and not -rank <= axis < rank:
            raise error_at(
                TargetError,
                f"the target's weight_axis for {kind_name(node)} is {axis}, and the weight has {rank} dimensions",
                node,
                f"give an axis from 0 to {rank - 1}, or none for one scale",
            )
    return replace(spec, granularity=PerTensor() if axis is None else PerChannel(axis % rank))


def _output_channels(node: fx.Node, edge: _Edge, rank: int, placement: OpPlacement | None) -> int | None:
    """The weight's axis of output channels (R16); None where there is no single such axis."""
    if kind_name(node) == "matmul":
        return 1 if edge.key == 1 and rank == 2 else None
    if placement is None or rank < 2:
        return None
    grouped = node.kwargs.get("groups", 1) != 1
    return None if grouped and placement.grouped_per_tensor else placement.weight_axis


def _advise_half(editor: Editor, node: fx.Node) -> None:
    """Note an operation of which a recipe quantizes one edge and leaves another float."""
    low = {edge: a.spec is not None for edge, a in edge_annotations(node).items() if edge != "output"}
    if len(set(low.values())) == 2:
        names = ", ".join(str(node.args[edge]) for edge, yes in low.items() if not yes)  # type: ignore[index]
        editor.note(node, "R20", f"it reads {names} in float, so it does not run in low precision", kind="advice")
