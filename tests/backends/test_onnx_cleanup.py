"""Cleanup of ONNX graphs: each step does its work, declines the rest, and finds nothing a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxq.backends import onnx_cleanup
from fxq.backends.onnx_cleanup import STEPS, Step, clean
from fxq.errors import ExportError

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def parse(text: str) -> onnx.ModelProto:
    """A model from ONNX's text form, with the types of all tensors and a name for every node."""
    model = onnx.parser.parse_model(f"{HEAD} g {text}")
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    random = np.random.default_rng(0)
    feeds = {
        v.name: (random.standard_normal([d if isinstance(d, int) else 2 for d in v.shape]) * 3).astype(np.float32)
        for v in session.get_inputs()
    }
    return session.run(None, feeds)


@contextmanager
def quiet() -> Iterator[None]:
    with gs.logger.G_LOGGER.suppress():
        yield


def apply(step: Step, model: onnx.ModelProto) -> tuple[int, onnx.ModelProto]:
    """One step's count, and the model after it and after dead nodes are gone; a second run finds nothing."""
    with quiet():
        graph = gs.import_onnx(model)
        count = step(graph)
        graph.cleanup()
        assert step(graph) == 0
        after = gs.export_onnx(graph, do_type_check=False)
    onnx.checker.check_model(after, full_check=True)
    for one, other in zip(run(model), run(after), strict=True):
        np.testing.assert_array_equal(one, other)
    return count, after


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# Constants


def test_constants_are_folded() -> None:
    model = parse("""(float[2,3] x) => (float[2,3] y) <float[3,1] w = {1.0, 2.0, 3.0}> {
        two = Constant <value_float = 2.0> ()
        t = Transpose <perm = [1, 0]> (w)
        s = Mul (t, two)
        y = Add (x, s)
    }""")
    count, after = apply(onnx_cleanup.fold_constants, model)
    assert count == 3
    assert ops(after) == ["Add"]
    np.testing.assert_array_equal(numpy_helper.to_array(after.graph.initializer[0]), [[2, 4, 6]])


def test_shapes_that_are_known_are_folded_and_others_stay() -> None:
    model = parse("""(float[n,6] x) => (int64[1] rows, int64[1] columns) {
        rows = Shape <start = 0, end = 1> (x)
        one = Constant <value_ints = [1]> ()
        all = Shape (x)
        columns = Gather (all, one)
    }""")
    _, after = apply(onnx_cleanup.fold_constants, model)
    assert "Shape" in ops(after)
    assert run(after)[1].tolist() == [6]


WEIGHT = """<float s = {0.5}, int8 z = {0}, float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0},
    int8[2,2] q = {1, 2, 3, 4}, float[2,2] w = {1.0, 2.0, 3.0, 4.0}>"""


def test_a_weights_quantization_is_never_folded() -> None:
    model = parse(f"""(float[2,2] x) => (float[2,2] y) {WEIGHT} {{
        stored = DequantizeLinear <axis = 0> (q, ws, wz)
        a = MatMul (x, stored)
        i = QuantizeLinear (w, s, z)
        both = DequantizeLinear (i, s, z)
        y = MatMul (a, both)
    }}""")
    result, counts = clean(model)
    assert not counts
    assert ops(result) == ["DequantizeLinear", "MatMul", "QuantizeLinear", "DequantizeLinear", "MatMul"]


def test_what_depends_on_a_weights_dq_is_not_folded_either() -> None:
    model = parse(f"""(float[2,2] x) => (float[2,2] y) {WEIGHT} {{
        stored = DequantizeLinear <axis = 0> (q, ws, wz)
        sign = Neg (stored)
        y = MatMul (x, sign)
    }}""")
    assert apply(onnx_cleanup.fold_constants, model)[0] == 0


def test_what_would_grow_the_file_is_not_folded() -> None:
    model = parse("""(float[300,300] x) => (float[300,300] y)
        <int64[2] big = {300, 300}, float[1] one = {1.0}> {
        ones = Expand (one, big)
        y = Add (x, ones)
    }""")
    assert apply(onnx_cleanup.fold_constants, model)[0] == 0


