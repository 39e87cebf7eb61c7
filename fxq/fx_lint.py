"""TensorRT's rules for explicit quantization, checked on an FX graph: prepared, in training or converted.

The checks see what a graph shows whatever placed its quantizers, so they also find what a recipe or an edit by hand
did. They say the same of a prepared graph and of the graph that it is converted to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import fx

from .checks import check, checks, run_checks
from .errors import FxqError
from .findings import Finding, Findings, Severity
from .graph import constant, origin, tensor_info
from .ops import kind_name
from .passes.annotate import SUMS
from .placement import behind_norm, read_tensor
from .qdq import QUANTIZE
from .qparams import SMALLEST_NORMAL
from .quantized_graph import Quantization, QuantizedGraph
from .rules import RULES
from .target import Target
from .verify import is_dequantized, quantizer_of

__all__ = ["lint_graph"]

TYPES: Final = frozenset({"int8", "int4", "float8_e4m3fn"})
"""What TensorRT quantizes to (R10)."""
WEIGHT_ONLY: Final = frozenset({"int4"})
"""Types of weights whose operation reads its input in float (R12)."""
_AFFINE: Final = frozenset(("add", "sub", "mul", "div"))
_NAMED: Final = 8


def lint_graph(gm: fx.GraphModule) -> Findings:
    """Check the rules of :data:`fxq.rules.RULES` that an FX graph can show.

    R9 (zero points, scales that are not positive), R10 (types), R11 (scales of another length than their axis, and
    those that no calibration has found yet), R20 (weighted operations with one quantized input), R23 (residual
    additions), R27 (scales of a concatenation) and R29 (two quantizers on one activation).

    Args:
        gm: A prepared, trained or converted graph. It is not changed, and nothing is run.

    Returns:
        The findings in the order of the graph's nodes, each with module path and source line; empty if there are none.

    Raises:
        PassError: The GraphModule does not come from fxq.
        FxqError: Nothing is placed in it yet, or there are no checks of graphs for its target's rules.
    """
    graph = QuantizedGraph(gm)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    family = graph.target.rules
    known = [rule for one in checks("fx") for rule in one.rules if RULES[rule].family == family]
    if not known:
        raise FxqError(
            f"there are no checks of graphs by the rules {family} of target {graph.target.name}",
            hint="convert and export it, and lint the file",
        )
    found = run_checks("fx", graph, rules=known)
    return Findings(tuple(sorted(found, key=lambda f: (order.get(f.node or "", -1), list(RULES).index(f.rule)))))


def _finding(rule: str, severity: Severity, node: fx.Node, message: str, fix: str = "") -> Finding:
    where = origin(node)
    return Finding(
        rule, severity, node.name, message, fix=fix, module_path=where.module_path or None, source=where.source
    )


@check("fx", "R9")
def symmetric(graph: QuantizedGraph) -> Iterator[Finding]:
    """Zero points that are not 0."""
    for one in graph.by_node.values():
        if one.zero_point is None and not one.symmetric:
            yield _finding("R9", "error", one.tensor, f"{one.tensor.name} is to be quantized asymmetrically")
        elif one.zero_point is not None and bool(one.zero_point.any()):
            low, high = int(one.zero_point.min()), int(one.zero_point.max())
            shown = f"{low}" if low == high else f"{low} to {high}"
            yield _finding("R9", "error", one.tensor, f"the zero point of {one.tensor.name} is {shown}, not 0")


@check("fx", "R9")
def positive_scales(graph: QuantizedGraph) -> Iterator[Finding]:
    """Scales that are zero, negative, infinite, NaN or subnormal."""
    for one in graph.by_node.values():
        if one.scale is None:
            continue
        bad = one.scale[~(one.scale.isfinite() & (one.scale > 0))]
        small = one.scale[(one.scale > 0) & (one.scale < SMALLEST_NORMAL)]
        which = f"of the {one.scale.numel()} scales of {one.tensor.name}"
        if bad.numel():
            text = f"{bad.numel()} {which} not positive and finite: {float(bad.flatten()[0]):.6g}"
            yield _finding("R9", "error", one.tensor, text)
        elif small.numel():
            text = f"{small.numel()} {which} subnormal: {float(small.flatten()[0]):.6g}"
            yield _finding("R9", "warning", one.tensor, text)


@check("fx", "R10")
def quantized_types(graph: QuantizedGraph) -> Iterator[Finding]:
    """Types that TensorRT does not quantize to."""
    for one in graph.by_node.values():
        if one.dtype not in TYPES:
            yield _finding("R10", "error", one.tensor, f"{one.tensor.name} is quantized to {one.dtype}")


@check("fx", "R11")
def known_scales(graph: QuantizedGraph) -> Iterator[Finding]:
    """Scales of another length than their axis, and activations' scales that are not known."""
    unknown = [one for one in graph.by_node.values() if one.scale is None and not one.weight]
    if unknown:
        names = ", ".join(one.tensor.name for one in unknown[:_NAMED]) + (", …" if len(unknown) > _NAMED else "")
        plural = "s have" if len(unknown) > 1 else " has"
        message = f"{len(unknown)} quantizer{plural} no scale yet: {names}"
        fix = "Run fxq.calibrate on inputs that reach them."
        yield _finding("R11", "advice", unknown[0].tensor, message, fix)
    for one in graph.by_node.values():
        info = tensor_info(one.tensor)
        if one.scale is None or info is None:
            continue
        wanted = 1 if one.axis is None else info.shape[one.axis]
        if one.scale.numel() != wanted:
            text = f"{one.scale.numel()} scales for {one.tensor.name}, which wants {wanted}"
            yield _finding("R11", "error", one.tensor, text)


