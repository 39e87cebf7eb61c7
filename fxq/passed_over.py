"""Why an edge stays float that placement said nothing of, and which edges a reader would ask about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeGuard

from torch import fx

from .graph import Note, edge_annotations, tensor_info
from .ops import PRODUCT_KINDS, kind_name, products
from .placement import FUSED_RULES, behind_norm, hidden_products, read_tensor
from .qdq import QUANTIZE
from .target import Target
from .verify import is_dequantized, quantizer_of

__all__ = ["expected_edges", "is_quantization", "passed_over"]

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


def is_quantization(node: fx.Node) -> bool:
    """Whether a node quantizes, or dequantizes, instead of computing something of the model."""
    return quantizer_of(node) is not None or is_dequantized(node) or node.target is QUANTIZE


def expected_edges(gm: fx.GraphModule, node: fx.Node, target: Target) -> Iterator[tuple[int | str, fx.Node]]:
    """The edges of `node` of which a reader would ask whether they are quantized.

    Args:
        gm: A graph in which quantizers are placed.
        node: An operation of it.
        target: What its quantizers were placed for.

    Yields:
        Argument index, or ``0[1]`` for an item of a list, and what is read there.
    """
    kind = kind_name(node)
    placement = target.ops.get(kind)
    if placement is not None:
        keys = set(placement.arguments)
    elif kind in _ACTIVATIONS | _NORMS | _CHOOSING | _GAINING or hidden_products(gm, node):
        keys = {0}
    elif kind == "add" or kind in PRODUCT_KINDS:
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


def passed_over(node: fx.Node, tensor: fx.Node, target: Target, notes: list[Note]) -> tuple[str, str, str | None]:
    """Rule, sentence and nearest miss for an edge that placement said nothing of.

    Args:
        node: The operation that reads the edge.
        tensor: The tensor on it.
        target: What the graph's quantizers were placed for.
        notes: The graph's notes on `node`.

    Returns:
        The rule's id, the sentence, and for a residual addition what would have fused and what it lacked.
    """
    kind, noted = kind_name(node), next((n for n in notes if n.kind in ("declined", "opaque")), None)
    rules = {a.rule for a in edge_annotations(node).values()} if kind == "add" and noted is None else set()
    if "R29" in rules:
        text = f"no other reader has {tensor.name} stored in INT8, and no convolution takes this addition along"
        return "R29", text, _nearest_miss(node, target)
    if rules & set(FUSED_RULES):
        return "R23", f"{tensor.name} takes the addition into its kernel, whose result is float until it is added", None
    if noted is not None:
        return noted.rule, noted.text, _nearest_miss(node, target) if kind == "add" and noted.rule == "R23" else None
    placement = target.ops.get(kind)
    if placement is not None:
        joins = f"it is quantized where {placement.joins} of its inputs are quantized anyway"
        return placement.rule, joins if placement.joins else "the target or the recipe leaves it float", None
    simple = _simple_reason(kind, node, tensor, target)
    return (*simple, None)


def _floats(read: Any) -> TypeGuard[fx.Node]:
    info = tensor_info(read_tensor(read)) if isinstance(read, fx.Node) else None
    return info is not None and info.dtype.is_floating_point and len(info.shape) > 0


def _simple_reason(kind: str, node: fx.Node, tensor: fx.Node, target: Target) -> tuple[str, str]:
    """Rule and sentence for an operation without weights."""
    maker = behind_norm(tensor)
    result = edge_annotations(maker).get("output")
    if kind in target.absorbs and result is not None and result.spec is None and len(maker.users) == 1:
        return (
            result.rule,
            f"{kind} is computed in the kernel of {maker.name}; a quantizer between them would part them",
        )
    if target.rest is not None:
        return target.rest.rule, target.rest.reason
    if kind in _ACTIVATIONS and kind_name(maker) in target.weighted and len(maker.users) == 1:
        return "R44", f"{kind} is computed in the kernel of {maker.name}; a quantizer between them would part them"
    if kind in _ACTIVATIONS and any(a.rule in FUSED_RULES for a in edge_annotations(maker).values()):
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
    waiting: list[tuple[Any, fx.Node, tuple[fx.Node, ...]]] = [(operand, add, ()) for operand in add.args[:2]]
    seen: set[fx.Node] = set()
    for found, asking, between in waiting:  # the nearest first: those that are farther are added behind
        node: Any = found
        reader = asking
        while isinstance(node, fx.Node) and is_quantization(node):
            node, reader = node.args[0], node
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if kind_name(node) in target.weighted:
            why = _miss(node, reader, between, target)
            if why is not None:
                return why
        elif len(between) < _REACH:
            moving = [n for n in node.all_input_nodes if n.op != "get_attr" and _floats(n)]
            waiting += [(n, node, (node, *between)) for n in moving]
    return None


def _miss(node: fx.Node, reader: fx.Node, between: Sequence[fx.Node], target: Target) -> str | None:
    """What keeps a weighted operation from an addition behind it; None if nothing does."""
    if kind_name(node) not in target.residual.weighted:
        return f"{node.name} comes before it, but is a {kind_name(node)}, which takes no addition along"
    if between:
        apart = ", ".join(f"{n.name} ({kind_name(n)})" for n in between)
        return f"{node.name} would take it along, but {apart} {'stands' if len(between) == 1 else 'stand'} between them"
    others = [user.name for user in node.users if user is not reader and not is_quantization(user)]
    return f"{node.name} would take it along, but {', '.join(others)} also reads its result" if others else None