def test_equal_scales_and_zero_points_become_one() -> None:
    model = parse("""(float[2] x, float[2] w) => (float[2] y, float[2] v)
        <float s1 = {0.5}, float s2 = {0.5}, float s3 = {0.25}, int8 z1 = {0}, int8 z2 = {0}, uint8 u = {0}> {
        a = QuantizeLinear (x, s1, z1)
        y = DequantizeLinear (a, s2, z2)
        b = QuantizeLinear (w, s3, u)
        v = DequantizeLinear (b, s3, u)
    }""")
    count, after = apply(onnx_cleanup.merge_constants, model)
    assert count == 2
    # The other scale and the zero point of another type are different constants.
    assert {t.name for t in after.graph.initializer} == {"s1", "s3", "z1", "u"}


# Q and DQ


def test_duplicate_quantizers_of_one_tensor_become_one() -> None:
    model = parse("""(float[2] x) => (float[2] y, float[2] w)
        <float s = {0.5}, float t = {0.5}, int8 z = {0}> {
        a = QuantizeLinear (x, s, z)
        b = DequantizeLinear (a, s, z)
        c = QuantizeLinear (x, t, z)
        d = DequantizeLinear (c, t, z)
        y = Relu (b)
        w = Neg (d)
    }""")
    count, after = apply(onnx_cleanup.merge_duplicates, model)
    assert count == 2
    assert ops(after) == ["QuantizeLinear", "DequantizeLinear", "Relu", "Neg"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("QuantizeLinear (x, s, z)", "QuantizeLinear (x, t, z)"),
        ("QuantizeLinear (x, s, z)", "QuantizeLinear (x, s, n)"),
        ("QuantizeLinear <axis = 0> (x, v, vz)", "QuantizeLinear <axis = 1> (x, v, vz)"),
        ("QuantizeLinear (x, s, z)", "QuantizeLinear (x2, s, z)"),
    ],
)
def test_different_quantizers_stay_apart(first: str, second: str) -> None:
    model = parse(f"""(float[2,2] x, float[2,2] x2) => (int8[2,2] c, int8[2,2] d)
        <float s = {{0.5}}, float t = {{0.25}}, int8 z = {{0}}, int8 n = {{3}},
         float[2] v = {{0.5, 0.25}}, int8[2] vz = {{0, 0}}> {{
        a = {first}
        b = {second}
        c = Identity (a)
        d = Identity (b)
    }}""")
    assert apply(onnx_cleanup.merge_duplicates, model)[0] == 0


def test_a_duplicate_that_is_an_output_keeps_its_name() -> None:
    model = parse("""(float[2] x) => (int8[2] a, int8[2] b) <float s = {0.5}, int8 z = {0}> {
        a = QuantizeLinear (x, s, z)
        b = QuantizeLinear (x, s, z)
    }""")
    count, after = apply(onnx_cleanup.merge_duplicates, model)
    assert count == 0
    assert [v.name for v in after.graph.output] == ["a", "b"]


def test_quantizing_again_with_one_scale_is_removed() -> None:
    model = parse("""(float[2,8] x) => (float[2,8] y)
        <float s = {0.0371}, float same = {0.0371}, int8 z = {-3}, int8 zz = {-3}> {
        a = QuantizeLinear (x, s, z)
        b = DequantizeLinear (a, s, z)
        c = QuantizeLinear (b, same, zz)
        y = DequantizeLinear (c, s, z)
    }""")
    count, after = apply(onnx_cleanup.remove_requantization, model)
    assert count == 1
    assert ops(after) == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(
    "again",
    [
        "QuantizeLinear (b, t, z)",  # another scale
        "QuantizeLinear (b, s, n)",  # another zero point
        "QuantizeLinear (b, s, u)",  # another type
        "QuantizeLinear <axis = 1> (b, v, vz)",  # per channel
    ],
)
def test_a_real_requantization_stays(again: str) -> None:
    model = parse(f"""(float[2,2] x) => (float[2,2] y)
        <float s = {{0.5}}, float t = {{0.25}}, int8 z = {{0}}, int8 n = {{3}}, uint8 u = {{0}},
         float[2] v = {{0.5, 0.25}}, int8[2] vz = {{0, 0}}> {{
        a = QuantizeLinear (x, s, z)
        b = DequantizeLinear (a, s, z)
        c = {again}
        d = Cast <to = 1> (c)
        e = Relu (b)
        y = Add (d, e)
    }}""")
    assert apply(onnx_cleanup.remove_requantization, model)[0] == 0


