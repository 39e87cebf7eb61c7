"""A backend's rules for explicit quantization, checked on an ONNX file of any tool."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING

from ..checks import run_checks
from ..errors import FxqError
from ..findings import Finding, Findings, Fixable
from ..rules import FILES, RULES, rank
from . import onnx_check_integers, onnx_check_kernels, onnx_check_numbers, onnx_check_operators, onnx_check_placement
from .onnx_fixes import EXACT, Planner
from .onnx_fixes_rounding import ROUNDING
from .onnx_graph import OnnxGraph
from .onnx_names import RULE_FAMILY

if TYPE_CHECKING:
    import onnx

__all__ = ["lint_onnx"]

ROOMS = (onnx_check_numbers, onnx_check_operators, onnx_check_placement, onnx_check_kernels, onnx_check_integers)
"""The rooms whose checks register when they are imported."""


def lint_onnx(
    model: str | PathLike[str] | bytes | onnx.ModelProto,
    *,
    rules: Collection[str] | None = None,
    family: str | None = None,
) -> Findings:
    """Check the rules of :data:`fxq.rules.RULES` that an ONNX graph can show.

    The graph is read as a backend would: through operations that only move values (R19), through Concat, and
    with weights as integers or as a constant behind a Q. Graphs inside If and Loop are not checked. Nothing
    is run, and weights are not read from disk.

    Args:
        model: A file, a serialized model or a ModelProto, from any tool. It is not changed.
        rules: Ids of the rules to check; None (default) takes all of the family.
        family: Whose rules to check, a key of :data:`fxq.rules.FILES`. None (default) takes those of the target that
            the file was exported for, by its metadata, and TensorRT's (``R``) for a file that does not say.

    Returns:
        The findings in the order of the graph's nodes, each with whether :func:`.onnx_fix.fix_onnx` mends it; empty if
        there are none.

    Raises:
        FxqError: There is no such file, it holds no ONNX model, or a rule or family is not in the table.
    """
    if unknown := set(rules or ()) - RULES.keys():
        raise FxqError(f"no rule {', '.join(sorted(unknown))}", hint=f"the rules are {', '.join(RULES)}")
    graph = OnnxGraph(model)
    if rules is None:
        chosen = family or graph.metadata.get(RULE_FAMILY) or next(iter(FILES))
        if chosen not in FILES:
            raise FxqError(f"there are no rules of family {chosen!r}", hint=f"the families are {', '.join(FILES)}")
        rules = [name for name, rule in RULES.items() if rule.family == chosen]
    order = {node.name: node.index for node in graph.nodes}
    found = sorted(run_checks("onnx", graph, rules=rules), key=lambda f: (order.get(f.node or "", -1), rank(f.rule)))
    return Findings(tuple(_marked(graph, found)))


def _marked(graph: OnnxGraph, found: Sequence[Finding]) -> list[Finding]:
    """The findings with what a machine can mend of them."""
    if not found:
        return []
    exact, rounding = (_mended(graph, planners) for planners in (EXACT, ROUNDING))

    def kind(finding: Finding) -> Fixable:
        key = (finding.rule, finding.node)
        return "exact" if key in exact else "rounding" if key in rounding else ""

    return [replace(finding, fixable=kind(finding)) for finding in found]


def _mended(graph: OnnxGraph, planners: Sequence[Planner]) -> set[tuple[str, str | None]]:
    fixes = [fix for planner in planners for fix in planner(graph)]
    return {(rule, node) for fix in fixes for rule in fix.rules for node in fix.nodes}
