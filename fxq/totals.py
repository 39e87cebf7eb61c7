"""A graph's placement in numbers: how much is quantized, and what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from torch import fx

from .graph import attribute, constant, edge_annotations, tensor_info
from .placement import OpRow, as_read, read_tensor
from .qdq import DEQUANTIZE, QUANTIZE
from .recipe import QDType, QSpec
from .verify import quantizer_of

__all__ = ["Totals", "count"]

_SCALE_BYTES: Final = 4
_PACKED: Final = 4


@dataclass(frozen=True)
class Totals:
    """The report in numbers.

    Attributes:
        weighted: Convolutions and matrix products in all, those inside modules that are kept whole too.
        weighted_quantized: How many of them are quantized.
        residuals: Residual additions in all.
        skips_quantized: How many of them read their skip quantized.
        identity_skips_quantized: How many of those skips are the block's own input, and no projection of it.
        activation_quantizers: Quantizers of activations.
        weight_quantizers: Quantizers of weights.
        float_bytes: Bytes of all parameters and buffers that the graph reads, as the model had them.
        bytes: The same as they are stored once converted: packed integers, and float32 scales.
    """

    weighted: int
    weighted_quantized: int
    residuals: int
    skips_quantized: int
    identity_skips_quantized: int
    activation_quantizers: int
    weight_quantizers: int
    float_bytes: int
    bytes: int


def count(gm: fx.GraphModule, rows: Iterable[OpRow]) -> Totals:
    """The rows of a graph in numbers."""
    rows = tuple(rows)
    weighted = [row for row in rows if row.weighted]
    skips = [row for row in rows if row.residual]
    quantized = [n for n in gm.graph.nodes if quantizer_of(n) is not None or n.target is DEQUANTIZE]
    stored = [as_read(n) for n in quantized if read_tensor(n).op == "get_attr"]
    before, after = _bytes(gm, stored)
    return Totals(
        weighted=sum(row.weighted for row in weighted),
        weighted_quantized=sum(row.weighted for row in weighted if row.low),
        residuals=len(skips),
        skips_quantized=sum(row.low for row in skips),
        identity_skips_quantized=sum(row.low and row.identity for row in skips),
        activation_quantizers=len({read_tensor(n) for n in quantized if read_tensor(n).op != "get_attr"}),
        weight_quantizers=sum(_spec_of(n) is not None for n in stored),
        float_bytes=before,
        bytes=after,
    )


def _bytes(gm: fx.GraphModule, stored: Iterable[fx.Node]) -> tuple[int, int]:
    """Bytes of all that is stored and read, as float, and with the quantized weights and biases as integers."""
    before = after = 0
    low = {str(read_tensor(node).target): node for node in stored}
    for node in gm.graph.nodes:
        tensor = constant(node)
        if tensor is None or str(node.target) in low or _only_scales(node):
            continue
        before, after = before + tensor.nbytes, after + tensor.nbytes
    for node in low.values():
        info = tensor_info(node)
        elements = math.prod(info.shape) if info is not None else 0
        before += elements * (info.dtype.itemsize if info is not None else 0)
        after += _integer_bytes(node, elements)
    leaves = {str(n.target) for n in gm.graph.nodes if n.op == "call_module" and quantizer_of(n) is None}
    whole = sum(t.nbytes for path in leaves for t in attribute(gm, path).state_dict().values())
    return before + whole, after + whole


def _only_scales(node: fx.Node) -> bool:
    return all(user.target in (QUANTIZE, DEQUANTIZE) for user in node.users)


def _integer_bytes(node: fx.Node, elements: int) -> int:
    """Bytes of a stored tensor once converted: packed integers, and float32 scales."""
    spec, info = _spec_of(node), tensor_info(node)
    if spec is None:  # a bias, which conversion made integers of
        real = node if node.target is DEQUANTIZE else node.args[0]
        integers, scale = (constant(part) for part in real.args[:2])  # type: ignore[union-attr]
        return sum(part.nbytes for part in (integers, scale) if part is not None)
    scales = 1 if spec.axis is None or info is None else info.shape[spec.axis]
    return math.ceil(elements * _bits(spec.qdtype) / 8) + _SCALE_BYTES * scales


def _spec_of(quantized: fx.Node) -> QSpec | None:
    """The spec by which a quantized weight is read; None for what no placement decided on."""
    found = (
        annotation.spec
        for user in quantized.users
        for edge, annotation in edge_annotations(user).items()
        if isinstance(edge, int) and user.args[edge] is quantized and annotation.spec is not None
    )
    return next(found, None)


def _bits(dtype: QDType) -> int:
    """Bits that a value takes in a file, where nothing between 4 and 8 is packed."""
    bits = int(dtype.qmax - dtype.qmin).bit_length()
    return dtype.storage.itemsize * 8 if dtype.floating or bits > _PACKED else bits