def test_requantization_without_zero_points_goes_by_the_types() -> None:
    same = parse("""(uint8[2] x) => (uint8[2] y) <float s = {0.5}> {
        b = DequantizeLinear (x, s)
        c = QuantizeLinear (b, s)
        y = Identity (c)
    }""")
    other = parse("""(int8[2] x) => (uint8[2] y) <float s = {0.5}> {
        b = DequantizeLinear (x, s)
        c = QuantizeLinear (b, s)
        y = Identity (c)
    }""")
    for model, expected in ((same, 1), (other, 0)):
        with quiet():
            graph = gs.import_onnx(model)
            assert onnx_cleanup.remove_requantization(graph) == expected


def test_an_integer_weight_is_transposed_where_it_is_stored() -> None:
    model = parse("""(float[4,3] x) => (float[4,2] y)
        <int8[2,3] w = {1, 2, 3, 4, 5, 6}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
        d = DequantizeLinear <axis = 0> (w, s, z)
        t = Transpose <perm = [1, 0]> (d)
        y = MatMul (x, t)
    }""")
    count, after = apply(onnx_cleanup.transpose_weights, model)
    assert count == 1
    assert ops(after) == ["DequantizeLinear", "MatMul"]
    (stored,) = (t for t in after.graph.initializer if t.name == "w_transposed")
    np.testing.assert_array_equal(numpy_helper.to_array(stored), [[1, 4], [2, 5], [3, 6]])
    assert {a.name: a.i for a in after.graph.node[0].attribute} == {"axis": 1}
    assert list(after.graph.node[0].output) == ["d_transposed"]


def test_a_weight_that_others_read_too_is_not_transposed() -> None:
    model = parse("""(float[2,2] x) => (float[2,2] y)
        <int8[2,2] w = {1, 2, 3, 4}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
        d = DequantizeLinear <axis = 0> (w, s, z)
        t = Transpose <perm = [1, 0]> (d)
        a = MatMul (x, t)
        y = MatMul (a, d)
    }""")
    assert apply(onnx_cleanup.transpose_weights, model)[0] == 0


def test_a_shared_stored_weight_keeps_its_first_orientation() -> None:
    model = parse("""(float[2,2] x) => (float[2,2] y)
        <int8[2,2] w = {1, 2, 3, 4}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0}> {
        d = DequantizeLinear <axis = 0> (w, s, z)
        t = Transpose (d)
        a = MatMul (x, t)
        e = DequantizeLinear <axis = 0> (w, s, z)
        y = MatMul (a, e)
    }""")
    count, after = apply(onnx_cleanup.transpose_weights, model)
    assert count == 1
    assert {t.name for t in after.graph.initializer} >= {"w", "w_transposed"}


# What changes nothing


def test_identities_go_and_outputs_keep_their_names() -> None:
    model = parse("""(float[2] x) => (float[2] y, float[2] z) {
        a = Identity (x)
        b = Relu (a)
        c = Identity (b)
        y = Identity (c)
        z = Neg (b)
    }""")
    count, after = apply(onnx_cleanup.remove_identities, model)
    assert count == 3
    assert ops(after) == ["Relu", "Neg"]
    assert [v.name for v in after.graph.output] == ["y", "z"]


def test_an_identity_between_an_input_or_an_output_and_an_output_stays() -> None:
    model = parse("""(float[2] x) => (float[2] y, float[2] a, float[2] b) {
        y = Identity (x)
        a = Relu (x)
        b = Identity (a)
    }""")
    assert apply(onnx_cleanup.remove_identities, model)[0] == 0


def test_needless_casts_go() -> None:
    model = parse("""(float[2] x) => (float[2] y) {
        a = Cast <to = 1> (x)
        b = Cast <to = 11> (a)
        c = Cast <to = 1> (b)
        y = Relu (c)
    }""")
    count, after = apply(onnx_cleanup.remove_identities, model)
    assert count == 2
    assert ops(after) == ["Relu"]


def test_a_cast_that_rounds_stays() -> None:
    model = parse("""(float[2] x) => (float[2] y) {
        a = Cast <to = 6> (x)
        b = Cast <to = 1> (a)
        y = Relu (b)
    }""")
    assert apply(onnx_cleanup.remove_identities, model)[0] == 0


def test_dead_nodes_go_and_unused_inputs_stay() -> None:
    model = parse("""(float[2] x, float[2] unused) => (float[2] y) {
        y = Relu (x)
        a = Neg (x)
        b = Neg (a)
    }""")
    count, after = apply(onnx_cleanup.remove_dead, model)
    assert count == 2
    assert [v.name for v in after.graph.input] == ["x", "unused"]


