"""Reading kernels from a builder's log and from the engine inspector."""

from __future__ import annotations

import json
from typing import Any

import pytest
from inspector import float_skip

from fxq.backends.trt_kernels import LayerInfo, TensorInfo, kernels_from_inspector, kernels_from_log


def tensor(name: str, dims: str, dtype: str) -> str:
    """A tensor as TensorRT-RTX's log writes it."""
    shape = f"Dimensions: [{dims}], Strides: [144,1,48,16], StrideOrder: [3,0,2,1]"
    return f"{{ Name: {name}, {shape}, Datatype: {dtype}, Format: (NHWC) Channel major }}"


def line(name: str, kind: str, inputs: str, constants: str, outputs: str, metadata: str) -> str:
    """A kernel as TensorRT-RTX's log writes it."""
    lists = f"Inputs: [{inputs}], Constants: [{constants}], Outputs: [{outputs}]"
    return f"Name: {name}, LayerType: {kind}, {lists}, TacticName: stub, StreamId: 0, Metadata: {metadata}"


X = " " + tensor("x", "8,16,4,4", "Int8")
WEIGHT = " " + tensor("w", "32,16,3,3", "Int8") + ", " + tensor("scale", "1,32,1,1", "Float")
CONV = line("conv_0", "correlation", X, WEIGHT, " " + tensor("y", "8,32,4,4", "Float"), "[ONNX Layer: layer1.0/conv]")
TAIL = "\n\nI/O Tensors:\n Name: x, IOMode: Input, DataType: Float, Dimensions: [8,16,4,4]\n\nEngine Metadata:\n"


def read(*lines: str) -> tuple[LayerInfo, ...]:
    """The kernels of a log that lists these lines."""
    found = kernels_from_log(["something before", "Layers:\n" + "\n".join(lines) + TAIL, "after"])
    assert found is not None
    return found


def test_a_line_is_read_whole() -> None:
    (kernel,) = read(CONV)
    assert kernel == LayerInfo(
        name="conv_0",
        kind="correlation",
        inputs=(TensorInfo("x", (8, 16, 4, 4), "int8"),),
        outputs=(TensorInfo("y", (8, 32, 4, 4), "float32"),),
        constants=(TensorInfo("w", (32, 16, 3, 3), "int8"), TensorInfo("scale", (1, 32, 1, 1), "float32")),
        tactic="stub",
        onnx_nodes=("layer1.0/conv",),
    )
    assert kernel.weighted
    assert kernel.reads_int8
    assert kernel.weights is kernel.constants[0]
    assert kernel.activation_bytes == 8 * 16 * 16 + 4 * 8 * 32 * 16


def test_onnx_names_are_told_apart_by_any_separator() -> None:
    for separator in ("", " ", "\x1e", "\x1f"):
        metadata = separator.join(f"[ONNX Layer: {name}]" for name in ("a", "b.c[0]", "a", "d e"))
        (kernel,) = read(line("k", "kgen", X, "", X, metadata))
        assert kernel.onnx_nodes == ("a", "b.c[0]", "d e"), repr(separator)


def test_bookkeeping_is_no_kernel_and_the_last_listing_counts() -> None:
    shape_call = line("s", "shape_call", "", "", "", "")
    wait = line("w", "wait", "", "", "", "").replace("Metadata", "EventId: 1, Metadata")
    assert [kernel.name for kernel in read(shape_call, CONV, wait)] == ["conv_0"]
    assert kernels_from_log(["Layers:\n" + CONV + TAIL, "Layers:\n" + TAIL]) == ()


def test_a_log_without_a_listing_is_not_an_empty_engine() -> None:
    assert kernels_from_log(["After reformat layers: 1 layers", "Engine generation completed"]) is None


def test_a_line_of_another_layout_is_kept_and_says_so() -> None:
    (kernel,) = read("Name: odd, LayerType: kgen, Something: else")
    assert (kernel.name, kernel.kind, kernel.inputs) == ("odd", "unknown", ())
    assert not kernel.reads_int8


@pytest.mark.parametrize(
    ("kind", "name", "weighted"),
    [
        ("correlation", "conv_0", True),
        ("gemm", "fc", True),
        ("gett", "einsum", True),
        ("deconvolution", "up", True),
        ("CaskConvolution", "conv1 + relu", True),
        ("CaskGemmConvolution", "conv1", True),
        ("CaskConvActPool", "conv0 + relu0 + pool0", True),
        ("CaskDeconvolutionV2", "up", True),
        ("MatrixMultiply", "fc", True),
        ("runtime_fusion", "__myl_FcAddRelu_0", True),
        ("runtime_fusion", "__myl_AddRelu_0", False),
        ("fusion", "__myl_ResMulGemmAdd", True),
        ("kgen", "__myl_MulAddConvertRelu", False),
        ("PointWiseV2", "PWN(conv1_relu)", False),
        ("Reformat", "Reformatting CopyNode for Input Tensor 0 to conv1", False),
        ("CaskPooling", "pool", False),
    ],
)
def test_which_kernels_are_weighted(kind: str, name: str, weighted: bool) -> None:
    assert LayerInfo(name=name, kind=kind).weighted is weighted


