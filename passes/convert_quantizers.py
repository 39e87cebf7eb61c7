"""Convert quantizers: observers become explicit quantize and dequantize operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..errors import CalibrationError
from ..graph import TENSOR, Editor, TensorInfo, constant, tensor_info
from ..passbase import Pass
from ..qdq import DEQUANTIZE, QUANTIZE
from ..quantizer import QUANTIZERS, Quantizer, quantizers
from ..verify import is_quantizer

__all__ = ["ConvertQuantizers"]


@dataclass(frozen=True)
class ConvertQuantizers(Pass):
    """Replace each quantizer by its operations, with scale and zero point in buffers.

    Rewrite: an activation's quantizer becomes ``dequantize(quantize(x, scale, zero_point), scale, zero_point)``; a
    weight becomes an integer buffer at its old path with a ``dequantize``. The buffers keep the quantizer's keys
    (``quantizers.<tensor>.scale``).

    Raises (CalibrationError): quantizers without a scale, all of them named.
    """

    name: ClassVar[str] = "convert-quantizers"
    requires: ClassVar[tuple[str, ...]] = ("observed",)
    provides: ClassVar[tuple[str, ...]] = ("quantized",)
    numeric: ClassVar = "changes-values"

    def call(self, editor: Editor) -> None:
        nodes = [node for node in editor.graph.nodes if is_quantizer(node)]
        modules = quantizers(editor.gm)
        for node in nodes:
            weight = constant(node.args[0])
            if weight is not None:
                _module(editor, node).solve_weight(weight)
        unsolved = [name for name, module in modules.items() if not module.solved]
        if unsolved:
            raise CalibrationError(
                f"{len(unsolved)} quantizers have seen no data: {', '.join(unsolved)}",
                hint="run fxq.calibrate(prepared, batches) on inputs that reach them before convert",
            )
        for node in nodes:
            self._convert(editor, node, _module(editor, node))
        editor.drop_unused()

    @staticmethod
    @torch.no_grad()
    def _convert(editor: Editor, node: fx.Node, module: Quantizer) -> None:
        tensor, path = node.args[0], str(node.target)
        holder = torch.nn.Module()
        holder.register_buffer("scale", module.scale.detach().clone())
        holder.register_buffer("zero_point", module.zero_point.detach().clone())
        editor.set_module(path, holder)
        dtype, weight = module.spec.qdtype, constant(tensor)
        info = tensor_info(tensor)  # type: ignore[arg-type]
        integers = TensorInfo(info.shape, dtype.storage) if info else None
        with editor.before(node):
            scale, zero_point = (
                editor.get_attr(f"{path}.{name}", like=node) for name in ("scale", "zero_point")
            )
            rest = (scale, zero_point, module.axis)
            if weight is None:
                source = editor.call(QUANTIZE, (tensor, *rest, dtype.name), like=tensor, info=integers,
                                     name=f"{module.tensor}_quantize")  # type: ignore[arg-type]  # fmt: skip
            else:
                source = _integer_weight(editor, node, module, weight)
        editor.retarget(node, DEQUANTIZE, (source, *rest))


def _module(editor: Editor, node: fx.Node) -> Quantizer:
    found = editor.gm.get_submodule(str(node.target))
    if not isinstance(found, Quantizer):
        raise TypeError(f"{node.target} is no quantizer")
    return found


def _integer_weight(editor: Editor, node: fx.Node, module: Quantizer, weight: torch.Tensor) -> fx.Node:
    """A get_attr of the weight's integers, stored at the weight's path unless somebody reads the float one too."""
    tensor = node.args[0]
    integers = QUANTIZE(
        weight.detach(), module.scale, module.zero_point, module.axis, module.spec.qdtype.name
    )
    path = str(tensor.target)  # type: ignore[union-attr]
    shared = len(tensor.users) > 1 or sum(1 for _ in editor.graph.find_nodes(op="get_attr", target=path)) > 1  # type: ignore[union-attr]
    if shared:
        path = editor.free_path(f"{path}_{module.spec.qdtype.name}")
    editor.set_tensor(path, integers)
    if shared:
        return editor.get_attr(path, like=tensor)  # type: ignore[arg-type]
    tensor.meta[TENSOR] = TensorInfo(tuple(integers.shape), integers.dtype)  # type: ignore[union-attr]
    return tensor  # type: ignore[return-value]
