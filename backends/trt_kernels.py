"""The kernels of a TensorRT engine, read from the builder's log or from the engine inspector's JSON.

TensorRT-RTX's builder ends its VERBOSE log with a section ``Layers:``, one line a kernel. TensorRT's does
not; there the inspector of a loaded engine says the same, as JSON or (``trtexec --dumpLayerInfo``) in such lines, in
one schema for 10.x (``Format/Datatype``) and another for 11.x (``Format`` and ``Datatype`` apart). All need an engine
built with detailed profiling verbosity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from ..errors import EngineError

__all__ = [
    "UNKNOWN",
    "LayerInfo",
    "TensorInfo",
    "kernels_from_file",
    "kernels_from_inspector",
    "kernels_from_log",
    "tensors_of_engine",
]

# TensorRT's spellings of a data type -> (ours, bits). The long ones occur inside a format's description.
_DTYPES = {
    "Float": ("float32", 32), "FP32": ("float32", 32), "Half": ("float16", 16), "FP16": ("float16", 16),
    "BFloat16": ("bfloat16", 16), "BF16": ("bfloat16", 16), "FP8": ("float8", 8), "FP4": ("float4", 4),
    "Int64": ("int64", 64), "INT64": ("int64", 64), "Int32": ("int32", 32), "INT32": ("int32", 32),
    "Int8": ("int8", 8), "INT8": ("int8", 8), "UInt8": ("uint8", 8), "UINT8": ("uint8", 8), "Int4": ("int4",
    4), "INT4": ("int4", 4), "Bool": ("bool", 8), "BOOL": ("bool", 8), "E8M0": ("e8m0", 8),
}  # fmt: skip
_BITS = dict(_DTYPES.values())
UNKNOWN: Final = "unknown"
"""Type of a tensor that the engine does not describe."""
_QDQ: Final = "QDQ"
_DTYPE_WORD = re.compile(r"\b(" + "|".join(sorted(_DTYPES, key=len, reverse=True)) + r")\b")

# Bookkeeping that runs no kernel on tensors.
_NOT_KERNELS = frozenset({"signal", "wait", "shape_call", "constant", "noop"})
# Layer types that multiply by weights, and the fused kinds where the kernel's name has to tell.
_WEIGHTED = re.compile(r"conv|correlation|gemm|gett|matmul|matrixmultiply|^fc$|fullyconnected", re.IGNORECASE)
_FUSED = re.compile(r"^(runtime_)?fusion$", re.IGNORECASE)
_WEIGHTED_NAME = re.compile(r"Fc|Gemm|gemm|MatMul|Corr|Conv|Dot")

# A list is empty or ends in "}]"; the lone "]" of a shape inside it does not end it. Reformats have no TacticName.
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>|.*?\})\]"
    r"(?:, Constants: \[(?P<constants>|.*?\})\])?, Outputs: \[(?P<outputs>|.*?\})\], (?:.*?, )?"
    r"StreamId: \d+, (?:.*?, )?Metadata: ?(?P<metadata>.*)"
)
_TACTIC = re.compile(r"\], (?:[^\[\]]*, )?TacticName: (.*?), (?:TacticValue|StreamId):")
_TENSOR = re.compile(
    r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([^\]]*)\][^{}]*?(?:, |/)Data[tT]ype: ([^,{}]+)"
)
_ORIGIN = re.compile(r"(?:^|, )Origin: (\w+)")
# 10.x describes no tensor of an engine with dynamic shapes; what a kernel multiplies is then told by its weights, or by
# the tactic: i8i8_i8i32 and i8f32_i8i32 name types of operands and sums.
_UNDESCRIBED = "N/A"
_INT8_TACTIC = re.compile(r"(?:^|_)i8\w{2,3}_i8i32(?:_|$)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\s\x1e\x1f\[]|$)")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a kernel reads or writes.

    Attributes:
        name: TensorRT's name.
        shape: Its dimensions; -1 where they depend on the optimization profile.
        dtype: ``"int8"``, ``"float32"``, …; TensorRT's own word where fxq does not know it; :data:`UNKNOWN` where
            the engine does not say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int | None:
        """Size in bytes without padding, or None where a dimension or the type is not known."""
        if self.dtype not in _BITS or any(dim < 0 for dim in self.shape):
            return None
        return (prod(self.shape) * _BITS[self.dtype] + 7) // 8

    def __str__(self) -> str:
        """``name int8[1, 64, 56, 56]``."""
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class LayerInfo:
    """One kernel of an engine.

    Attributes:
        name: TensorRT's name of it.
        kind: TensorRT's layer type, for example ``"correlation"`` or ``"CaskConvolution"``; ``"QDQ"`` for a
            ``Reformat`` that is a Q or a DQ by its origin; ``"unknown"`` for a line of the log that could not be read,
            which then has no tensors.
        inputs: Activations that it reads.
        outputs: What it writes.
        constants: Weights, scales and biases that it holds.
        tactic: Name of the implementation that was chosen.
        onnx_nodes: Names of the ONNX nodes that it came from.
    """

    name: str
    kind: str
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    constants: tuple[TensorInfo, ...] = ()
    tactic: str = ""
    onnx_nodes: tuple[str, ...] = ()

    @property
    def weighted(self) -> bool:
        """True for convolutions and matrix products, alone or inside a fused kernel."""
        if _FUSED.search(self.kind):
            return bool(_WEIGHTED_NAME.search(self.name) or _WEIGHTED_NAME.search(self.tactic))
        return bool(_WEIGHTED.search(self.kind))

    @property
    def weights(self) -> TensorInfo | None:
        """The largest constant with two dimensions above 1; None for a product of two activations."""
        matrices = [constant for constant in self.constants if sum(dim > 1 for dim in constant.shape) > 1]
        return max(matrices, key=lambda constant: prod(constant.shape), default=None)

    @property
    def reads_int8(self) -> bool:
        """True where the activation and the weights (or the second activation) both come in as INT8.

        Where the engine does not describe its tensors (10.x, dynamic shapes), INT8 weights or the tactic's name tell.
        """
        if not self.inputs:
            return False
        weights = self.weights
        dtypes = {self.inputs[0].dtype, (weights or self.inputs[-1]).dtype}
        if UNKNOWN not in dtypes:
            return dtypes == {"int8"}
        told = (weights is not None and weights.dtype == "int8") or bool(_INT8_TACTIC.search(self.tactic))
        return told and dtypes <= {"int8", UNKNOWN}

    @property
    def activation_bytes(self) -> int | None:
        """Bytes of activations read and written, or None where a size is not known."""
        sizes = [tensor.nbytes for tensor in (*self.inputs, *self.outputs)]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None


def kernels_from_log(messages: Iterable[str]) -> tuple[LayerInfo, ...] | None:
    """Read the kernels from a builder's VERBOSE messages, or return None where they list none.

    Args:
        messages: The texts in the order in which they were logged. Of several listings the last one counts.
    """
    listing = None
    for message in messages:
        _, found, after = message.partition("Layers:\n")
        if found:
            listing = after
    if listing is None:
        return None
    # The section ends at a blank line. Not splitlines(): TensorRT separates ONNX names by control characters
    # that Python counts as line ends.
    lines = (line for line in listing.split("\n\n", 1)[0].split("\n") if line.startswith("Name: "))
    layers = (_layer_from_line(line) for line in lines)
    return tuple(layer for layer in layers if layer.kind.lower() not in _NOT_KERNELS)


def kernels_from_inspector(text: str) -> tuple[LayerInfo, ...] | None:
    """Read the kernels from ``IEngineInspector.get_engine_information`` in JSON format.

    Returns None where the engine was built without detailed profiling verbosity: its layers are then bare
    names.
    """
    layers = json.loads(text).get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        return None
    found = (_layer_from_json(layer) for layer in layers)
    return tuple(layer for layer in found if layer.kind.lower() not in _NOT_KERNELS)


def tensors_of_engine(text: str) -> tuple[TensorInfo, ...]:
    """The engine's inputs and outputs by the inspector's JSON.

    TensorRT 11 describes each under ``I/O Tensors``; 10 only names them under ``Bindings``, which leaves the type
    ``unknown`` and the shape empty.
    """
    data = json.loads(text)
    described = [_tensor_from_json(tensor) for tensor in data.get("I/O Tensors", [])]
    return tuple(described) or tuple(TensorInfo(str(name), (), UNKNOWN) for name in data.get("Bindings", []))


def kernels_from_file(path: Path) -> tuple[LayerInfo, ...]:
    """Read the kernels from a file: the inspector's JSON, or a builder's VERBOSE log.

    Raises:
        EngineError: There is no such file, or it lists no kernels.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}", hint="name an inspector's JSON or a log") from error
    found = _kernels_from_text(text)
    if not found:
        raise EngineError(
            f"{path} lists no kernels with their tensors",
            hint="build with detailed profiling verbosity; fxq.build(..., verbose_log=...) keeps a builder's log",
        )
    return found


