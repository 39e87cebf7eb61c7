"""Why each edge is quantized or float: the rule and a sentence, edge by edge.

What placement decided is read from the annotations. Edges that it passed over, and that a reader would expect to
find quantized, are explained here, from the same rules and from what the graph is around them.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, TypeGuard

from torch import fx

from .errors import PassError, RecipeError
from .graph import Note, edge_annotations, origin, state, tensor_info
from .ops import kind_name, named, products
from .placement import SKIP_RULES, EdgeRow, behind_norm, edge_rows, hidden_products, read_tensor
from .qdq import QUANTIZE
from .recipe import Rule
from .reports import stage_of, warnings_of
from .target import Target
from .verify import is_dequantized, quantizer_of

__all__ = ["EdgeReason", "Explanation", "explain"]

_WIDTH: Final = 120
_SHOWN: Final = 12
_REACH: Final = 4
"""How many operations a nearest miss looks back from an addition."""
_ACTIVATIONS: Final = frozenset(
    (
        *("relu", "relu6", "hardtanh", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
        *("sigmoid", "tanh", "hardsigmoid", "hardswish", "softplus", "softsign", "logsigmoid", "clamp"),
    )
)
_NORMS: Final = frozenset(("softmax", "log_softmax", "layer_norm", "group_norm", "instance_norm", "batch_norm"))
_CHOOSING: Final = frozenset(("max_pool1d", "max_pool2d", "max_pool3d", "cat", "stack")) | frozenset(
    f"adaptive_max_pool{n}d" for n in (1, 2, 3)
)
_POOLS: Final = frozenset(f"{pool}{n}d" for pool in ("avg_pool", "adaptive_avg_pool") for n in (1, 2, 3))
_GAINING: Final = _POOLS | {"interpolate", "upsample", "mul", "mean"}


@dataclass(frozen=True)
class EdgeReason:
    """One edge and why it is as it is.

    Attributes:
        node: The operation that reads the edge (or, for ``output``, gives it).
        kind: Its op kind.
        module_path: The user's module.
        source: The user's ``file:line``.
        edge: Argument index, ``0[1]`` for an item of a list, or ``output``.
        role: ``input``, ``weight``, ``skip`` or ``output``.
        tensor: The tensor on the edge.
        quantized: Whether it goes through a quantizer.
        spec: The spec as text; ``float`` without one.
        scale: The scale, or the largest of several; None while unknown.
        rule: Id of the rule that decided, or ``recipe``.
        reason: Its sentence.
        nearest_miss: For an addition that stays float: what would have fused, and what it lacked.
    """

    node: str
    kind: str
    module_path: str
    source: str | None
    edge: int | str
    role: str
    tensor: str
    quantized: bool
    spec: str
    scale: float | None
    rule: str
    reason: str
    nearest_miss: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What :func:`fxq.explain` returns; print it.

    Attributes:
        edges: In graph order.
        stage: ``prepared``, ``calibrated`` or ``quantized``.
        target: Name of the target.
        where: The pattern that was asked for.
        warnings: What makes the numbers unfit for use, such as calibration on random data.
    """

    edges: tuple[EdgeReason, ...]
    stage: str
    target: str
    where: str = "*"
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[EdgeReason]:
        return iter(self.edges)

    def __len__(self) -> int:
        return len(self.edges)

    def to_dict(self) -> dict[str, Any]:
        """The whole explanation as plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def text(self, width: int = _WIDTH) -> str:
        """The explanation for people, in lines of at most `width` columns."""
        low = sum(edge.quantized for edge in self.edges)
        only = "" if self.where == "*" else f" under {self.where}"
        lines = [f"{self.stage} for {self.target}: {low} of {len(self.edges)} edges{only} are quantized"]
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        for node, edges in groupby(self.edges, lambda edge: edge.node):
            group = list(edges)
            place = ", ".join(text for text in (group[0].module_path, group[0].source) if text and text != node)
            lines += ["", f"{node}: {group[0].kind}" + (f" ({place})" if place else "")]
            for edge in group:
                lines += _lines(edge, width)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _lines(edge: EdgeReason, width: int) -> Iterator[str]:
    scale = "" if edge.scale is None else f", scale {edge.scale:.4g}"
    yield f"  {edge.role} {edge.tensor}: {edge.spec}{scale}"
    for start, text in ((edge.rule, edge.reason), ("nearest miss", edge.nearest_miss)):
        if text:
            head = f"    {start}: "
            yield from textwrap.wrap(head + text, width, subsequent_indent="      ", break_long_words=False)


def explain(gm: fx.GraphModule, where: str = "*") -> Explanation:
    """Why each edge is quantized or float: rule, sentence, and what a float residual addition lacked.

    Where :func:`fxq.report` sums a graph up, this goes edge by edge: all that have a quantizer, and all that a reader
    would expect to have one (inputs of convolutions, matrix products, additions, concatenations, pools,
    multiplications, norms and activations).

    Args:
        gm: A prepared, trained or converted graph.
        where: A pattern as in a recipe rule: ``"layer1.*"``, ``"re:layer[12]"``, ``"op:add"``.

    Returns:
        The edges in graph order; print it, or take ``to_dict()``.

    Raises:
        PassError: Nothing is placed in the graph yet: it was traced and no more.
        RecipeError: Nothing in the graph matches `where`, or it is no pattern.
    """
    held = state(gm)
    if "annotated" not in held.properties:
        raise PassError("nothing is placed in this graph yet", hint="explain what fxq.prepare returned")
    where = str(Rule(where, None).match)  # a rule says what is wrong with a pattern
    nodes = [n for n in gm.graph.nodes if n.op.startswith("call_") and not _is_quantization(n)]
    chosen = [n for n in nodes if named(n, where)]
    if not chosen:
        paths = list(dict.fromkeys(path for n in nodes if (path := origin(n).module_path)))
        more = " …" if len(paths) > _SHOWN else ""
        raise RecipeError(f"no operation matches {where!r}", hint=f"modules: {', '.join(paths[:_SHOWN])}{more}")
    notes: dict[str, list[Note]] = {}
    for note in held.notes:
        notes.setdefault(note.node, []).append(note)
    edges = tuple(edge for n in chosen for edge in _of_node(gm, n, held.target, notes.get(n.name, [])))
    return Explanation(edges, stage_of(gm), held.target.name, where, warnings_of(gm))


def _is_quantization(node: fx.Node) -> bool:
    return quantizer_of(node) is not None or is_dequantized(node) or node.target is QUANTIZE


def _of_node(gm: fx.GraphModule, node: fx.Node, target: Target, notes: list[Note]) -> Iterator[EdgeReason]:
    """What placement decided on the edges of `node`, and what it passed over."""
    decided = {row.edge: row for row in edge_rows(gm, node)}
    for key, read in _expected(gm, node, target):
        if key not in decided:
            tensor = read_tensor(read)
            rule, reason, miss = _passed_over(node, tensor, target, notes)
            yield _reason(node, _float_row(key, tensor, rule, reason), miss)
        else:
            yield _reason(node, decided.pop(key))
    for row in decided.values():
        yield _reason(node, row)


def _float_row(edge: int | str, tensor: fx.Node, rule: str, reason: str) -> EdgeRow:
    return EdgeRow(
        edge=edge,
        role="input",
        tensor=tensor.name,
        quantized=False,
        spec="float",
        scale=None,
        channels=0,
        readers=0,
        rule=rule,
        reason=reason,
    )


def _reason(node: fx.Node, row: EdgeRow, miss: str | None = None) -> EdgeReason:
    at = origin(node)
    return EdgeReason(
        node=node.name,
        kind=kind_name(node),
        module_path=at.module_path,
        source=at.source,
        edge=row.edge,
        role=row.role,
        tensor=row.tensor,
        quantized=row.quantized,
        spec=row.spec,
        scale=row.scale,
        rule=row.rule,
        reason=row.reason,
        nearest_miss=miss,
    )


def _expected(gm: fx.GraphModule, node: fx.Node, target: Target) -> Iterator[tuple[int | str, fx.Node]]:
    """The edges of `node` of which a reader would ask whether they are quantized."""
    kind = kind_name(node)
    placement = target.ops.get(kind)
    if placement is not None:
        keys = set(placement.arguments)
    elif kind in _ACTIVATIONS | _NORMS | _CHOOSING | _GAINING or hidden_products(gm, node):
        keys = {0}
    elif kind == "add":
        keys = {0, 1}
    else:
        return
    for index, argument in enumerate(node.args):
        if index not in keys and not (index and products(node)) and kind != "mul":
            continue
        if isinstance(argument, list | tuple):
            yield from ((f"{index}[{i}]", part) for i, part in enumerate(argument) if _floats(part))
        elif _floats(argument):
            yield index, argument


def _floats(read: Any) -> TypeGuard[fx.Node]:
    info = tensor_info(read_tensor(read)) if isinstance(read, fx.Node) else None
    return info is not None and info.dtype.is_floating_point and len(info.shape) > 0


def _passed_over(node: fx.Node, tensor: fx.Node, target: Target, notes: list[Note]) -> tuple[str, str, str | None]:
    """Rule, sentence and nearest miss for an edge that placement said nothing of."""
    kind, noted = kind_name(node), next((n for n in notes if n.kind in ("declined", "opaque")), None)
    if kind == "add" and noted is None and any(a.rule in SKIP_RULES for a in edge_annotations(node).values()):
        return "R23", f"{tensor.name} takes the addition into its kernel, whose result is float until it is added", None
    if noted is not None:
        return noted.rule, noted.text, _nearest_miss(node, target) if kind == "add" and noted.rule == "R23" else None
    if kind in target.ops:
        return "R20", "the target or the recipe leaves it float", None
    simple = _simple_reason(kind, node, tensor, target)
    return (*simple, None)


def _simple_reason(kind: str, node: fx.Node, tensor: fx.Node, target: Target) -> tuple[str, str]:
    """Rule and sentence for an operation without weights."""
    maker = behind_norm(tensor)
    if kind in _ACTIVATIONS and kind_name(maker) in target.ops and len(maker.users) == 1:
        return "R44", f"{kind} is computed in the kernel of {maker.name}; a quantizer between them would part them"
    if kind in _ACTIVATIONS and any(a.rule in SKIP_RULES for a in edge_annotations(maker).values()):
        return "R44", f"{kind} is computed in the kernel of the addition before it; what reads its result quantizes it"
    if kind in _CHOOSING:
        rule = "R27" if kind in ("cat", "stack") else "R19"
        reader = _quantized_behind(node, target)
        if reader is not None:
            return rule, f"{kind} only passes values on, so the quantizer behind it, of {reader}, holds before it too"
        return "R26", f"nothing behind this {kind} reads it quantized, and alone it gains nothing"
    if kind in _GAINING:
        return "R39", f"{kind} may gain from INT8 but is not quantized by default (R26); a recipe rule can do it"
    if kind in _ACTIVATIONS | _NORMS:
        return "R38", f"Q/DQ around {kind} for its own sake gain nothing; it runs in floating point"
    return "R26", f"{kind} has no weights: it is quantized on both sides or on none"


def _quantized_behind(node: fx.Node, target: Target) -> str | None:
    """The tensor that is quantized behind `node`, through operations that only pass values on."""
    waiting, seen = [node], {node}
    while waiting:
        here = waiting.pop(0)
        for user in here.users:
            if quantizer_of(user) is not None or user.target is QUANTIZE:
                return here.name
            if user not in seen and kind_name(user) in target.ties:
                seen.add(user)
                waiting.append(user)
    return None


def _nearest_miss(add: fx.Node, target: Target) -> str | None:
    """The weighted operation that came nearest to taking the addition along, and what it lacked."""
    found = [miss for operand in add.args[:2] if (miss := _miss(read_tensor(operand), add, target)) is not None]
    return min(found)[1] if found else None


def _miss(node: Any, add: fx.Node, target: Target) -> tuple[int, str] | None:
    """How many operations lie between `add` and a weighted one before it, and what keeps them apart."""
    between: list[fx.Node] = []
    reader = add
    while isinstance(node, fx.Node) and len(between) <= _REACH:
        others = [user.name for user in node.users if user is not reader and not _is_quantization(user)]
        if kind_name(node) in target.residual.weighted:
            if between:
                apart = ", ".join(f"{n.name} ({kind_name(n)})" for n in reversed(between))
                stands = "stands" if len(between) == 1 else "stand"
                return len(between), f"{node.name} would take it along, but {apart} {stands} between them"
            if others:
                return 0, f"{node.name} would take it along, but {', '.join(others)} also reads its result"
            return None
        if kind_name(node) in target.ops:
            return len(
                between
            ), f"{node.name} comes before it, but is a {kind_name(node)}, which takes no addition along"
        between.append(node)
        moving = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if len(moving) != 1:
            return None
        reader, node = node, moving[0]
        while _is_quantization(node):
            reader, node = node, node.args[0]
    return None
