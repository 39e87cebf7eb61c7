"""Convert quantizers: observers become explicit quantize and dequantize operations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..editor import Editor
from ..errors import CalibrationError
from ..graph import TENSOR, TensorInfo, constant, origin, tensor_info
from ..passbase import Numeric, Pass
from ..qdq import DEQUANTIZE, QUANTIZE
from ..quantizer import Quantizer
from ..verify import quantizer_of

__all__ = ["ConvertQuantizers"]


@dataclass(frozen=True)
class ConvertQuantizers(Pass):
    """Replace each quantizer by its operations, with scale and zero point in buffers.

    Rewrite: an activation's quantizer becomes ``dequantize(quantize(x, scale, zero_point), scale,
    zero_point)``; a weight becomes an integer buffer at its old path with a ``dequantize``, or at a path
    beside it if the float weight is read elsewhere too. The buffers keep the quantizer's keys
    (``quantizers.<tensor>.scale``). A model in another type than float32 gets its own type back behind
    ``dequantize``. The result is bit for bit what the prepared graph gives with its quantizers in mode
    ``QUANTIZE``.

    Raises:
        CalibrationError: Quantizers without a scale; all of them are named.
    """

    name: ClassVar[str] = "convert-quantizers"
    requires: ClassVar[tuple[str, ...]] = ("observed",)
    provides: ClassVar[tuple[str, ...]] = ("quantized",)
    numeric: ClassVar[Numeric] = "changes-values"

    def call(self, editor: Editor) -> None:
        found = [(node, module) for node in editor.graph.nodes if (module := quantizer_of(node)) is not None]
        for node, module in found:
            weight = constant(node.args[0])
            if weight is not None and not module.solved:
                module.solve_weight(weight)
        _require_solved(found)
        readers = Counter(str(n.target) for n in editor.graph.nodes if n.op == "get_attr")
        for node, module in found:
            self._convert(editor, node, module, readers)
        if found:
            editor.drop_unused()

    @staticmethod
    @torch.no_grad()
    def _convert(editor: Editor, node: fx.Node, module: Quantizer, readers: Counter[str]) -> None:
        tensor, path = node.args[0], str(node.target)
        assert isinstance(tensor, fx.Node)
        holder = torch.nn.Module()
        holder.register_buffer("scale", module.scale.detach().clone())
        holder.register_buffer("zero_point", module.zero_point.detach().clone())
        editor.set_module(path, holder)
        dtype, weight, info = module.spec.qdtype, constant(tensor), tensor_info(tensor)
        shape = info.shape if info is not None else ()
        with editor.before(node):
            scale, zero_point = (editor.get_attr(f"{path}.{name}", like=node) for name in ("scale", "zero_point"))
            rest = (scale, zero_point, module.axis)
            if weight is None:
                stored = TensorInfo(shape, dtype.storage)
                source = editor.call(
                    QUANTIZE,
                    (tensor, *rest, dtype.name),
                    like=tensor,
                    info=stored,
                    name=f"{tensor.name}_quantize",
                )
            else:
                source = _integer_weight(editor, tensor, module, weight, shared=readers[str(tensor.target)] > 1)
            real = editor.call(
                DEQUANTIZE, (source, *rest), like=node, info=TensorInfo(shape, module.scale.dtype),
                name=f"{tensor.name}_dequantize",
            )  # fmt: skip
            if info is not None and info.dtype != module.scale.dtype:
                real = editor.call(
                    torch.Tensor.to, (real, info.dtype), like=node, info=info, name=f"{tensor.name}_cast"
                )
        editor.replace(node, real)
        editor.erase(node)
        if weight is not None and source is not tensor:
            editor.erase_dead([tensor])


def _require_solved(found: list[tuple[fx.Node, Quantizer]]) -> None:
    unsolved = [(node, module) for node, module in found if not module.solved]
    if unsolved:
        named = ", ".join(
            f"{module.tensor} ({path})" if (path := origin(node).module_path) else module.tensor
            for node, module in unsolved
        )
        raise CalibrationError(
            f"{len(unsolved)} quantizers have no scale, because they saw no data: {named}",
            hint="run fxq.calibrate(prepared, batches) on inputs that reach them before convert",
        )


def _integer_weight(
    editor: Editor, tensor: fx.Node, module: Quantizer, weight: torch.Tensor, *, shared: bool
) -> fx.Node:
    """A get_attr of the weight's integers, at the weight's path unless somebody reads the float one too."""
    integers = QUANTIZE(weight.detach(), module.scale, module.zero_point, module.axis, module.spec.qdtype.name)
    path = str(tensor.target)
    if not shared and len(tensor.users) == 1:
        editor.set_tensor(path, integers)
        tensor.meta[TENSOR] = TensorInfo(tuple(integers.shape), integers.dtype)
        return tensor
    path = editor.free_path(f"{path}_{module.spec.qdtype.name}")
    editor.set_tensor(path, integers)
    return editor.get_attr(path, like=tensor)
