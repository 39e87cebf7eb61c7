"""How the tensors of a graph are quantized, read alike from a prepared, a trained and a converted graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, fx

from .errors import FxqError
from .fake_quantizers import FakeQuantizer
from .graph import constant, edge_annotations, state
from .ops import kind_name
from .passes.residual_add import sources
from .placement import read_tensor
from .qdq import DEQUANTIZE, QUANTIZE
from .verify import is_dequantized, quantizer_of

__all__ = ["Quantization", "QuantizedGraph"]

_JOINS: Final = frozenset(("cat", "stack"))


@dataclass(frozen=True)
class Quantization:
    """How one tensor is quantized, the same for a prepared and a converted graph.

    Attributes:
        node: What gives the quantized tensor's real values: a quantizer's call, or ``dequantize``.
        tensor: The tensor.
        scale: float32, [] or [channels]; None while unknown.
        zero_point: int32, likewise.
        axis: The per-channel axis, or None.
        dtype: Name of the quantized type, a key of :data:`fxq.recipe.DTYPES`.
        tie: The quantizer's tie group, known before conversion only.
        symmetric: Whether it was asked to be; known before conversion only.
    """

    node: fx.Node
    tensor: fx.Node
    scale: Tensor | None
    zero_point: Tensor | None
    axis: int | None
    dtype: str
    tie: str | None = None
    symmetric: bool = True

    @property
    def weight(self) -> bool:
        """Whether the tensor is stored in the graph."""
        return self.tensor.op == "get_attr"

    def same(self, other: Quantization) -> bool:
        """Whether both give one real value for one integer; while a scale is unknown, whether a tie will see to it."""
        if self.dtype != other.dtype or self.axis != other.axis:
            return False
        if self.scale is None or other.scale is None or self.zero_point is None or other.zero_point is None:
            return self.node is other.node or (self.tie is not None and self.tie == other.tie)
        return torch.equal(self.scale, other.scale) and torch.equal(self.zero_point, other.zero_point)

    @property
    def text(self) -> str:
        """Scale and type, for messages."""
        if self.scale is None:
            return f"{self.dtype}, scale unknown"
        return f"{self.dtype}, scale{'s up to' if self.scale.numel() > 1 else ''} {float(self.scale.max()):.6g}"


class QuantizedGraph:
    """A graph and its quantizations.

    Args:
        gm: A GraphModule from fxq in which quantizers are placed.

    Raises:
        FxqError: Nothing is placed in it yet.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        held = state(gm)
        if not held.properties & {"observed", "quantized"}:
            raise FxqError("this graph has no quantizers yet", hint="lint what fxq.prepare or fxq.convert gives")
        self.gm, self.target = gm, held.target
        self.nodes: tuple[fx.Node, ...] = tuple(gm.graph.nodes)
        found = (self._quantization(node) for node in self.nodes)
        self.by_node = {one.node: one for one in found if one is not None}

    @cached_property
    def origins(self) -> dict[fx.Node, int]:
        """For each node the inputs that it depends on, as bits."""
        return sources(self.gm.graph)

    def _quantization(self, node: fx.Node) -> Quantization | None:
        quantizer = quantizer_of(node)
        if quantizer is not None:
            known, spec = quantizer.solved, quantizer.spec
            scale = quantizer.effective_scale if isinstance(quantizer, FakeQuantizer) else quantizer.scale
            return Quantization(
                node,
                read_tensor(node),
                scale.detach() if known else None,
                quantizer.zero_point if known else None,
                quantizer.axis,
                spec.qdtype.name,
                quantizer.tie,
                spec.symmetric is not False,
            )
        if node.target is not DEQUANTIZE:
            return None
        source, scale_node, zero_node, axis = node.args
        assert isinstance(source, fx.Node)
        dtype = str(source.args[4]) if source.target is QUANTIZE else _stored_type(node, constant(source))
        place = axis if isinstance(axis, int) else None
        return Quantization(node, read_tensor(node), constant(scale_node), constant(zero_node), place, dtype)

    def read(self, read: Any) -> tuple[Quantization | None, ...]:
        """The quantizations that reach a reader through what only moves values (R19); None for a float way."""
        while isinstance(read, fx.Node):
            if (found := self.by_node.get(read)) is not None:
                return (found,)
            kind = kind_name(read).lower()
            if kind in _JOINS and isinstance(read.args[0], (list, tuple)):
                return tuple(one for part in read.args[0] for one in self.read(part))
            if not (is_dequantized(read) or kind in self.target.ties or "dropout" in kind):
                break
            read = read.args[0]
        return (None,)

    def quantized(self, read: Any) -> bool:
        """Whether all that reaches a reader is quantized."""
        return None not in self.read(read)

    def elsewhere(self, tensor: Any) -> Quantization | None:
        """The quantization through which others read a tensor."""
        return next((one for one in self.by_node.values() if one.tensor is tensor), None)

    def readers(self, node: fx.Node) -> Iterator[Quantization]:
        """The quantizations of a tensor, through what only moves values."""
        for user in node.users:
            if user.target is QUANTIZE:
                yield from (self.by_node[real] for real in user.users if real in self.by_node)
            elif user in self.by_node:
                yield self.by_node[user]
            elif kind_name(user) in self.target.ties - _JOINS:
                yield from self.readers(user)


def _stored_type(real: fx.Node, stored: Tensor | None) -> str:
    """The quantized type of a weight: what its readers asked for, as several types are stored in one."""
    for user in real.users:
        if is_dequantized(user):
            return _stored_type(user, stored)
        for edge, annotation in edge_annotations(user).items():
            if isinstance(edge, int) and user.args[edge] is real and annotation.spec is not None:
                return annotation.spec.qdtype.name
    return "" if stored is None else str(stored.dtype).removeprefix("torch.")
