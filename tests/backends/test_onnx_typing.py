"""Strong typing: which tensor gets which type, where casts go, what stays float32, and what it costs in numbers."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import sqnr_db
from onnx import numpy_helper

from fxq.backends.onnx_floats import FloatGraph, Role
from fxq.backends.onnx_islands import spread
from fxq.backends.onnx_numbers import COMPUTE_DTYPES
from fxq.backends.onnx_ranges import largest_magnitudes
from fxq.backends.onnx_typing import FLOAT32_REASON, Typing, type_model
from fxq.backends.onnxrt import Session
from fxq.errors import ExportError

FP16, BF16 = COMPUTE_DTYPES["fp16"], COMPUTE_DTYPES["bf16"]


def parse(body: str, opset: int = 19, constants: dict[str, Any] | None = None) -> onnx.ModelProto:
    """A model from ONNX's text; `constants` become initializers, Python numbers as float32."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {body}')
    for name, value in (constants or {}).items():
        array = value if isinstance(value, np.ndarray) else np.asarray(value, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"n_{node.output[0]}"
    return model


def checked(model: onnx.ModelProto, **options: Any) -> Typing:
    found = type_model(model, options.pop("kind", FP16), **options)
    onnx.checker.check_model(model, full_check=True)
    return found


def nodes(model: onnx.ModelProto) -> list[str]:
    """``output:type = Op(inputs with types)``, the types as f (float32), h (float16), b (bfloat16), i (the rest)."""
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*typed.input, *typed.output, *typed.value_info)}
    kinds |= {t.name: t.data_type for t in typed.initializer}
    letters = {onnx.TensorProto.FLOAT: "f", onnx.TensorProto.FLOAT16: "h", onnx.TensorProto.BFLOAT16: "b"}

    def show(name: str) -> str:
        return f"{name}:{letters.get(kinds[name], 'i')}"

    return [f"{show(n.output[0])} = {n.op_type}({', '.join(show(i) for i in n.input if i)})" for n in typed.node]


QDQ_CONV = """
net (float[1,2,4,4] x) => (float[1,2,4,4] y) {
  xq = QuantizeLinear(x, s, z)
  xd = DequantizeLinear(xq, s, z)
  wd = DequantizeLinear<axis = 0>(w, ws, wz)
  c = Conv<pads = [1, 1, 1, 1]>(xd, wd, bias)
  y = Relu(c)
}
"""


def qdq_constants(weight_scales: tuple[float, float] = (0.01, 0.02)) -> dict[str, Any]:
    weight = np.random.default_rng(0).integers(-127, 128, (2, 2, 3, 3), dtype=np.int8)
    return {
        "s": 0.03,
        "z": np.zeros((), np.int8),
        "w": weight,
        "ws": np.asarray(weight_scales, np.float32),
        "wz": np.zeros(2, np.int8),
        "bias": np.asarray([0.1, -0.2], np.float32),
    }


