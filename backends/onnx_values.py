"""An ONNX model's stored values and inferred types, without reading its weights from disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import FxqError

if TYPE_CHECKING:
    import onnx

__all__ = ["FOLDS", "TensorType", "inferred_types", "read_model", "tensor_values", "type_name"]

TensorType = tuple[int, tuple[int | None, ...] | None]
"""Element type and shape; 0 for an unknown type, None for an unknown dimension or rank."""

SMALL: Final = 1024
"""Constants of at most so many elements keep their values for shape inference."""


def type_name(element_type: int) -> str:
    """ONNX's name of an element type in lower case (``float``, ``int8``); "" for 0."""
    from onnx import TensorProto

    return TensorProto.DataType.Name(element_type).lower() if element_type else ""


def read_model(model: str | PathLike[str] | bytes | onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """Read a model, and inline the functions that it defines.

    Args:
        model: A file, a serialized model, or a ModelProto, which is not changed.

    Returns:
        The model, without the weights that lie in files beside it, and the folder that holds those.

    Raises:
        FxqError: There is no such file, or it holds no ONNX model.
    """
    import onnx

    found, folder = (model, "") if isinstance(model, onnx.ModelProto) else _parsed(model)
    if found.functions:
        from onnx import inliner

        found = inliner.inline_local_functions(found)
    return found, folder


def _parsed(model: str | PathLike[str] | bytes) -> tuple[onnx.ModelProto, str]:
    import onnx
    from google.protobuf.message import DecodeError

    given: object = model
    if not isinstance(given, str | bytes | PathLike):
        kind = type(given).__name__
        raise FxqError(
            f"a {kind} is no ONNX model", hint="give an ONNX file; fxq.export writes one of a converted graph"
        )
    name = "the given bytes" if isinstance(model, bytes) else fspath(model)
    hint = "name a file in ONNX's format"
    try:
        if isinstance(model, bytes):
            found, folder = onnx.load_from_string(model), ""
        else:
            found, folder = onnx.load(name, load_external_data=False), str(Path(name).parent)
    except OSError as error:
        raise FxqError(f"cannot read {name}: {error.strerror}", hint=hint) from error
    except DecodeError as error:
        raise FxqError(f"no ONNX model in {name}", hint=hint) from error
    if not found.graph.node and not found.graph.output:
        raise FxqError(f"no ONNX model in {name}", hint=hint)
    return found, folder


def inferred_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    """Element type and shape of every tensor that the model, or shape inference, tells of."""
    graph = _inferred(model)
    types = {v.name: _type_of(v) for v in (*graph.input, *graph.output, *graph.value_info)}
    return types | {t.name: (t.data_type, tuple(t.dims)) for t in model.graph.initializer}


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph after shape inference, on a copy that has lost its large weights."""
    import onnx

    graph = model.graph
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    slim = skeleton.graph
    slim.name = graph.name or "graph"
    slim.node.extend(graph.node)
    slim.input.extend(graph.input)
    slim.output.extend(graph.output)
    slim.value_info.extend(graph.value_info)
    known = {i.name for i in graph.input}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            slim.initializer.append(tensor)
        elif tensor.name not in known:
            slim.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        return onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except onnx.shape_inference.InferenceError:  # an operator that contradicts itself: the checker's business
        return slim


def _type_of(value: onnx.ValueInfoProto) -> TensorType:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    dims = (d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return tensor.elem_type, tuple(dims)


def tensor_values(tensor: onnx.TensorProto, folder: str) -> npt.NDArray[Any] | None:
    """A stored tensor's values; None if they lie in a file and the model's folder is not known.

    Raises:
        FxqError: The file beside the model that holds them cannot be read.
    """
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL and not folder:
        return None
    try:
        return onnx.numpy_helper.to_array(tensor, folder)
    except (OSError, onnx.checker.ValidationError) as error:
        raise FxqError(
            f"cannot read the values of {tensor.name!r} from the file beside the model: {error}",
            hint="keep a model and its external data in one folder",
        ) from error


def _flat(value: npt.NDArray[Any], *_: Any) -> npt.NDArray[Any]:
    """Squeeze, Unsqueeze and Reshape of a scale keep its values; a single one becomes a scalar."""
    return value.reshape(()) if value.size == 1 else value.ravel()


FOLDS: Final[Mapping[str, Callable[..., npt.NDArray[Any]]]] = {
    "Cast": lambda value: value,
    "Identity": lambda value: value,
    "Reshape": _flat,
    "Squeeze": _flat,
    "Unsqueeze": _flat,
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": lambda *values: np.maximum.reduce(np.broadcast_arrays(*values)),
    "Min": lambda *values: np.minimum.reduce(np.broadcast_arrays(*values)),
}
"""What tools put between a stored number and a scale, as numpy functions."""
