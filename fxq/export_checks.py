"""What :func:`fxq.export` asks of a graph before it is written, and says of the file afterwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import fx

from .errors import ExportError, RecipeError
from .graph import edge_annotations, error_at, origin, state, tensor_info
from .passes.annotate import matches
from .qdq import QUANTIZE
from .recipe import Match, Rule

__all__ = ["check_exportable", "islands_of", "warn_of_types"]

_LOG: Final = logging.getLogger(__name__)
_TYPE_RULES: Final = frozenset({"R9", "R10", "R12", "R13"})
_NAMED: Final = 3


def check_exportable(gm: fx.GraphModule) -> None:
    """Raise if `gm` has observers still, or quantizes what is not float32.

    Raises:
        ExportError: The first quantizer at fault is named.
    """
    held = state(gm)
    if "observed" in held.properties and "quantized" not in held.properties:
        raise ExportError("this graph has observers, not quantizers", hint="run fxq.convert(prepared) first")
    for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE):
        info = tensor_info(node.all_input_nodes[0])
        if info is not None and info.dtype is not torch.float32:
            raise error_at(
                ExportError,
                f"the graph computes in {str(info.dtype).removeprefix('torch.')}; Q/DQ files are written in float32",
                node,
                "prepare model.float(), and name the type here: "
                'fxq.export(..., compute_dtype="fp16" or "bf16") writes it into the file',
            )


def islands_of(gm: fx.GraphModule, wanted: Sequence[Match]) -> dict[str, str]:
    """Names of the nodes that the user wants in float32, with the reason.

    Args:
        gm: The converted graph.
        wanted: Matches as in :class:`fxq.Rule`.

    Raises:
        RecipeError: `wanted` is no list, or one of it matches no operation.
    """
    if isinstance(wanted, str | type) or callable(wanted):
        raise RecipeError(f"islands={wanted!r} is no list", hint="write islands=[...]")
    found: dict[str, str] = {}
    for match in wanted:
        rule = Rule(match, None)
        names = [node.name for node in gm.graph.nodes if node.op.startswith("call_") and matches(rule, node)]
        if not names:
            paths = sorted({path for node in gm.graph.nodes if (path := origin(node).module_path)})
            raise RecipeError(
                f"the island {rule.text} matches no operation", hint=f"module paths here: {', '.join(paths[:12])}"
            )
        found.update(dict.fromkeys(names, f"islands names {rule.text}"))
    return found


def warn_of_types(gm: fx.GraphModule, path: Path) -> None:
    """Log which tensors of a file are in types that TensorRT does not run there: what is quantized for study.

    Args:
        gm: The converted graph.
        path: The file that was written of it.
    """
    from .backends.onnx_lint import lint_onnx

    specs = (a.spec for node in gm.graph.nodes for a in edge_annotations(node).values() if a.spec is not None)
    if {spec.qdtype.name for spec in specs} <= {"int8"}:
        return
    found = [finding for finding in lint_onnx(path) if finding.rule in _TYPE_RULES]
    if found:
        rules = ", ".join(sorted({finding.rule for finding in found}))
        named = "; ".join(f"{finding.node}: {finding.message} ({finding.rule})" for finding in found[:_NAMED])
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        _LOG.warning("%s holds what TensorRT cannot run, by %s: %s%s", path.name, rules, named, more)