class TestTypes:
    """Every tensor has the type that it should have."""

    def test_quantizer_reads_the_input_as_it_is_and_the_only_cast_is_at_the_output(self) -> None:
        model = parse(QDQ_CONV, constants=qdq_constants())
        assert checked(model).casts == 1
        assert nodes(model) == [
            "xq:i = QuantizeLinear(x:f, s_float32:f, z:i)",
            "xd:h = DequantizeLinear(xq:i, s_float16:h, z:i)",
            "wd:h = DequantizeLinear(w:i, ws_float16:h, wz:i)",
            "c:h = Conv(xd:h, wd:h, bias_float16:h)",
            "y_float16:h = Relu(c:h)",
            "y:f = Cast(y_float16:h)",
        ]

    def test_both_scales_of_one_quantizer_have_one_value(self) -> None:
        model = parse(QDQ_CONV, constants=qdq_constants())
        checked(model)
        held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        assert held["s_float32"] == np.float32(held["s_float16"]) == np.float32(np.float16(0.03))

    def test_inputs_and_outputs_take_the_compute_dtype_on_request(self) -> None:
        model = parse(QDQ_CONV, constants=qdq_constants())
        assert checked(model, keep_io_types=False).casts == 0
        assert nodes(model)[0] == "xq:i = QuantizeLinear(x:h, s_float16:h, z:i)"
        assert nodes(model)[-1] == "y:h = Relu(c:h)"

    def test_bfloat16(self) -> None:
        model = parse(QDQ_CONV, 22, qdq_constants())
        checked(model, kind=BF16)
        assert nodes(model)[3] == "c:b = Conv(xd:b, wd:b, bias_bfloat16:b)"

    def test_a_second_run_has_nothing_to_do(self) -> None:
        model = parse(QDQ_CONV, constants=qdq_constants())
        checked(model, keep_io_types=False)
        once = model.SerializeToString(deterministic=True)
        assert checked(model, keep_io_types=False) == Typing(0, {}, ())
        assert model.SerializeToString(deterministic=True) == once

    def test_one_cast_serves_all_readers(self) -> None:
        body = "net (float[2,2] x) => (float[2,2] y) { a = MatMul(x, x) b = MatMul(x, a) y = MatMul(b, x) }"
        model = parse(body)
        assert checked(model).casts == 2  # x once, y once
        assert nodes(model)[0] == "x_float16:h = Cast(x:f)"

    def test_float_arguments_that_are_float32_by_definition_stay(self) -> None:
        body = 'net (float[1,1,4,4] x) => (float[1,1,8,8] y) { c = Conv(x, w) y = Resize<mode = "nearest">(c, , s) }'
        constants = {"w": np.ones((1, 1, 1, 1), np.float32), "s": np.asarray([1, 1, 2, 2], np.float32)}
        model = parse(body, constants=constants)
        checked(model, keep_io_types=False)
        assert nodes(model)[-1] == "y:h = Resize(c:h, s:f)"

    def test_what_makes_floats_of_integers_makes_the_type_that_is_wanted(self) -> None:
        body = """net (int64[2,2] i, float[2,2] x) => (float[2,2] y) {
            f = Cast<to = 1>(i) s = Shape(x) k = ConstantOfShape<value = float[1] {3}>(s)
            a = MatMul(f, x) b = Softmax(f) y = Sum(a, b, k) }"""
        model = parse(body)
        found = checked(model, keep_io_types=False, islands=named(model, "n_b"))
        assert found.casts == 1  # behind the softmax; its input is made twice instead
        assert nodes(model) == [
            "f:h = Cast(i:i)",
            "f_float32:f = Cast(i:i)",
            "s:i = Shape(x:h)",
            "k:h = ConstantOfShape(s:i)",
            "a:h = MatMul(f:h, x:h)",
            "b:f = Softmax(f_float32:f)",
            "b_float16:h = Cast(b:f)",
            "y:h = Sum(a:h, b_float16:h, k:h)",
        ]

    def test_the_users_own_casts_stay(self) -> None:
        body = """net (float[2,2] x) => (float[2,2] y) {
            d = Cast<to = 11>(x) e = Exp(d) f = Cast<to = 1>(e) y = MatMul(f, f) }"""
        model = parse(body)
        assert checked(model).casts == 1  # the output's
        assert nodes(model)[:3] == ["d:i = Cast(x:f)", "e:i = Exp(d:i)", "f:h = Cast(e:i)"]

    def test_tensors_of_inner_graphs_stay_float32(self) -> None:
        body = """net (bool c, float[2,2] x) => (float[2,2] y) {
            a = MatMul(x, x)
            y = If(c) <then_branch = t () => (float[2,2] p) { p = Identity(a) },
                       else_branch = e () => (float[2,2] q) { q = Neg(a) }> }"""
        model = parse(body)
        found = checked(model)
        assert set(found.islands) == {"n_a", "n_y"}

    def test_an_opset_without_the_type_is_refused(self) -> None:
        with pytest.raises(ExportError, match=r"compute_dtype='bf16' needs opset 22, not 19"):
            type_model(parse(QDQ_CONV, constants=qdq_constants()), BF16)


def named(model: onnx.ModelProto, *names: str) -> dict[str, str]:
    """Islands at ONNX nodes, through the FX names that fxq's exporter writes."""
    for node in model.graph.node:
        node.metadata_props.add(key="fxq.node", value=node.name)
    return dict.fromkeys(names, "asked for")


CHAIN = "net (float[4,4] x) => (float[4,4] y) {{ a = MatMul(x, x) {} y = MatMul(h, h) }}"