@pytest.mark.parametrize(
    ("activation", "weight", "int8"),
    [
        ("int8", "int8", True),
        ("int8", "float32", False),
        ("float32", "int8", False),
        ("float16", "float16", False),
    ],
)
def test_int8_needs_both_activation_and_weight(activation: str, weight: str, int8: bool) -> None:
    kernel = LayerInfo(
        name="conv",
        kind="correlation",
        inputs=(TensorInfo("x", (1, 16, 4, 4), activation), TensorInfo("skip", (1, 16, 4, 4), "float32")),
        constants=(TensorInfo("w", (16, 16, 3, 3), weight), TensorInfo("b", (16,), "float32")),
    )
    assert kernel.reads_int8 is int8


def test_product_of_two_activations_needs_both_in_int8() -> None:
    def product(second: str) -> LayerInfo:
        inputs = (TensorInfo("q", (1, 4, 8), "int8"), TensorInfo("k", (1, 8, 4), second))
        return LayerInfo("qk", "gemm", inputs, constants=(TensorInfo("alpha", (1,), "float32"),))

    assert product("int8").weights is None
    assert product("int8").reads_int8
    assert not product("float32").reads_int8


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("float32", (2, 3), 24),
        ("bfloat16", (2, 3), 12),
        ("int4", (3,), 2),
        ("bool", (), 1),
        ("int8", (-1, 3), None),
        ("Complex", (3,), None),
    ],
)
def test_sizes(dtype: str, shape: tuple[int, ...], nbytes: int | None) -> None:
    assert TensorInfo("t", shape, dtype).nbytes == nbytes


# Written by hand after NVIDIA's documentation of the inspector, not recorded from an engine. 10.x joins
# format and type and gives weights as a type and a count; 11.x gives the type in a field of its own.
INSPECTOR_10: dict[str, Any] = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv1",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Dimensions": [8, 16, 4, 4], "Format/Datatype": "Row major linear FP32 format"}],
            "Outputs": [
                {
                    "Name": "x8",
                    "Dimensions": [8, 16, 4, 4],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
                }
            ],
            "TacticName": "",
            "Metadata": "",
        },
        {
            "Name": "conv1 + relu1",
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "x8",
                    "Dimensions": [8, 16, 4, 4],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
                }
            ],
            "Outputs": [
                {
                    "Name": "y",
                    "Dimensions": [8, 32, 4, 4],
                    "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
                }
            ],
            "ParameterType": "Convolution",
            "OutMaps": 32,
            "Weights": {"Type": "Int8", "Count": 4608},
            "Bias": {"Type": "Float", "Count": 32},
            "TacticName": "sm80_xmma_fprop",
            "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
        },
    ],
    "Bindings": ["x", "y"],
}


def as_version_11(layers: dict[str, Any]) -> dict[str, Any]:
    """The same engine in the schema of 11.x."""
    words = {"FP32": "Float", "FP16": "Half", "Int8": "Int8"}
    changed = json.loads(json.dumps(layers))
    for layer in changed["Layers"]:
        for one in (*layer["Inputs"], *layer["Outputs"]):
            joined = one.pop("Format/Datatype")
            one["Format"] = joined
            one["Datatype"] = next(ours for word, ours in words.items() if word in joined)
    changed["I/O Tensors"] = [{"Name": name} for name in changed.pop("Bindings")]
    return changed  # type: ignore[no-any-return] # json.loads


@pytest.mark.parametrize("layers", [INSPECTOR_10, as_version_11(INSPECTOR_10)], ids=["10.x", "11.x"])
def test_inspector_of_both_versions(layers: dict[str, Any]) -> None:
    kernels = kernels_from_inspector(json.dumps(layers))
    assert kernels is not None
    reformat, conv = kernels
    assert [str(one) for one in (*reformat.inputs, *reformat.outputs)] == [
        "x float32[8, 16, 4, 4]",
        "x8 int8[8, 16, 4, 4]",
    ]
    assert not reformat.weighted
    assert conv.weighted
    assert conv.reads_int8
    assert conv.outputs[0].dtype == "float16"
    assert conv.onnx_nodes == ("conv1", "relu1")


def undescribed(layers: dict[str, Any]) -> dict[str, Any]:
    """The same engine with a dynamic batch, whose tensors 10.x does not describe."""
    changed = json.loads(json.dumps(layers))
    for layer in changed["Layers"]:
        for one in (*layer["Inputs"], *layer["Outputs"]):
            one["Dimensions"][0] = -1
            one["Format/Datatype"] = "N/A due to dynamic shapes"
    return changed  # type: ignore[no-any-return] # json.loads


