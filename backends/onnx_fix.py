"""Mending a quantized ONNX file: the fixes of its findings, applied until none is left that a machine can mend."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ExportError, FxqError
from ..findings import Findings
from .files import check_target, write_whole
from .onnx_edit import OnnxEdit
from .onnx_files import write_model
from .onnx_fixes import EXACT, Fix
from .onnx_fixes_rounding import ROUNDING
from .onnx_graph import OnnxGraph
from .onnx_lint import lint_onnx
from .onnx_nodes import graphs_inside, nodes_of_graph
from .onnx_values import read_model

if TYPE_CHECKING:
    import onnx

__all__ = ["Change", "Fixed", "fix_model", "fix_onnx"]

MOST_ROUNDS: Final = 64


@dataclass(frozen=True)
class Change:
    """A change that was made.

    Attributes:
        rule: The rule that was broken.
        node: Name of the node where it was.
        what: What was done, without the node's name.
        exact: Whether every number stays as it was.
    """

    rule: str
    node: str
    what: str
    exact: bool

    def __str__(self) -> str:
        return f"{self.rule} {self.node}: {self.what}{'' if self.exact else ' (other rounding)'}"


@dataclass(frozen=True)
class Fixed:
    """A mended file.

    Attributes:
        path: The file that was written; None if nothing was, because nothing had to be changed in place.
        changes: What was changed, in order.
        left: What the linter finds in the result.
    """

    path: Path | None
    changes: tuple[Change, ...]
    left: Findings

    def __str__(self) -> str:
        parts = ["\n".join(f"fixed: {change}" for change in self.changes)] if self.changes else ["nothing to fix"]
        parts += [f"left: {self.left}" if self.left else "left: no findings"]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Changes and what is left, as plain data ready for JSON."""
        changes = [{"rule": c.rule, "node": c.node, "what": c.what, "exact": c.exact} for c in self.changes]
        path = None if self.path is None else os.fspath(self.path)
        return {"path": path, "changes": changes, "left": self.left.to_dict()}


def fix_onnx(
    path: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    *,
    in_place: bool = False,
    rounding: bool = False,
    rules: Collection[str] | None = None,
) -> Fixed:
    """Mend what the linter finds in an ONNX file, as far as a machine can.

    The result is checked in full by ONNX and linted before it is written. Weights that lay in a file beside the model
    are stored inside, or beyond 2 GB in a new file beside it. The nodes of the file's own functions become nodes of its
    graph where anything is changed.

    Args:
        path: The file, from any tool.
        output: Where to write; None (default) is the file's name with ``.fixed`` before its suffix. Written whole or
            not at all, also where nothing was to be changed.
        in_place: Replace the file itself; it is not touched if nothing is to be changed.
        rounding: Also make the changes after which the outputs differ slightly, since a rounding goes or comes.
        rules: Ids of the rules whose findings to mend; None (default) takes all.

    Returns:
        What was changed, and the findings that are left.

    Raises:
        FxqError: There is no such file, it holds no ONNX model, or two outputs are asked for.
        ExportError: ONNX's checker refuses the file; nothing is written.
    """
    source = Path(path)
    if in_place and output is not None:
        raise FxqError("in_place and an output are two places", hint="give one of them")
    target = source if in_place else Path(output or source.with_name(f"{source.stem}.fixed{source.suffix}"))
    if not in_place and _same_file(source, target):
        raise FxqError(f"{target} is the file that is to be fixed", hint="ask for in_place (--in-place)")
    check_target(target)
    model, beside = _whole_model(source)
    changes = fix_model(model, rounding=rounding, rules=rules)
    left = lint_onnx(model if changes else source)
    if changes or (beside and not in_place):
        _write_checked(model, source, target)
    elif not in_place:
        write_whole(target, source.read_bytes())
    return Fixed(target if changes or not in_place else None, changes, left)


def fix_model(
    model: onnx.ModelProto, *, rounding: bool = False, rules: Collection[str] | None = None
) -> tuple[Change, ...]:
    """As :func:`fix_onnx` for a model in memory, which is changed in place; its own functions have to be inlined."""
    changes: list[Change] = []
    for _ in range(MOST_ROUNDS + len(model.graph.node)):  # a pair passes one Relu in each
        chosen = _next(model, rounding, rules)
        if not chosen:
            return tuple(changes)
        edit = OnnxEdit(model)
        for fix, change in chosen:
            fix.apply(edit)
            changes.append(change)
        edit.finish()
    names = ", ".join(f"{rule} ({count})" for rule, count in Counter(c.rule for c in changes).items())
    raise FxqError(f"the fixes undo each other: {names}", hint="report this file; nothing was written")


def _next(model: onnx.ModelProto, rounding: bool, rules: Collection[str] | None) -> list[tuple[Fix, Change]]:
    """The fixes of the first kind that has any for what the linter finds."""
    graph = OnnxGraph(model)
    wanted = {(finding.rule, finding.node) for finding in lint_onnx(model, rules=rules)}
    for planners, exact in ((EXACT, True), (ROUNDING if rounding else (), False)):
        for planner in planners:
            found = [(fix, [key for key in product(fix.rules, fix.nodes) if key in wanted]) for fix in planner(graph)]
            if chosen := [(fix, Change(*keys[0], fix.what, exact)) for fix, keys in found if keys]:
                return chosen
    return []


def _same_file(first: Path, second: Path) -> bool:
    return second.exists() and first.exists() and first.samefile(second)


def _whole_model(path: Path) -> tuple[onnx.ModelProto, bool]:
    """The model with all its weights and without functions of its own, and whether weights lay beside the file."""
    import onnx

    model, folder = read_model(path)
    beside = _any_beside(model.graph)
    try:
        onnx.external_data_helper.load_external_data_for_model(model, folder)
    except (OSError, onnx.checker.ValidationError) as error:
        raise FxqError(
            f"cannot read the weights beside {path.name}: {error}", hint="keep a model and its data in one folder"
        ) from error
    return model, beside


def _any_beside(graph: onnx.GraphProto) -> bool:
    """Whether values of a graph, or of one inside its nodes, lie in a file beside the model."""
    from onnx.external_data_helper import uses_external_data

    held = [*graph.initializer, *(attribute.t for node in graph.node for attribute in node.attribute)]
    inner = (sub for node in nodes_of_graph(graph) for sub in graphs_inside(node))
    return any(map(uses_external_data, held)) or any(map(_any_beside, inner))


def _write_checked(model: onnx.ModelProto, source: Path, target: Path) -> None:
    try:
        write_model(model, target)
    except ExportError as error:
        raise ExportError(
            f"nothing is written, ONNX's checker refuses the fixed file: {error.message}",
            hint=f"see whether onnx.checker.check_model takes {source.name} itself",
        ) from error