class TestIslands:
    """What stays float32, and where its borders are."""

    def test_a_node_says_why_it_is_float32(self) -> None:
        model = parse(CHAIN.format("h = Softmax(a)"))
        found = checked(model, islands=named(model, "n_h"))
        assert found == Typing(4, {"n_h": "asked for"}, ())
        (why,) = [p.value for n in model.graph.node for p in n.metadata_props if p.key == FLOAT32_REASON]
        assert why == "asked for"

    def test_between_quantizers_an_island_costs_no_cast(self) -> None:
        body = """net (float[4,4] x) => (float[4,4] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) h = Softmax(d)
            r = QuantizeLinear(h, s, z) e = DequantizeLinear(r, s, z) y = MatMul(e, e) }"""
        model = parse(body, constants={"s": 0.01, "z": np.zeros((), np.int8)})
        assert checked(model, keep_io_types=False, islands=named(model, "n_h")).casts == 0
        assert nodes(model)[1:5] == [
            "d:f = DequantizeLinear(q:i, s_float32:f, z:i)",
            "h:f = Softmax(d:f)",
            "r:i = QuantizeLinear(h:f, s_float32:f, z:i)",
            "e:h = DequantizeLinear(r:i, s_float16:h, z:i)",
        ]

    def test_what_lies_between_two_islands_joins_them(self) -> None:
        model = parse(CHAIN.format("b = Softmax(a) c = Relu(b) d = Neg(c) h = Softmax(d)"))
        found = checked(model, keep_io_types=False, islands=named(model, "n_b", "n_h"))
        assert (found.casts, found.joined) == (2, ("n_c", "n_d"))

    def test_a_matrix_product_between_two_islands_does_not(self) -> None:
        model = parse(CHAIN.format("b = Softmax(a) c = MatMul(b, b) h = Softmax(c)"))
        found = checked(model, keep_io_types=False, islands=named(model, "n_b", "n_h"))
        assert (found.casts, found.joined) == (4, ())

    def test_seen_magnitudes_leave_the_tensor_and_its_readers_float32(self) -> None:
        model = parse(CHAIN.format("b = Exp(a) h = Log(b)"))
        found = checked(model, keep_io_types=False, largest={"b": 20000.0})
        assert found.islands == dict.fromkeys(["n_b", "n_h"], "magnitudes up to 2e+04 leave float16 no headroom")
        assert checked(parse(CHAIN.format("b = Exp(a) h = Log(b)")), largest={"b": 16000.0}).islands == {}

    @pytest.mark.parametrize("scale", [1e-7, 200.0])
    def test_a_scale_that_float16_cannot_hold(self, scale: float) -> None:
        body = """net (float[4,4] x) => (float[4,4] y) {
            a = MatMul(x, x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, d) }"""
        model = parse(body, constants={"s": scale, "z": np.zeros((), np.int8)})
        assert set(checked(model).islands) == {"n_a", "n_y"}
        assert nodes(model)[1] == "q:i = QuantizeLinear(a:f, s:f, z:i)" if scale < 1 else True
        assert checked(parse(body, constants={"s": 0.01, "z": np.zeros((), np.int8)})).islands == {}

    def test_an_epsilon_that_would_become_zero_keeps_its_division(self) -> None:
        body = CHAIN.format("b = ReduceL2<keepdims = 1>(a) c = Max(b, eps) d = Expand(c, shape) h = Div(a, d)")
        constants = {"eps": 1e-12, "shape": np.asarray([4, 4], np.int64)}
        found = checked(parse(body, constants=constants))
        assert set(found.islands) == {"n_c", "n_d", "n_h"}
        assert "its constant eps (1e-12) is beyond float16" in found.islands["n_c"]

    def test_a_mask_is_no_overflow(self) -> None:
        body = CHAIN.format("b = Where(m, a, low) h = Softmax(b)")
        constants = {"m": np.eye(4, dtype=bool), "low": float(np.finfo(np.float32).min)}
        model = parse(body, constants=constants)
        seen = largest_magnitudes(model, {"x": torch.ones(4, 4)})
        assert seen["b"] == 4.0
        assert checked(model, largest=seen).islands == {}
        held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        assert held["low_float16"] == np.finfo(np.float16).min

    def test_a_bound_beyond_the_type_bounds_nothing(self) -> None:
        assert checked(parse(CHAIN.format("h = Min(a, top)"), constants={"top": 1e6})).islands == {}
        assert set(checked(parse(CHAIN.format("h = Mul(a, top)"), constants={"top": 1e6})).islands) >= {"n_h"}

    def test_an_operator_that_onnx_lacks_in_16_bits(self) -> None:
        body = "net (float[1,4,4] x) => (float[1,4,4] y) { a = MatMul(x, x) y = nowhere.Thing(a) }"
        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19, "nowhere" : 1]> {body}')
        model.graph.node[0].name, model.graph.node[1].name = "n_a", "n_y"
        model.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, [1, 4, 4]))
        found = type_model(model, FP16)
        assert found.islands == {"n_y": "ONNX's opset 19 has no Thing in float16"}
        assert [n.op_type for n in model.graph.node] == ["Cast", "MatMul", "Cast", "Thing"]