@check("fx", "R20")
def both_inputs(graph: QuantizedGraph) -> Iterator[Finding]:
    """Weighted operations with one quantized input, or with two in different types."""
    for node in graph.nodes:
        if kind_name(node) not in graph.target.weighted or not all(isinstance(a, fx.Node) for a in node.args[:2]):
            continue
        first, second = (graph.read(a) for a in node.args[:2])
        types = {one.dtype for one in (*first, *second) if one is not None}
        if None not in first and None not in second:
            if len(types) > 1:
                text = f"the inputs have different types: {', '.join(sorted(types))}"
                yield _finding("R20", "error", node, text)
        elif (None in first) != (None in second) and not (None in first and types <= WEIGHT_ONLY):
            one, other = node.args[:2] if None in second else reversed(node.args[:2])
            text = f"{_name(one)} is quantized and {_name(other)} is float"
            yield _finding("R20", "warning", node, text)


def _name(read: Any) -> str:
    return read_tensor(read).name


@check("fx", "R23")
def residual_edges(graph: QuantizedGraph) -> Iterator[Finding]:
    """Residual additions of a quantized convolution with both edges quantized, none, or the convolution's own.

    Where both edges end in convolutions, either may be the skip.
    """
    for add in graph.nodes:
        if kind_name(add) not in SUMS or not _residual(graph, add):
            continue
        ends = [_convolution(a, graph.target) for a in add.args[:2]]
        low = [end is not None and all(map(graph.quantized, end.args[:2])) for end in ends]
        kept = [graph.quantized(a) for a in add.args[:2]]
        if not any(low):
            continue  # a float convolution takes a float addition along
        conv = low.index(True)
        edge, skip = (_name(add.args[i]) for i in (conv, 1 - conv))
        if all(kept):
            text = f"both inputs are quantized; {edge} from {ends[conv]} should stay float"
            yield _finding("R23", "warning", add, text)
        elif not any(kept) and (None in ends or all(low)):
            text = f"no input is quantized; the skip {skip} should be"
            yield _finding("R23", "warning", add, text)
        elif kept[conv] and None in ends:
            text = f"the convolution's edge {edge} from {ends[conv]} is quantized instead of the skip {skip}"
            yield _finding("R23", "warning", add, text)


def _residual(graph: QuantizedGraph, add: fx.Node) -> bool:
    """Whether an addition joins two ways from one tensor, without broadcasting."""
    if not all(isinstance(a, fx.Node) for a in add.args[:2]):
        return False
    one, other = (read_tensor(a) for a in add.args[:2])
    info = tensor_info(one)
    if one is other or constant(one) is not None or constant(other) is not None or info is None:
        return False
    return info == tensor_info(other) and bool(graph.origins[one] & graph.origins[other])


def _convolution(read: Any, target: Target) -> fx.Node | None:
    """The convolution that takes an addition along: behind its edge, or in front of what is folded into it (R44)."""
    node = read
    while isinstance(node, fx.Node) and len(node.users) == 1:
        kind = kind_name(node)
        if kind in target.residual.weighted:
            return node
        moving = [a for a in node.args[:2] if isinstance(a, fx.Node) and constant(a) is None]
        inner = behind_norm(node)
        if inner is not node:
            node = inner
        elif quantizer_of(node) is not None or is_dequantized(node) or node.target is QUANTIZE:
            node = node.args[0]
        elif kind in _AFFINE and len(moving) == 1:
            node = moving[0]
        else:
            return None
    return None


@check("fx", "R27")
def concat_scales(graph: QuantizedGraph) -> Iterator[Finding]:
    """Concatenations whose quantized inputs and output have different scales.

    With a quantizer behind it, which TensorRT moves in front, an input that others read quantized counts too.
    """
    for node in graph.nodes:
        if kind_name(node) != "cat" or not isinstance(node.args[0], (list, tuple)):
            continue
        behind = next(graph.readers(node), None)
        read = [(a, one) for a in node.args[0] for one in graph.read(a)]
        inputs = [(a, one or graph.elsewhere(a)) for a, one in read] if behind else read
        quantized = [(a, one) for a, one in inputs if one is not None]
        if all(one.weight for _, one in quantized):
            continue
        wanted = behind or (quantized[0][1] if len(quantized) == len(inputs) else None)
        odd = [(a, one) for a, one in quantized if wanted is not None and not one.same(wanted)]
        if wanted is not None and odd:
            found = ", ".join(f"{_name(a)} ({one.text})" for a, one in odd)
            text = f"{wanted.tensor.name} has {wanted.text}, and {found} {'differ' if len(odd) > 1 else 'differs'}"
            yield _finding("R27", "warning", node, text)


@check("fx", "R29")
def one_quantizer(graph: QuantizedGraph) -> Iterator[Finding]:
    """Activations with several quantizers."""
    tensors: dict[fx.Node, list[Quantization]] = {}
    for one in graph.by_node.values():
        if not one.weight:
            tensors.setdefault(one.tensor, []).append(one)
    for tensor, (first, *others) in tensors.items():
        different = next((one for one in others if not one.same(first)), None)
        if different is not None:
            text = f"a second quantizer of {tensor.name}: {first.text} and {different.text}"
            yield _finding("R29", "warning", tensor, text)
        elif others:
            count = f"{len(others) + 1} quantizers" if len(others) > 1 else "a second quantizer"
            yield _finding("R29", "advice", tensor, f"{count} of {tensor.name} with one scale")
