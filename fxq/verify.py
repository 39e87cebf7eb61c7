"""What must hold of a graph: fx's own lint, and a table of properties.

A property is a name that passes require and provide (``functional``, ``canonical`` …) with the check that proves it.
The manager verifies after every pass that changed something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import fx

from .errors import VerifyError
from .graph import annotations, attribute, error_at, origin, state
from .ops import IDENTITY_MODULES, bind, inplace_target, kind, spelling
from .qdq import DEQUANTIZE, QUANTIZE
from .quantizer import Quantizer

__all__ = ["PROPERTIES", "is_quantizer", "verify"]

Check = Callable[[fx.GraphModule], Iterator[tuple[fx.Node, str]]]


def _traced(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            try:
                attribute(gm, str(node.target))
            except AttributeError:
                yield node, f"reads {node.target}, which the module does not have"


def _functional(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    for node in gm.graph.nodes:
        if inplace_target(node) is not None or node.kwargs.get("inplace") is True:
            yield node, "changes a tensor in place"


def _canonical(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    for node in gm.graph.nodes:
        found = spelling(node)
        if (
            found is not None
            and kind(node) is not found.kind
            and bind(found, node.args, node.kwargs) is not None
        ):
            yield node, f"is not written as {found.kind.name}'s canonical call"
        if node.op == "call_module" and type(attribute(gm, str(node.target))) in IDENTITY_MODULES:
            yield node, "is an identity"


def _annotated(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    for node in gm.graph.nodes:
        for edge, annotation in annotations(node).items():
            if edge != "output" and (not isinstance(edge, int) or edge >= len(node.args)):
                yield node, f"annotates edge {edge}, which it does not have"
            if not annotation.rule:
                yield node, f"annotates edge {edge} without a rule"


def is_quantizer(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    return (
        node.op == "call_module"
        and owner is not None
        and isinstance(attribute(owner, str(node.target)), Quantizer)
    )


def _observed(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    seen: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if not is_quantizer(node):
            continue
        tensor = node.args[0]
        if isinstance(tensor, fx.Node) and is_quantizer(tensor):
            yield node, "quantizes what is quantized already"
        if tensor in seen:
            yield node, "is a second quantizer on one tensor (R29)"
        seen.add(tensor)


def _quantized(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    for node in gm.graph.nodes:
        if is_quantizer(node):
            yield node, "is an observer left over"
        if node.target is QUANTIZE and any(user.target is not DEQUANTIZE for user in node.users):
            yield node, "feeds something that takes no integers"
        if node.target in (QUANTIZE, DEQUANTIZE):
            scale = attribute(gm, str(node.args[1].target))
            if not bool(torch.all(scale > 0)):
                yield node, "has a scale that is not positive (R9)"


PROPERTIES: Final[Mapping[str, Check | None]] = {
    "traced": _traced,
    "functional": _functional,
    "canonical": _canonical,
    "fused": None,
    "annotated": _annotated,
    "observed": _observed,
    "quantized": _quantized,
}
"""Property to the check that proves it; ``fused`` holds once fusion ran, whatever it declined."""


def verify(gm: fx.GraphModule) -> None:
    """Check that `gm` is a legal graph and has every property that its state claims.

    Raises:
        VerifyError: It is not, or has not; the message names the node.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerifyError(
            f"the graph is broken: {error}", hint="the last pass changed it outside the Editor"
        ) from error
    held = state(gm).properties
    for name in PROPERTIES:
        check = PROPERTIES[name]
        if name not in held or check is None or (name == "observed" and "quantized" in held):
            continue
        for node, problem in check(gm):
            raise error_at(VerifyError, f"the graph is not {name}: {node.name} {problem}", node)


def unknown(names: Any) -> list[str]:
    """Those of `names` that are no property."""
    return [name for name in names if name not in PROPERTIES]
