"""Reading an ONNX graph: producers, readers, constants, types, and quantizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_net import FP8, IMAGE, Net, residual
from onnx import TensorProto, helper

from fxq.backends.onnx_graph import OnnxGraph
from fxq.backends.onnx_nodes import Reader
from fxq.backends.onnx_residual import residual_adds


def test_readers_and_producers() -> None:
    graph = OnnxGraph(residual())
    block = graph.producers["stem_dq"]
    assert (block.op, block.inputs[0]) == ("DequantizeLinear", "stem_q")
    assert [(r.node.name if r.node else None, r.index) for r in graph.readers("stem_dq")] == [
        ("conv1", 0),
        ("add", 1),
    ]
    assert graph.readers("conv3") == [Reader(None)]
    assert graph.readers("nowhere") == []
    assert graph.inputs == {"x"}
    assert graph.outputs == {"conv3"}


def test_initializers_that_are_listed_as_inputs_are_constants() -> None:
    model = residual()
    model.graph.input.append(helper.make_tensor_value_info("conv1_b", TensorProto.FLOAT, [32]))
    graph = OnnxGraph(model)
    assert graph.inputs == {"x"}
    assert "conv1_b" in graph.fixed


def test_what_does_not_depend_on_an_input_is_fixed() -> None:
    net = Net()
    shape = net.op("Shape", ["x"], "shape")
    doubled = net.op("Add", [net.constant("a", np.float32(1)), "a"], "doubled")
    graph = OnnxGraph(net.model(net.op("Mul", ["x", doubled], "y"), shape))
    assert {"a", "doubled"} <= graph.fixed
    assert not {"x", "shape", "y"} & graph.fixed


def test_values_that_are_computed_from_constants() -> None:
    net = Net()
    tenth = net.op("Constant", [], "tenth", value_float=0.1)
    half = net.op("Cast", [net.constant("half64", np.array([0.5]))], "half", to=TensorProto.FLOAT)
    squeezed = net.op("Squeeze", [half], "squeezed")
    product = net.op("Mul", [tenth, squeezed], "product")
    net.op("Max", [product, net.constant("least", np.float32(0.2))], "scale")
    net.op("Sin", [product], "sine")
    graph = OnnxGraph(net.model(net.op("Add", ["x", "scale"], "y")))
    assert graph.array("product") == pytest.approx(0.05)
    assert graph.array("scale") == pytest.approx(0.2)
    assert graph.array("sine") is None
    assert graph.array("x") is None
    assert graph.array("") is None


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "int8"), (np.uint8, "uint8"), (FP8, "float8e4m3fn"), (np.int32, "int32")]
)
def test_the_quantized_type_is_the_zero_points(dtype: type, name: str) -> None:
    net = Net()
    net.qdq("x", dtype=dtype)
    quantizer, dequantizer = OnnxGraph(net.model("x_dq", opset=19)).quants
    assert (quantizer.quantizes, quantizer.dtype) == (True, name)
    assert (dequantizer.quantizes, dequantizer.dtype) == (False, name)


def test_without_a_zero_point_the_type_is_the_attributes_or_uint8() -> None:
    net = Net()
    scale = net.constant("scale", np.float32(0.1))
    net.op("QuantizeLinear", ["x", scale], "a")
    net.op("QuantizeLinear", ["x", scale], "b", output_dtype=TensorProto.INT8)
    net.op("DequantizeLinear", ["b", scale], "y")
    assert [q.dtype for q in OnnxGraph(net.model("y", opset=21)).quants] == ["uint8", "int8", "int8"]


def test_tensorrts_own_operators_are_quantizers() -> None:
    net = Net()
    scale = net.constant("scale", np.float32(0.1))
    net.op("TRT_FP8QuantizeLinear", ["x", scale], "x_q", domain="trt")
    net.op("TRT_FP8DequantizeLinear", ["x_q", scale], "x_dq", domain="trt")
    graph = OnnxGraph(net.model("x_dq"))
    assert [(q.dtype, q.quantizes) for q in graph.quants] == [("float8e4m3fn", True), ("float8e4m3fn", False)]
    assert graph.quantizer(graph.quants[1]) is graph.quants[0]


def test_axes_count_from_the_front() -> None:
    net = Net()
    scales = np.full(32, 0.1)
    net.q("x", "a", scales, axis=-3)
    net.q("x", "b", scales)
    net.q("x", "c", 0.1, axis=3)
    assert [q.axis for q in OnnxGraph(net.model("a", "b", "c")).quants] == [1, 1, None]


def test_same_compares_type_axis_and_scales() -> None:
    net = Net()
    for name, scale, options in (
        ("a", 0.1, {}),
        ("b", 0.1, {}),
        ("c", np.nextafter(np.float32(0.1), np.float32(1)), {}),
        ("d", 0.1, {"dtype": FP8}),
        ("e", np.full(32, 0.1), {"axis": 1}),
        ("f", np.full(16, 0.1), {"axis": 3}),
    ):
        net.q("x", name, scale, **options)
    first, *others = OnnxGraph(net.model(*"abcdef", opset=19)).quants
    assert [first.same(other) for other in others] == [True, False, False, False, False]
    assert others[0].scale_text == "scale 0.1"
    assert others[3].scale_text == "32 scales"


def test_a_pad_moves_values_only_if_it_adds_zeros() -> None:
    net = Net()
    pads = net.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    one, zero = (net.constant(name, np.float32(v)) for name, v in (("one", 1), ("zero", 0)))
    for name, more, options in (
        ("zeros", [zero], {}),
        ("default", [], {}),
        ("ones", [one], {}),
        ("mirrored", [], {"mode": "reflect"}),
    ):
        net.op("Pad", ["x", pads, *more], name, **options)
    graph = OnnxGraph(net.model("zeros", "default", "ones", "mirrored"))
    assert [graph.moves(reader) for reader in graph.readers("x")] == [True, True, False, True]


def test_only_the_first_input_is_moved() -> None:
    net = Net(x=IMAGE, i=(4,))
    indices = net.op("Cast", ["i"], "indices", to=TensorProto.INT64)
    graph = OnnxGraph(net.model(net.op("Gather", ["x", indices], "y")))
    assert [graph.moves(r) for r in (*graph.readers("x"), *graph.readers("indices"))] == [True, False]
    assert graph.origin("y") == "x"


def test_final_readers_lie_behind_what_moves() -> None:
    net = Net()
    pair = net.qdq("x")
    net.op("Split", [pair], "halves", outputs=2, axis=1, num_outputs=2)
    net.op("Relu", ["halves"], "relu")
    graph = OnnxGraph(net.model("relu", "halves.1", net.op("Identity", [pair], "same")))
    found = [r.node.name if r.node else "output" for r in graph.final_readers(pair)]
    assert found == ["relu", "output", "output"]


def test_names_that_are_missing_or_doubled_are_made_unique() -> None:
    net = Net()
    net.op("Relu", ["x"], "a")
    net.op("Relu", ["a"], "b")
    net.op("Relu", ["b"], "c")
    model = net.model("c")
    model.graph.node[0].name = model.graph.node[1].name = "twice"
    model.graph.node[2].name = ""
    assert [node.name for node in OnnxGraph(model).nodes] == ["Relu:a", "Relu:b", "Relu:c"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    """A model whose weights lie in a file that is gone can be read, if its scales are in the model."""
    path = tmp_path / "net.onnx"
    onnx.save(residual(), path, save_as_external_data=True, location="gone.data", size_threshold=2048)
    (tmp_path / "gone.data").unlink()
    graph = OnnxGraph(path)
    assert [r.add.name for r in residual_adds(graph)] == ["add"]
    assert graph.shape("conv1_w") == (32, 32, 3, 3)
    assert graph.shape("conv3") == (2, 32, 16, 16)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_longer_way_is_the_convolutions(swapped: bool) -> None:
    graph = OnnxGraph(residual(downsample=True, swapped=swapped))
    (found,) = residual_adds(graph)
    assert (found.conv.name, found.conv_edge, found.skip_edge) == ("conv2", int(swapped), 1 - int(swapped))
    assert found.other_conv is not None
    assert found.other_conv.name == "down"
    assert found.decided
