"""What must hold of a graph: fx's own lint, and a table of properties.

A property is a name that passes require and provide (``functional``, ``canonical`` …) with the check that
proves it. The manager verifies after every pass that changed something.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import fx, nn

from .errors import VerifyError
from .graph import attribute, constant, edge_annotations, error_at, state
from .ops import IDENTITY_MODULES, bind, inplace_target, kind, spelling
from .qdq import DEQUANTIZE, QUANTIZE
from .quantizer import Quantizer

__all__ = ["PROPERTIES", "is_dequantized", "is_quantizer", "quantizer_of", "unknown", "verify"]

Problem = tuple[fx.Node, str]
Check = Callable[[fx.GraphModule], Iterator[Problem]]


def quantizer_of(node: fx.Node) -> Quantizer | None:
    """The quantizer that `node` calls; None if it is anything else."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    found = attribute(owner, str(node.target))
    return found if isinstance(found, Quantizer) else None


def is_quantizer(node: fx.Node) -> bool:
    """Whether `node` calls a quantizer."""
    return quantizer_of(node) is not None


def is_dequantized(node: fx.Node) -> bool:
    """Whether `node` gives the real values of quantized ones, in whatever type the model has."""
    source = node.args[0] if node.target is torch.Tensor.to else node
    return isinstance(source, fx.Node) and source.target is DEQUANTIZE


def _functional(gm: fx.GraphModule) -> Iterator[Problem]:
    for node in gm.graph.nodes:
        inplace = inplace_target(node) is not None or node.kwargs.get("inplace") is True
        if inplace or node.target is operator.setitem:
            yield node, "changes a tensor in place"
        if node.kwargs.get("out") is not None:
            yield node, "writes its result into another tensor (out=)"


def _canonical(gm: fx.GraphModule) -> Iterator[Problem]:
    for node in gm.graph.nodes:
        found = spelling(node)
        foreign = found is not None and kind(node) is not found.kind
        if foreign and found is not None and bind(found, node.args, node.kwargs) is not None:
            yield node, f"is not written as {found.kind.name}'s canonical call"
        if node.op == "call_module" and type(attribute(gm, str(node.target))) in IDENTITY_MODULES:
            yield node, "is an identity"


def _annotated(gm: fx.GraphModule) -> Iterator[Problem]:
    for node in gm.graph.nodes:
        for edge, annotation in edge_annotations(node).items():
            if edge != "output" and not (isinstance(edge, int) and 0 <= edge < len(node.args)):
                yield node, f"annotates edge {edge}, which it does not have"
            if not annotation.rule:
                yield node, f"annotates edge {edge} without a rule"
            if annotation.spec is not None and not annotation.spec.complete:
                yield node, f"annotates edge {edge} with a spec that leaves something open"


def _read_float(node: fx.Node, quantized: Callable[[fx.Node], bool]) -> Iterator[Problem]:
    for edge, annotation in edge_annotations(node).items():
        read = _before_dropout(node.args[edge]) if isinstance(edge, int) else None
        if annotation.spec is not None and isinstance(read, fx.Node) and not quantized(read):
            yield node, f"reads {read.name} in float, which its annotation quantizes"


def _before_dropout(read: Any) -> Any:
    """What a graph that trains reads through dropout, which stands behind quantizers and is not deployed."""
    while isinstance(read, fx.Node) and read.op == "call_module" and read.graph.owning_module is not None:
        if not isinstance(attribute(read.graph.owning_module, str(read.target)), nn.modules.dropout._DropoutNd):
            break
        read = read.args[0]
    return read


def _observed(gm: fx.GraphModule) -> Iterator[Problem]:
    seen: set[fx.Node] = set()
    for node in gm.graph.nodes:
        yield from _read_float(node, is_quantizer)
        if not is_quantizer(node):
            continue
        tensor = node.args[0]
        if isinstance(tensor, fx.Node) and is_quantizer(tensor):
            yield node, "quantizes what is quantized already"
        if tensor in seen:
            yield node, "is a second quantizer on one tensor (R29)"
        seen.add(tensor)


def _quantized(gm: fx.GraphModule) -> Iterator[Problem]:
    for node in gm.graph.nodes:
        yield from _read_float(node, is_dequantized)
        if is_quantizer(node):
            yield node, "is an observer left over"
        if node.target is QUANTIZE and any(user.target is not DEQUANTIZE for user in node.users):
            yield node, "feeds something that takes no integers"
        if node.target in (QUANTIZE, DEQUANTIZE):
            scale = constant(node.args[1])
            if scale is None:
                yield node, "has a scale that is computed, not stored (R11)"
            elif not bool(torch.all(scale > 0)):
                yield node, "has a scale that is not positive (R9)"


PROPERTIES: Final[Mapping[str, Check | None]] = {
    "traced": None,
    "functional": _functional,
    "canonical": _canonical,
    "fused": None,
    "annotated": _annotated,
    "observed": _observed,
    "quantized": _quantized,
}
"""Property to the check that proves it. ``traced`` needs no more than fx's lint; ``fused`` holds once
fusion ran, whatever it declined."""


def verify(gm: fx.GraphModule) -> None:
    """Check that `gm` is a legal graph and has every property that its state claims.

    Raises:
        VerifyError: It is not, or has not; the message names the node.
    """
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        lines = str(error).splitlines()  # the graph follows
        raise VerifyError(
            f"the graph is broken: {lines[0]}",
            hint="something changed it outside the Editor, or in the wrong order",
        ) from error
    held = state(gm).properties
    for name, check in PROPERTIES.items():
        if name not in held or check is None or (name == "observed" and "quantized" in held):
            continue
        for node, problem in check(gm):
            raise error_at(VerifyError, f"the graph is not {name}: {node.name} {problem}", node)


def unknown(names: Iterable[str]) -> list[str]:
    """Those of `names` that are no property."""
    return [name for name in names if name not in PROPERTIES]
