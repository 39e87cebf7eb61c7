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
from typing import Any, Final

from torch import fx

from .errors import PassError, RecipeError
from .graph import Note, origin, state
from .ops import kind_name, named
from .passed_over import expected_edges, is_quantization, passed_over
from .placement import EdgeRow, edge_rows, read_tensor
from .recipe import Rule
from .reports import stage_of, warnings_of
from .target import Target

__all__ = ["EdgeReason", "Explanation", "explain"]

_WIDTH: Final = 120
_SHOWN: Final = 12


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
    nodes = [n for n in gm.graph.nodes if n.op.startswith("call_") and not is_quantization(n)]
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


def _of_node(gm: fx.GraphModule, node: fx.Node, target: Target, notes: list[Note]) -> Iterator[EdgeReason]:
    """What placement decided on the edges of `node`, and what it passed over."""
    decided = {row.edge: row for row in edge_rows(gm, node)}
    for key, read in expected_edges(gm, node, target):
        tensor = read_tensor(read)
        stored = _stored(gm, tensor, target) if kind_name(node) in target.norms.kinds else None
        if key not in decided and stored is not None:
            reason = f"the kernel of {stored.tensor} writes INT8, and this operation reads it: it gives INT8 itself"
            yield _reason(node, dataclasses.replace(stored, edge=key, role="input", tensor=tensor.name, reason=reason))
        elif key not in decided:
            rule, reason, miss = passed_over(node, tensor, target, notes)
            yield _reason(node, _float_row(key, tensor, rule, reason), miss)
        else:
            yield _reason(node, decided.pop(key))
    for row in decided.values():
        yield _reason(node, row)


def _stored(gm: fx.GraphModule, tensor: fx.Node, target: Target) -> EdgeRow | None:
    """The result that a tensor is, or only moves, if it is quantized for the normalization behind it (R38)."""
    here = tensor
    while kind_name(here) in target.ties and here.args and isinstance(here.args[0], fx.Node):
        here = read_tensor(here.args[0])
    if kind_name(here) not in target.norms.behind:
        return None
    return next(
        (row for row in edge_rows(gm, here) if row.edge == "output" and row.quantized and row.rule == "R38"), None
    )


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