# All together


MIXED = """(float[n,2] x) => (float[n,2] y)
    <float s = {0.5}, float s2 = {0.5}, int8 z = {0}, int8[2,2] w = {1, 2, 3, 4}, float[2] ws = {0.1, 0.2},
     int8[2] wz = {0, 0}> {
    x1 = Identity (x)
    q1 = QuantizeLinear (x1, s, z)
    d1 = DequantizeLinear (q1, s, z)
    q2 = QuantizeLinear (x, s2, z)
    d2 = DequantizeLinear (q2, s2, z)
    q3 = QuantizeLinear (d2, s, z)
    d3 = DequantizeLinear (q3, s, z)
    dw = DequantizeLinear <axis = 0> (w, ws, wz)
    tw = Transpose <perm = [1, 0]> (dw)
    m = MatMul (d1, tw)
    a = Add (m, d3)
    dead = Neg (a)
    y = Identity (a)
}"""


def test_the_steps_together_reach_a_fixpoint_and_keep_the_values() -> None:
    model = parse(MIXED)
    before = model.SerializeToString()
    result, counts = clean(model)
    assert model.SerializeToString() == before
    assert ops(result) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add"]
    assert counts["remove_requantization"] == counts["transpose_weights"] == 1
    assert counts["remove_dead"] == 1
    assert counts["remove_identities"] == 2
    assert counts["merge_duplicates"] == 3
    onnx.checker.check_model(result, full_check=True)
    np.testing.assert_array_equal(run(model)[0], run(result)[0])
    again, none = clean(result)
    assert not none
    assert again.SerializeToString() == result.SerializeToString()


def test_metadata_survives_in_subgraphs_too() -> None:
    model = parse("""(float[2] x, bool c) => (float[2] y) {
        r = Relu (x)
        y = If (c) <then_branch = g1 () => (float[2] t) { t = Neg (r) },
                    else_branch = g2 () => (float[2] e) { e = Identity (r) }>
    }""")
    model.metadata_props.add(key="model", value="m")
    model.graph.metadata_props.add(key="graph", value="g")
    inner = model.graph.node[1].attribute[0].g.node[0]
    for index, node in enumerate([*model.graph.node, inner]):
        node.metadata_props.add(key="fxq.node", value=f"n{index}")
    result, _ = clean(model)
    assert [(p.key, p.value) for p in (*result.metadata_props, *result.graph.metadata_props)] == [
        ("model", "m"),
        ("graph", "g"),
    ]
    held = [*result.graph.node, result.graph.node[1].attribute[0].g.node[0]]
    assert [node.metadata_props[0].value for node in held] == ["n0", "n1", "n2"]


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.INT16])
def test_types_that_numpy_lacks_survive_bit_by_bit(kind: int) -> None:
    array = np.array([[1, 2, 3], [4, 5, 6]]).astype(helper.tensor_dtype_to_np_dtype(kind))
    stored = [
        numpy_helper.from_array(array, "w"),
        numpy_helper.from_array(np.array(0.5, np.float32), "s"),
        numpy_helper.from_array(np.zeros((), array.dtype), "z"),
        numpy_helper.from_array(np.zeros((), array.dtype), "z2"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], name="d"),
        helper.make_node("MatMul", ["x", "d"], ["a"], name="a"),
        helper.make_node("QuantizeLinear", ["a", "s", "z2"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z2"], ["y"], name="y"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", n]) for name, n in (("x", 2), ("y", 3))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    result, counts = clean(model)
    assert counts == Counter(merge_constants=2)
    onnx.checker.check_model(result, full_check=True)
    kept = {t.name: t for t in result.graph.initializer}
    assert set(kept) == {"w", "s", "z"}
    assert kept["w"].data_type == kind
    np.testing.assert_array_equal(numpy_helper.to_array(kept["w"]), array)
    np.testing.assert_array_equal(run(model)[0], run(result)[0])


def test_steps_that_undo_each_other_are_an_error() -> None:
    def flip(graph: gs.Graph) -> int:
        graph.name = f"{graph.name}x"
        return 1

    with pytest.raises(ExportError, match="does not settle: flip"):
        clean(parse(MIXED), (*STEPS, flip))


def test_graphsurgeon_keeps_its_own_log_level() -> None:
    level = gs.logger.G_LOGGER.severity
    clean(parse(MIXED))
    assert gs.logger.G_LOGGER.severity == level
