"""Reading a graph's placement: what runs in low precision, and through which quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from .batch_norm import TrainedBatchNorm
from .graph import attribute, edge_annotations, origin, state, tensor_info
from .ops import PRODUCT_KINDS, WEIGHTED_MODULES, kind_name, products
from .qdq import DEQUANTIZE, QUANTIZE
from .recipe import QSpec
from .verify import is_dequantized, quantizer_of

__all__ = [
    "FUSED_RULES",
    "SKIP_RULES",
    "EdgeRow",
    "OpRow",
    "as_read",
    "behind_norm",
    "edge_rows",
    "hidden_products",
    "operations",
    "read_tensor",
]

FUSED_RULES: Final = ("R23", "R24")
"""The rules by which the skip of an addition is quantized that a convolution takes along."""
SKIP_RULES: Final = (*FUSED_RULES, "R29")
"""The rules by which the skip of a residual addition is quantized."""


@dataclass(frozen=True)
class EdgeRow:
    """One edge that placement decided on.

    Attributes:
        edge: Argument index, or ``output``.
        role: ``input``, ``weight``, ``skip`` or ``output``.
        tensor: The tensor that the edge reads (for ``output``, gives).
        quantized: Whether it goes through a quantizer.
        spec: The spec as text; "float" without one.
        scale: The scale, or the largest of several; None while unknown.
        channels: How many scales there are; 0 for a float edge.
        readers: How many operations read the tensor through that quantizer.
        rule: Id of the rule that decided.
        reason: Its sentence.
    """

    edge: int | str
    role: str
    tensor: str
    quantized: bool
    spec: str
    scale: float | None
    channels: int
    readers: int
    rule: str
    reason: str


@dataclass(frozen=True)
class OpRow:
    """One operation that placement decided on, or could not.

    Attributes:
        node: Its node.
        kind: Its op kind, or the type of a module that is kept whole.
        module_path: The user's module.
        source: The user's ``file:line``.
        weighted: How many convolutions and matrix products it is: 1, 0 for an addition, several for a
            module that is kept whole.
        precision: The data types of its edges (``int8``) if all that placement decided on are quantized, else
            ``float``. For an addition, that of its skip; for an activation that the kernel before it computes, that
            of its result.
        residual: Whether it is a residual addition, by the rules R23, R24 and R29.
        identity: For a residual addition with a quantized skip: whether the skip is the block's own input, and no
            projection of it.
        edges: Its edges.
    """

    node: str
    kind: str
    module_path: str
    source: str | None
    weighted: int
    precision: str
    residual: bool
    identity: bool
    edges: tuple[EdgeRow, ...]

    @property
    def low(self) -> bool:
        """Whether it runs in low precision."""
        return self.precision != "float"


def operations(gm: fx.GraphModule) -> Iterator[OpRow]:
    """What placement decided on, weighted operations that stay float, and modules kept whole, in order."""
    held = state(gm)
    residuals = {note.node for note in held.notes if note.rule == "R23"}
    for node in gm.graph.nodes:
        kind, hidden = kind_name(node), hidden_products(gm, node)
        weighted = hidden or int(kind in held.target.weighted | PRODUCT_KINDS)
        edges = tuple(edge_rows(gm, node))
        if not (weighted or node.name in residuals or any(e.quantized for e in edges)):
            continue
        where, read = origin(node), [e for e in edges if e.role != "output" and e.spec != "float"]
        decided = [e for e in edges if e.role != "output"]
        skips = [e.edge for e in read if isinstance(e.edge, int) and e.role == "skip"]
        whole = bool(read) and (len(read) == len(decided) or not weighted)
        given = [e for e in edges if e.role == "output" and e.quantized]
        if given and not read and kind in held.target.absorbs:
            whole, read = True, given
        yield OpRow(
            node=node.name,
            kind=kind,
            module_path=where.module_path,
            source=where.source,
            weighted=weighted,
            precision="/".join(dict.fromkeys(e.spec.split()[0] for e in read)) if whole else "float",
            residual=bool(skips) or node.name in residuals,
            identity=any(_is_ancestor(read_tensor(node.args[skip]), node.args[1 - skip]) for skip in skips),
            edges=edges,
        )


def _is_ancestor(node: fx.Node, of: Any) -> bool:
    """Whether `node` is `of` or has a part in computing it; nodes before `node` are not looked at."""
    waiting, seen = [of], {of}
    while waiting:
        here = waiting.pop()
        if here is node:
            return True
        more = [n for n in here.all_input_nodes if n not in seen and not n < node]
        seen.update(more)
        waiting += more
    return False


def behind_norm(node: fx.Node) -> fx.Node:
    """The layer whose BatchNorm a graph in training still has behind it; any other node itself."""
    trained = node.op == "call_module" and isinstance(
        attribute(node.graph.owning_module, str(node.target)),  # type: ignore[arg-type]
        TrainedBatchNorm,
    )
    source = node.args[0] if trained else node
    return source if isinstance(source, fx.Node) else node


def hidden_products(gm: fx.GraphModule, node: fx.Node) -> int:
    """How many weighted operations a call holds that has no edges of its own, such as a module kept whole."""
    if node.op != "call_module":
        return products(node)
    module = attribute(gm, str(node.target))
    inside = sum(isinstance(m, WEIGHTED_MODULES) for path, m in module.named_modules() if path)
    return inside or int(isinstance(module, WEIGHTED_MODULES))


def edge_rows(gm: fx.GraphModule, node: fx.Node) -> Iterator[EdgeRow]:
    """The edges of `node` that placement decided on."""
    for edge, annotation in edge_annotations(node).items():
        read = node.args[edge] if isinstance(edge, int) else _result(node)
        if not isinstance(read, fx.Node):
            continue
        tensor = read_tensor(read) if isinstance(edge, int) else node
        scale = _scale_of(gm, read)
        known = scale is not None and scale.numel() > 0
        yield EdgeRow(
            edge=edge,
            role=_role(edge, tensor, annotation.rule),
            tensor=tensor.name,
            quantized=scale is not None,
            spec=str(annotation.spec) if annotation.spec is not None and scale is not None else "float",
            scale=float(scale.max()) if scale is not None and known else None,
            channels=_channels(annotation.spec, tensor) if scale is not None else 0,
            readers=len(read.users) if scale is not None else 0,
            rule=annotation.rule,
            reason=annotation.reason,
        )


def as_read(real: fx.Node) -> fx.Node:
    """What operations read of a dequantized tensor: itself, or the cast behind it."""
    return next((user for user in real.users if is_dequantized(user)), real)


def _result(node: fx.Node) -> fx.Node | None:
    """What the readers of a quantized result read; any reader of another one, None if there is none."""
    for user in node.users:
        if quantizer_of(user) is not None:
            return user
        if user.target is QUANTIZE:
            own = (real for real in user.users if real.target is DEQUANTIZE and real.args[1] is user.args[1])
            return next((as_read(real) for real in own), user)
    return next(iter(node.users), None)


def _channels(spec: QSpec | None, tensor: fx.Node) -> int:
    info = tensor_info(tensor)
    return 1 if spec is None or spec.axis is None or info is None else info.shape[spec.axis]


def _role(edge: int | str, tensor: fx.Node, rule: str) -> str:
    if edge == "output":
        return "output"
    if tensor.op == "get_attr":
        return "weight"
    return "skip" if rule in SKIP_RULES else "input"


def read_tensor(read: Any) -> fx.Node:
    """The tensor behind a quantizer or behind quantize and dequantize; a float tensor itself."""
    while quantizer_of(read) is not None or is_dequantized(read) or read.target is QUANTIZE:
        read = read.args[0]
    assert isinstance(read, fx.Node)
    return read


def _scale_of(gm: fx.GraphModule, read: fx.Node) -> torch.Tensor | None:
    """The scale that `read` is quantized with, empty while unknown; None for a float tensor."""
    quantizer = quantizer_of(read)
    if quantizer is not None:
        return quantizer.scale if quantizer.solved else quantizer.scale.new_empty(0)
    if not is_dequantized(read):
        return None
    real = read if read.target is DEQUANTIZE else read.args[0]
    found = attribute(gm, str(real.args[1].target))  # type: ignore[union-attr]
    return found if isinstance(found, torch.Tensor) else None