def test_weights_tell_the_type_where_shapes_are_dynamic() -> None:
    kernels = kernels_from_inspector(json.dumps(undescribed(INSPECTOR_10)))
    assert kernels is not None
    reformat, conv = kernels
    assert [str(one) for one in (*reformat.inputs, *conv.outputs)] == [
        "x unknown[-1, 16, 4, 4]",
        "y unknown[-1, 32, 4, 4]",
    ]
    assert conv.reads_int8
    assert not reformat.reads_int8
    half = undescribed(INSPECTOR_10)
    half["Layers"][1]["Weights"]["Type"] = "Half"
    other = kernels_from_inspector(json.dumps(half))
    assert other is not None
    assert not other[1].reads_int8


@pytest.mark.parametrize(
    ("tactic", "int8"),
    [
        ("sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_by_fusion_tactic", True),
        ("sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_by_fusion_tactic", False),
        ("", False),
    ],
)
def test_tactics_tell_the_type_of_products_where_shapes_are_dynamic(tactic: str, int8: bool) -> None:
    tensors = tuple(TensorInfo(name, (-1, 4, 8), "unknown") for name in "qk")
    assert LayerInfo("qk", "gemm", tensors, tactic=tactic).reads_int8 is int8


def test_a_reformat_that_quantizes_is_told_from_one_that_does_not() -> None:
    kernels = kernels_from_inspector(json.dumps(float_skip(10, (1, 32, 8, 8))))
    assert kernels is not None
    assert [kernel.kind for kernel in kernels] == [
        "PointWiseV2",
        "QDQ",
        "CaskConvolution",
        "CaskConvolution",
        "QDQ",
        "CaskConvolution",
        "Reformat",
    ]
    assert kernels[1].onnx_nodes == ("stem_q",)


# The same as lines, as trtexec --dumpLayerInfo prints what 10.x says: types joined with formats, or alone.
INT8 = "Format/Datatype: Thirty-two wide channel vectorized row major Int8 format"
LINES_10 = f"""[I] Layers:
Name: x_q, LayerType: Reformat, Inputs: [ {{ Name: x, Location: Device, Dimensions: [1,16,4,4], \
Format/Datatype: Row major linear FP32 format }}], Outputs: [ {{ Name: x8, Location: Device, Dimensions: [1,16,4,4], \
{INT8} }}], ParameterType: Reformat, Origin: QDQ, TacticValue: 0x0, StreamId: 0, \
Metadata: [ONNX Layer: x_q]
Name: conv1 + relu1, LayerType: CaskConvolution, Inputs: [ {{ Name: x8, Location: Device, Dimensions: [1,16,4,4], \
{INT8} }}], Outputs: [ {{ Name: y, Location: Device, Dimensions: [1,32,4,4], Format/Datatype: Channel major FP16 \
format where channel % 8 == 0 }}], ParameterType: Convolution, Stride: [1,1], TacticName: sm80_xmma_fprop, \
TacticValue: 0x11, \
StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: relu1]
Name: __myl_AddMul_myl0_1, LayerType: kgen, Inputs: [ {{ Name: y, Dimensions: [1,32,4,4], Format/Datatype: Half }}], \
Outputs: [ {{ Name: z, Dimensions: [1,32,4,4], Format/Datatype: Half }}], TacticName: __myl_AddMul_0xf2, StreamId: 0, \
Metadata: [ONNX Layer: add][ONNX Layer: mul]

Bindings:
x
z
"""


def test_lines_of_version_10() -> None:
    kernels = kernels_from_log([LINES_10])
    assert kernels is not None
    assert [kernel.kind for kernel in kernels] == ["QDQ", "CaskConvolution", "kgen"]
    assert [[str(one) for one in (*kernel.inputs, *kernel.outputs)] for kernel in kernels] == [
        ["x float32[1, 16, 4, 4]", "x8 int8[1, 16, 4, 4]"],
        ["x8 int8[1, 16, 4, 4]", "y float16[1, 32, 4, 4]"],
        ["y float16[1, 32, 4, 4]", "z float16[1, 32, 4, 4]"],
    ]
    assert [kernel.onnx_nodes for kernel in kernels] == [("x_q",), ("conv1", "relu1"), ("add", "mul")]
    assert [kernel.tactic for kernel in kernels] == ["", "sm80_xmma_fprop", "__myl_AddMul_0xf2"]


def test_inspector_of_an_engine_without_details() -> None:
    assert kernels_from_inspector('{"Layers": ["conv1 + relu1", "fc"]}') is None
    assert kernels_from_inspector("{}") is None
