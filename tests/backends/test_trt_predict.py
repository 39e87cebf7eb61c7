"""The kernels that the documented fusions give, and how far a real builder agrees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_net import IMAGE, Make, Net, residual
from torchvision_models import torchvision_model

import fxq
from fxq.backends.onnx_graph import OnnxGraph
from fxq.backends.trt_agreement import compare_kernels
from fxq.backends.trt_build import build
from fxq.backends.trt_kernels import LayerInfo
from fxq.backends.trt_predict import predict_kernels
from fxq.errors import FxqError


def rows(model: onnx.ModelProto, library: str = "tensorrt") -> list[str]:
    """Kernel, precision and the types that it reads and writes, with its nodes."""
    return [
        f"{k.kind} {k.precision} {','.join(t.dtype for t in k.inputs)}->{','.join(t.dtype for t in k.outputs)}: "
        + " ".join(k.onnx_nodes)
        for k in predict_kernels(model, library=library).kernels
    ]


def test_a_convolution_takes_addition_activation_and_q_along() -> None:
    assert rows(residual("shared")) == [
        "PointWise float32 float32->int8: stem stem_q",
        "Conv int8 int8->int8: conv1 relu1 relu1_q",
        "Conv int8 int8,int8->int8: conv2 add relu2 relu2_q",
        "Conv int8 int8->float32: conv3",
    ]


def test_a_float_skip_keeps_the_q_behind_it_out_of_the_kernel() -> None:
    assert rows(residual(None)) == [
        "PointWise float32 float32->float32,int8: stem stem_q",
        "Conv int8 int8->int8: conv1 relu1 relu1_q",
        "Conv int8 int8,float32->float32: conv2 add relu2",
        "Quantize float32 float32->int8: relu2_q",
        "Conv int8 int8->float32: conv3",
    ]


def test_the_other_library_writes_sums_in_float() -> None:
    assert rows(residual("shared"), "tensorrt-rtx") == [
        "PointWise float32 float32->int8: stem stem_q",
        "Conv int8 int8->float32: conv1",
        "PointWise float32 float32->int8: conv1 relu1 relu1_q",
        "Conv int8 int8->float32: conv2",
        "PointWise float32 float32,int8->int8: conv2 add relu2 relu2_q",
        "Conv int8 int8->float32: conv3",
        "PointWise float32 float32->float32: conv3",
    ]


def silu() -> onnx.ModelProto:
    net = Net()
    conv = net.conv(net.qdq("x"), "conv")
    act = net.op("Mul", [conv, net.op("Sigmoid", [conv], "gate")], "act")
    return net.model(net.conv(net.qdq(act), "next"))


def pooled() -> onnx.ModelProto:
    net = Net()
    first = net.op("Relu", [net.conv(net.qdq("x"), "first")], "relu")
    pool = net.op("MaxPool", [first], "pool", kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.conv(net.qdq(pool), "second"))


def concat(*scales: float) -> onnx.ModelProto:
    net = Net()
    source = net.qdq("x")
    parts = [net.qdq(net.conv(source, f"branch{i}"), scale) for i, scale in enumerate(scales)]
    return net.model(net.conv(net.op("Concat", parts, "joined", axis=1), "conv", (64, 32)))


def transformer() -> onnx.ModelProto:
    """A normalization written out, a matrix product with bias and GELU in single steps, attention scores."""
    net = Net(x=(2, 16, 64))
    axes = net.constant("axes", np.array([-1]))
    mean = net.op("ReduceMean", ["x", axes], "mean")
    centred = net.op("Sub", ["x", mean], "centred")
    square = net.op("Mul", [centred, centred], "square")
    variance = net.op("ReduceMean", [square, axes], "variance")
    root = net.op("Sqrt", [net.op("Add", [variance, net.constant("eps", np.float32(1e-5))], "shifted")], "root")
    norm = net.op("Div", [centred, root], "norm")
    wide = net.op("MatMul", [net.qdq(norm), net.weight("wide", (64, 64), 1)], "wide")
    wide = net.op("Add", [wide, net.constant("bias", np.zeros(64, np.float32))], "biased")
    half = net.op("Mul", [wide, net.constant("r", np.float32(0.7071))], "scaled")
    gate = net.op("Add", [net.op("Erf", [half], "erf"), net.constant("one", np.float32(1))], "plus")
    gelu = net.op("Mul", [net.op("Mul", [wide, gate], "times"), net.constant("h", np.float32(0.5))], "gelu")
    keys = net.op("Transpose", [gelu], "keys", perm=[0, 2, 1])
    keys = net.op("Mul", [keys, net.constant("s", np.float32(0.125))], "factor")
    return net.model(net.op("Softmax", [net.op("MatMul", [gelu, keys], "scores")], "weights", axis=-1))


FUSIONS: dict[str, tuple[onnx.ModelProto, list[str]]] = {
    "SiLU": (silu(), ["x_q", "conv gate act act_q", "next"]),
    "Q passes back through a pool": (pooled(), ["x_q", "first relu pool_q", "pool", "second"]),
    "concat of one scale": (concat(0.05, 0.05), ["x_q", "branch0 branch0_q", "branch1 branch1_q", "conv"]),
    "concat of two": (concat(0.05, 0.06), ["x_q", "branch0 branch0_q", "branch1 branch1_q", "joined", "conv"]),
    "transformer": (
        transformer(),
        [
            "mean centred square variance shifted root norm norm_q",
            "wide biased scaled erf plus times gelu",
            "factor scores",
            "weights",
        ],
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fusions(name: str) -> None:
    model, wanted = FUSIONS[name]
    assert [" ".join(kernel.onnx_nodes) for kernel in predict_kernels(model).kernels] == wanted


def test_a_pool_between_int8_tensors_is_int8() -> None:
    pool = predict_kernels(pooled()).kernel_of("pool")
    assert pool is not None
    assert (pool.inputs[0].dtype, pool.outputs[0].dtype) == ("int8", "int8")


def test_a_convolution_behind_a_concat_of_two_scales_is_float() -> None:
    precisions = [predict_kernels(concat(0.05, scale)).kernels[-1].precision for scale in (0.05, 0.06)]
    assert precisions == ["int8", "float32"]


def test_bytes_are_counted() -> None:
    prediction = predict_kernels(residual("shared"))
    elements = int(np.prod(IMAGE))
    sizes = [kernel.activation_bytes for kernel in prediction.kernels]
    assert sizes == [5 * elements, 2 * elements, 3 * elements, 5 * elements]
    assert prediction.activation_bytes == 15 * elements
    assert (
        prediction.kernels[1].weight_bytes == 32 * 32 * 9 + 4 * 32 + 5
    )  # weight, bias, the scale and zero point of the Q


def test_a_dynamic_batch_has_no_bytes() -> None:
    net = Net(x=("n", 32, 16, 16))
    prediction = predict_kernels(net.model(net.conv(net.qdq("x"), "conv")))
    assert prediction.activation_bytes is None
    assert "depend on the batch" in prediction.summary()


def test_text_and_dictionary_say_the_same() -> None:
    prediction = predict_kernels(residual("shared"))
    data = json.loads(json.dumps(prediction.to_dict()))
    assert [kernel["onnx_nodes"] for kernel in data["kernels"]] == [list(k.onnx_nodes) for k in prediction.kernels]
    assert "conv2 + add + relu2 + relu2_q" in str(prediction)
    assert data["vanished"] == list(prediction.vanished)


def test_an_unknown_library() -> None:
    with pytest.raises(FxqError, match="no kernel library is called 'tf'"):
        predict_kernels(silu(), library="tf")


BUILT: dict[str, Make] = {
    "shared skip": lambda: residual("shared"),
    "float skip": lambda: residual(None),
    "downsample": lambda: residual("own", downsample=True),
    "silu": silu,
    "pool": pooled,
    "concat": lambda: concat(0.05, 0.05),
    "unequal concat": lambda: concat(0.05, 0.06),
}


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("name", BUILT)
def test_the_builder_agrees(name: str, tmp_path: Path) -> None:
    model = BUILT[name]()
    engine = build(model.SerializeToString(), tmp_path / "net.engine")
    assert engine.kernels
    for library in ("tensorrt", "tensorrt-rtx"):
        found = compare_kernels(OnnxGraph(model), predict_kernels(model, library=library).kernels, engine.kernels)
        assert found.precision_share == 1, found.precision_differs
        assert found.weighted >= 2
        assert found.fusion_share >= 0.7, found.fusion_differs


@pytest.mark.slow
@pytest.mark.usefixtures("trt")
def test_a_real_network(tmp_path: Path) -> None:
    import torch

    image = torch.randn(2, 3, 64, 64)
    model = torchvision_model("mobilenet_v3_small")
    path = fxq.export(fxq.quantize(model, [image], progress=False), tmp_path / "net.onnx", dynamic_shapes=None)
    engine = build(path, tmp_path / "net.engine")
    prediction = fxq.predict(path, library="tensorrt-rtx")
    found = compare_kernels(OnnxGraph(path), prediction.kernels, engine.kernels or ())
    assert found.precision_share == 1
    assert found.kernels[0] == found.kernels[1]
    assert found.fusion_share > 0.9
    assert all(kernel.module_path for kernel in prediction.weighted)


def test_agreement_counts_what_differs() -> None:
    model = silu()
    predicted = predict_kernels(model).kernels
    apart = [LayerInfo(node, "PointWise", onnx_nodes=(node,)) for k in predicted for node in k.onnx_nodes]
    found = compare_kernels(OnnxGraph(model), predicted, apart)
    assert found.precision_differs == ("conv", "next")
    assert ("conv", "gate") in found.apart
    assert found.fusion_share < 1
    same = compare_kernels(OnnxGraph(model), predicted, predicted)
    assert (same.precision_share, same.fusion_share, same.fusion_differs) == (1, 1, ())