def cost(graph: FloatGraph, wide: set[int], *, float_io: bool) -> int:
    """Bytes through casts, and kept wide, of one labelling: the definition, spelled out."""
    total = 0
    for name in (*graph.inputs, *graph.producer):
        if not graph.is_float(name):
            continue
        made = float_io if name not in graph.producer else graph.producer[name] in wide
        read = {i in wide for i, _ in graph.readers[name]} | ({float_io} if name in graph.outputs else set())
        total += 6 * graph.elements(name) * len(read - {made})
    return total + sum(2 * graph.elements(n) for i in wide for n in graph.float_outputs(i) if light(graph, i))


def light(graph: FloatGraph, index: int) -> bool:
    return graph.nodes[index].op_type != "MatMul" and graph.nodes[index].op_type != "Softmax"


@settings(max_examples=60)
@given(st.data())
def test_no_other_placement_of_casts_moves_fewer_bytes(data: st.DataObject) -> None:
    """Against all labellings of random graphs, in which softmax is asked for and products are 16 bits."""
    count = data.draw(st.integers(2, 8))
    tensors, lines = ["x"], []
    for k in range(count):
        op = data.draw(st.sampled_from(["MatMul", "Softmax", "Add", "Neg", "Add", "Neg"]))
        inputs = [data.draw(st.sampled_from(tensors)) for _ in range(2 if op in ("MatMul", "Add") else 1)]
        tensors.append(f"t{k}")
        lines.append(f"t{k} = {op}({', '.join(inputs)})")
    outputs = ", ".join(f"float[2,2] {name}" for name in sorted({tensors[-1], data.draw(st.sampled_from(tensors[1:]))}))
    model = parse(f"net (float[2,2] x) => ({outputs}) {{ {' '.join(lines)} }}")
    graph = FloatGraph(model, FP16)
    float_io = data.draw(st.booleans())
    required = {i for i, node in enumerate(graph.nodes) if node.op_type == "Softmax"}
    free = [i for i in range(count) if light(graph, i)]
    found = spread(graph, required, float_io=float_io)
    assert required <= found <= required | set(free)
    choices = itertools.chain.from_iterable(itertools.combinations(free, n) for n in range(len(free) + 1))
    best = min(cost(graph, required | set(choice), float_io=float_io) for choice in choices)
    assert cost(graph, found, float_io=float_io) == best
    typed = type_model(model, FP16, keep_io_types=float_io, islands=named(model, *(f"n_t{i}" for i in required)))
    onnx.checker.check_model(model, full_check=True)
    assert typed.casts == sum(node.op_type == "Cast" for node in model.graph.node)


def test_roles() -> None:
    body = """net (float[2,2] x, int64[2,2] i) => (int64[2] y, bool[2,2] z) {
        y = Shape(x) z = Greater(x, x) f = Cast<to = 1>(i) }"""
    graph = FloatGraph(parse(body), FP16)
    assert graph.roles == [Role.READER, Role.COMPUTE, Role.SOURCE]


class TestNumbers:
    """What the types cost."""

    def test_weights_of_dying_channels_keep_their_values(self, tmp_path: Path) -> None:
        constants = qdq_constants((0.01, 3e-9))
        before = parse(QDQ_CONV, constants=constants)
        after = copy.deepcopy(before)
        assert checked(after).islands == {}
        results = []
        x = torch.randn(1, 2, 4, 4)
        for index, model in enumerate((before, after)):
            onnx.save(model, tmp_path / f"{index}.onnx")
            results.append(Session(tmp_path / f"{index}.onnx").run(x)[0])
        assert sqnr_db(*results) > 60
        held = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
        moved = held["w"][1] * np.float64(held["ws_float16"][1]) - constants["w"][1] * np.float64(3e-9)
        assert np.abs(moved).max() <= 2.0**-18

    @pytest.mark.parametrize("kind", [FP16, BF16], ids=lambda kind: kind.name)
    def test_constants_are_torchs(self, kind: Any) -> None:
        values = torch.cat([torch.randn(1000) * 10.0**p for p in range(-9, 4)])
        tensor = kind.tensor("c", values.numpy())
        expected = values.to(kind.dtype).float().numpy()
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.float32), expected)
