"""Torch tensors as ONNX Runtime's values and back, of types too that numpy lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["from_ort", "onnx_type", "to_ort"]

_RAW: Final[Mapping[torch.dtype, tuple[str, torch.dtype]]] = {
    torch.bfloat16: ("BFLOAT16", torch.int16),
    torch.float8_e4m3fn: ("FLOAT8E4M3FN", torch.uint8),
    torch.float8_e5m2: ("FLOAT8E5M2", torch.uint8),
}
"""Types that numpy lacks: ONNX's name, and the integers that carry their bits."""


def onnx_type(tensor: Tensor) -> int:
    """ONNX's number of a tensor's type."""
    import onnx

    if tensor.dtype in _RAW:
        return int(getattr(onnx.TensorProto, _RAW[tensor.dtype][0]))
    return int(onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=tensor.dtype).numpy().dtype))


def to_ort(tensor: Tensor) -> Any:
    """A tensor as an ``OrtValue`` on the CPU, without a copy where it is there and contiguous."""
    import onnxruntime as ort

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _RAW:
        bits = tensor.view(_RAW[tensor.dtype][1]).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx_type(tensor))
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def from_ort(value: Any) -> Tensor:
    """A copy of an ``OrtValue`` as a tensor of one's own."""
    array = value.numpy()
    raw = {f"tensor({name.lower()})": dtype for dtype, (name, _) in _RAW.items()}
    dtype = raw.get(value.data_type())
    # The array may lie in memory that belongs to the runtime.
    tensor = torch.from_numpy(array.copy())
    return tensor if dtype is None else tensor.view(dtype)
