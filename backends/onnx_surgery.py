"""Reading and changing onnx-graphsurgeon's graphs where its own ways are slow, loose, or change a type."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_graphsurgeon as gs

__all__ = ["content", "drop", "free_name", "ids", "is_plain", "onnx_dtype", "producer", "reroute"]


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def ids(tensors: list[gs.Tensor]) -> set[int]:
    """The tensors by identity: graphsurgeon calls those equal whose names are, so `in` would be slow and loose."""
    return {id(tensor) for tensor in tensors}


def reroute(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all users of `old` read `new`."""
    for user in list(old.outputs):
        for index, tensor in enumerate(user.inputs):
            if tensor is old:
                user.inputs[index] = new


def drop(graph: gs.Graph, node: gs.Node) -> int:
    """Take a node out of its graph; gives 1, the number of changes."""
    node.inputs.clear()
    node.outputs.clear()
    # By identity: graphsurgeon calls nodes equal that merely look alike, and compares them slowly.
    del graph.nodes[next(i for i, other in enumerate(graph.nodes) if other is node)]
    return 1


def free_name(graph: gs.Graph, name: str) -> str:
    """`name`, or what is free of it with underscores behind."""
    taken = graph.tensors()
    while name in taken:
        name += "_"
    return name


def content(tensor: gs.Tensor) -> tuple[Any, ...] | None:
    """A constant's type, shape and content, hashed; None for what is no constant."""
    import onnx_graphsurgeon as gs

    if not isinstance(tensor, gs.Constant):
        return None
    array = _array(tensor)
    return str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest()


def _array(constant: gs.Constant) -> np.ndarray[Any, Any]:
    """The values, without making graphsurgeon load them: it changes types that numpy lacks when it does."""
    import onnx
    from onnx_graphsurgeon.ir.tensor import LazyValues

    held = constant._values
    return onnx.numpy_helper.to_array(held.tensor) if isinstance(held, LazyValues) else constant.values


def onnx_dtype(dtype: Any) -> int | None:
    """ONNX's number of a type as graphsurgeon holds it."""
    from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

    return None if dtype is None else int(dtype_to_onnx(dtype))


def is_plain(tensor: gs.Tensor) -> bool:
    """Whether numpy has a tensor's type, as far as it is known."""
    import numpy as np

    # graphsurgeon gives an ONNX type number where numpy has no type, and ml_dtypes' types have kind "V".
    return tensor.dtype is None or (not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).kind in "biufcSU")
