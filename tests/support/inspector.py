"""The engine inspector's JSON of TensorRT 10 and 11, made by hand after NVIDIA's documentation; no engine wrote it.

Its keys, and the words in them, are those that users have published of engines of 10.x: a Q or DQ that is a kernel
of its own is a ``Reformat`` whose ``Origin`` is ``QDQ``, and has no tactic's name. 10.x joins format and type of a
tensor in one text and names the engine's inputs and outputs under ``Bindings``; 11.x has ``Format`` and ``Datatype``
apart and describes them under ``I/O Tensors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FORMATS = {
    "int8": ("Thirty-two wide channel vectorized row major Int8 format", "Int8"),
    "float32": ("Row major linear FP32 format", "Float"),
}


def tensor(version: int, name: str, dtype: str, shape: Sequence[int]) -> dict[str, Any]:
    """One entry of ``Inputs`` or ``Outputs``."""
    text, word = FORMATS[dtype]
    row: dict[str, Any] = {"Name": name, "Location": "Device", "Dimensions": list(shape)}
    return row | ({"Format/Datatype": text} if version == 10 else {"Format": text, "Datatype": word})


def layer(
    version: int,
    name: str,
    kind: str,
    inputs: list[tuple[Any, ...]],
    outputs: list[tuple[Any, ...]],
    nodes: Sequence[str],
) -> dict[str, Any]:
    """One layer; convolutions have INT8 weights, and the kind ``QDQ`` is a Q or a DQ."""
    row: dict[str, Any] = {
        "Name": name,
        "LayerType": "Reformat" if kind == "QDQ" else kind,
        "Inputs": [tensor(version, *one) for one in inputs],
        "Outputs": [tensor(version, *one) for one in outputs],
        "TacticValue": "0x00000000000003e8",
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }
    if kind in ("QDQ", "Reformat"):
        row |= {"ParameterType": "Reformat", "Origin": "QDQ" if kind == "QDQ" else "REFORMAT"}
    if kind == "CaskConvolution":
        row |= {"TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32", "Groups": 1}
        row |= {
            "ParameterType": "Convolution",
            "OutMaps": 32,
            "Weights": {"Type": "Int8", "Count": 9216},
            "Bias": {"Type": "Float", "Count": 32},
        }
    return row


def float_skip(version: int, shape: Sequence[int]) -> dict[str, Any]:
    """An engine of ``lint_net.residual(None)``, whose skip is float: the Q behind the addition is left alone."""

    def at(name: str, dtype: str) -> tuple[Any, ...]:
        return name, dtype, shape

    layers = [
        layer(version, "PWN(stem)", "PointWiseV2", [at("x", "float32")], [at("stem", "float32")], ["stem"]),
        layer(version, "stem_q", "QDQ", [at("stem", "float32")], [at("stem_q", "int8")], ["stem_q"]),
        layer(version, "conv1 + relu1", "CaskConvolution", [at("stem_q", "int8")], [at("relu1_q", "int8")],
              ["conv1", "relu1", "relu1_q"]),
        layer(version, "conv2 + add + relu2", "CaskConvolution", [at("relu1_q", "int8"), at("stem", "float32")],
              [at("relu2", "float32")], ["conv2", "add", "relu2"]),
        layer(version, "relu2_q", "QDQ", [at("relu2", "float32")], [at("relu2_q", "int8")], ["relu2_q"]),
        layer(version, "conv3", "CaskConvolution", [at("relu2_q", "int8")], [at("conv3 inner", "float32")], ["conv3"]),
        layer(version, "Reformatting CopyNode for Output Tensor 0 to conv3", "Reformat", [at("conv3 inner", "float32")],
              [at("conv3", "float32")], []),
    ]  # fmt: skip
    if version == 10:
        return {"Layers": layers, "Bindings": ["x", "conv3"]}
    described = [("x", "Input"), ("conv3", "Output")]
    tensors = [
        {"Name": name, "IOMode": mode, "DataType": "Float", "Dimensions": list(shape), "Location": "Device",
         "IsShapeInferenceIO": False, "ProfileInfo": []}
        for name, mode in described
    ]  # fmt: skip
    return {"Layers": layers, "I/O Tensors": tensors}