def _kernels_from_text(text: str) -> tuple[LayerInfo, ...] | None:
    if not text.lstrip().startswith("{"):
        return kernels_from_log([text])
    try:
        return kernels_from_inspector(text)
    except (json.JSONDecodeError, TypeError, ValueError, AttributeError):
        return None


def _layer_from_line(line: str) -> LayerInfo:
    match = _LAYER.fullmatch(line.rstrip())
    if match is None:
        return LayerInfo(name=line.removeprefix("Name: ").partition(", LayerType: ")[0], kind="unknown")
    return LayerInfo(
        name=match["name"],
        kind=_kind(match["kind"].strip(), _ORIGIN.search(line)),
        inputs=_tensors_from_line(match["inputs"]),
        outputs=_tensors_from_line(match["outputs"]),
        constants=_tensors_from_line(match["constants"] or ""),
        tactic=tactic[1] if (tactic := _TACTIC.search(line)) else "",
        onnx_nodes=_onnx_nodes(match["metadata"]),
    )


def _tensors_from_line(text: str) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(name, tuple(int(dim) for dim in dims.split(",") if dim.strip()), _dtype(dtype))
        for name, dims, dtype in _TENSOR.findall(text)
    )


def _layer_from_json(layer: Mapping[str, Any]) -> LayerInfo:
    constants = [_tensor_from_json(constant) for constant in layer.get("Constants", [])]
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Count"):
        # Only the number of weights is given. Two dimensions, so that they are told from a scale or a bias.
        count = int(weights["Count"])
        outer = int(layer.get("OutMaps") or 1)
        shape = (outer, count // outer) if count % outer == 0 else (count,)
        constants.append(TensorInfo("Weights", shape, _dtype(str(weights.get("Type", "")))))
    return LayerInfo(
        name=str(layer.get("Name", "")),
        kind=_QDQ if layer.get("Origin") == _QDQ else str(layer.get("LayerType", "unknown")),
        inputs=tuple(_tensor_from_json(tensor) for tensor in layer.get("Inputs", [])),
        outputs=tuple(_tensor_from_json(tensor) for tensor in layer.get("Outputs", [])),
        constants=tuple(constants),
        tactic=str(layer.get("TacticName", "")),
        onnx_nodes=_onnx_nodes(str(layer.get("Metadata", ""))),
    )


def _tensor_from_json(tensor: Mapping[str, Any]) -> TensorInfo:
    described = tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or ""
    shape = tuple(int(dim) for dim in tensor.get("Dimensions", []))
    return TensorInfo(str(tensor.get("Name", "")), shape, _dtype(str(described)))


def _dtype(described: str) -> str:
    word = _DTYPE_WORD.search(described)
    if word:
        return _DTYPES[word[1]][0]
    return UNKNOWN if not described or described.startswith(_UNDESCRIBED) else described


def _kind(kind: str, origin: re.Match[str] | None) -> str:
    return _QDQ if origin is not None and origin[1] == _QDQ else kind


def _onnx_nodes(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_ONNX_LAYER.findall(metadata)))
