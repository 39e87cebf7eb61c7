"""ONNX Runtime: files run with torch tensors, each value shown, one computed from others; comparison."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from converted_graphs import GraphBuilder, residual_net
from onnx import numpy_helper

from fxq.backends.onnx_compare import compare_nodes
from fxq.backends.onnx_export import export_onnx
from fxq.backends.onnxrt import Session, benchmark
from fxq.errors import EngineError


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    gm, args = residual_net()
    return export_onnx(gm, args, None, tmp_path_factory.mktemp("onnx") / "residual.onnx")


def save(text: str, path: Path) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 19]> g {text}')
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return save("(float[n,2] a, float[n,2] b) => (float[n,2] sum, float[n,2] difference)"
                "{ sum = Add (a, b) difference = Sub (a, b) }", tmp_path / "two.onnx")  # fmt: skip


def test_inputs_by_position_and_by_name(two: Path) -> None:
    session = Session(two)
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    assert (session.input_names, session.output_names) == (("a", "b"), ("sum", "difference"))
    torch.testing.assert_close(session.run(a, b), [a + b, a - b])
    torch.testing.assert_close(session.run({"b": b, "a": a}), {"sum": a + b, "difference": a - b})


def test_one_tensor_is_one_input_whatever_its_length(tmp_path: Path) -> None:
    session = Session(save("(float[n,2] x) => (float[n,2] y) { y = Neg (x) }", tmp_path / "one.onnx"))
    for batch in (1, 3):
        x = torch.randn(batch, 2)
        torch.testing.assert_close(dict(session.run_all(x)), {"y": -x})
        assert session.benchmark(x, warmup=0, iterations=1).batch == batch


def test_tensors_of_any_stride_and_with_gradients(two: Path) -> None:
    a, b = torch.randn(2, 3).t(), torch.randn(3, 4)[:, ::2].requires_grad_()
    torch.testing.assert_close(Session(two).run(a, b)[0], (a + b).detach())


def test_results_are_the_callers_own(two: Path) -> None:
    session = Session(two)
    one, other = torch.ones(1, 2), torch.ones(1, 2)
    first = session.run(one, other)[0]
    first.zero_()
    torch.testing.assert_close(session.run(one, other)[0], torch.full((1, 2), 2.0))


def test_wrong_inputs_are_refused(two: Path) -> None:
    session = Session(two)
    x = torch.randn(3, 2)
    with pytest.raises(EngineError, match=r"1 inputs given, two.onnx takes a, b"):
        session.run(x)
    with pytest.raises(EngineError, match=r"\['a', 'c'\] given, two.onnx takes a, b"):
        session.run({"a": x, "c": x})
    with pytest.raises(EngineError, match="ONNX Runtime stopped"):
        session.run(x, torch.randn(3, 5))
    with pytest.raises(EngineError, match="ONNX Runtime stopped"):
        session.run(x, x.double())


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="there is no file"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not ONNX")
    with pytest.raises(EngineError, match="cannot load the model"):
        Session(tmp_path / "text.onnx")


def test_unoptimized_every_q_and_dq_runs_as_it_stands(residual: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    plain = dict(Session(residual, optimize=False).run_all([x]))
    assert plain["act_quantize"].dtype == torch.int8
    torch.testing.assert_close(plain["output"], Session(residual, optimize=False).run(x)[0], rtol=0, atol=0)
    # Optimized, the numbers may move by rounding and no more.
    torch.testing.assert_close(Session(residual, threads=1).run(x)[0], plain["output"], rtol=0, atol=0.05)


def test_float16_biases_are_not_made_integers_of_a_scale_that_float16_cannot_hold(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    constants = {
        "s": np.float16(3e-3),
        "ws": np.full(8, 4e-5, np.float16),
        "z": np.int8(0),
        "wz": np.zeros(8, np.int8),
        "w": generator.integers(-127, 128, (8, 4, 3, 3), dtype=np.int8),
        "bias": generator.normal(0, 0.1, 8).astype(np.float16),
    }
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 19]>
        g (float16[1,4,6,6] x) => (float16[1,8,4,4] y) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear <axis = 0> (w, ws, wz)
            c = Conv (d, wd, bias)
            r = Relu (c)
            rq = QuantizeLinear (r, s, z)
            y = DequantizeLinear (rq, s, z)
        }""")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    path = tmp_path / "half.onnx"
    onnx.save(model, path)
    x = torch.randn(1, 4, 6, 6).half()
    torch.testing.assert_close(Session(path).run(x), Session(path, optimize=False).run(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("nodes_per_step", [1, 3, 1000])
def test_run_all_gives_what_a_session_with_all_outputs_gives(residual: Path, nodes_per_step: int) -> None:
    model = onnx.load(residual)
    names = [name for node in model.graph.node for name in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = torch.randn(2, 3, 8, 8)
    expected = ort.InferenceSession(model.SerializeToString(), options).run(names, {"x": x.numpy()})
    session = Session(residual, optimize=False)
    found = list(session.run_all({"x": x}, nodes_per_step=nodes_per_step))
    assert tuple(name for name, _ in found) == tuple(names) == session.value_names
    for (_, tensor), array in zip(found, expected, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_run_all_keeps_only_what_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("(float[2] x) => (float[2] y) { a = Relu (x) b = Neg (a) c = Neg (b) y = Add (c, x) }",
                tmp_path / "chain.onnx")  # fmt: skip
    session = Session(path, optimize=False)
    held: list[set[str]] = []
    run_part = session._run_part

    def watch(nodes, names, given):
        held.append(set(given))
        return run_part(nodes, names, given)

    monkeypatch.setattr(session, "_run_part", watch)
    x = torch.randn(2)
    assert [name for name, _ in session.run_all([x], nodes_per_step=1)] == ["a", "b", "c", "y"]
    assert held == [{"x"}, {"a", "x"}, {"b", "x"}, {"c", "x"}]


def test_run_all_follows_tensors_into_subgraphs(tmp_path: Path) -> None:
    path = save("""(float[2] x, bool c) => (float[2] y) <float[2] one = {1.0, 1.0}> {
        r = Relu (x)
        s = Neg (x)
        y = If (c) <then_branch = g1 () => (float[2] t) { t = Add (r, one) },
                    else_branch = g2 () => (float[2] e) { u = Identity (s) e = Neg (u) }>
    }""", tmp_path / "if.onnx")  # fmt: skip
    x = torch.randn(2)
    for flag, expected in ((True, x.relu() + 1), (False, x)):
        found = dict(Session(path).run_all([x, torch.tensor(flag)], nodes_per_step=1))
        torch.testing.assert_close(found["y"], expected)


def test_a_value_is_computed_from_given_ones(residual: Path) -> None:
    session = Session(residual, optimize=False)
    x = torch.randn(2, 3, 8, 8)
    values = dict(session.run_all([x]))
    # From the tensor right before, with nonsense further up that must not be read.
    given = {"x": torch.full_like(x, float("nan")), "act": values["act"]}
    got = session.compute(["act_quantize", "layer1_0_conv1"], given)
    assert list(got) == ["act_quantize", "layer1_0_conv1"]
    assert torch.equal(got["act_quantize"], values["act_quantize"])
    assert torch.equal(got["layer1_0_conv1"], values["layer1_0_conv1"])
    # What is given comes back as it is.
    assert session.compute(["act"], given)["act"] is values["act"]


def test_a_value_that_cannot_be_computed_is_refused(residual: Path) -> None:
    session = Session(residual)
    with pytest.raises(EngineError, match="'nothing' is neither given nor made"):
        session.compute(["nothing"], {})
    with pytest.raises(EngineError, match="'x' is neither given nor made"):
        session.compute(["act"], {"fc": torch.zeros(1)})


def test_fp8_tensors_go_in_and_out(tmp_path: Path) -> None:
    path = save("(float8e4m3fn[n] x) => (float8e4m3fn[n] y) { a = Cast <to = 1> (x) y = Cast <to = 17> (a) }",
                tmp_path / "fp8.onnx")  # fmt: skip
    x = torch.tensor([0.5, -3.0, 448.0]).to(torch.float8_e4m3fn)
    (y,) = Session(path).run(x)
    assert y.dtype == torch.float8_e4m3fn
    assert torch.equal(y.float(), x.float())


def test_weights_beside_the_file_are_found(residual: Path, tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(onnx.load(residual), path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    x = torch.randn(2, 3, 8, 8)
    expected = Session(residual, optimize=False).run(x)[0]
    session = Session(path, optimize=False)
    torch.testing.assert_close(session.run(x)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(session.run_all([x]))["output"], expected, rtol=0, atol=0)


# Timing


def test_random_inputs_fit(tmp_path: Path, two: Path) -> None:
    given = Session(two).random_inputs(5)
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == {"a": (5, 2), "b": (5, 2)}
    assert Session(two).random_inputs(5, {"b": (1, 2)})["b"].shape == (1, 2)
    with pytest.raises(EngineError, match=r"two.onnx has no input c, but a, b"):
        Session(two).random_inputs(shapes={"c": (1, 2)})
    free = save("(float[n,c,h] x, int64[n] k) => (float[n,c,h] y) { y = Relu (x) }", tmp_path / "free.onnx")
    with pytest.raises(EngineError, match=r"(?s)input x of free.onnx is tensor\(float\) .*give its shape"):
        Session(free).random_inputs()
    model = onnx.load(free)
    model.metadata_props.add(key="fxq.profiles", value='{"x": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}')
    onnx.save(model, free)
    tuned = Session(free).random_inputs(2)
    assert (tuned["x"].shape, tuned["k"].tolist()) == ((2, 5, 6), [0, 0])


def test_benchmark_feeds_everyone_the_same_in_turns(two: Path, residual: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Session(residual).benchmark(batch=3, warmup=0, iterations=4)
    assert (len(timed.milliseconds), timed.batch) == (4, 3)
    assert 0 < timed.percentile(50) <= timed.percentile(99)
    sessions = {"one": Session(two), "other": Session(two, optimize=False)}
    order: list[str] = []
    for name, session in sessions.items():
        run = session._session.run_with_ort_values

        def watched(names: list[str], feeds: dict[str, object], run: object = run, name: str = name) -> object:
            order.append(name)
            assert names == ["sum", "difference"]
            return run(names, feeds)  # type: ignore[operator]

        monkeypatch.setattr(session._session, "run_with_ort_values", watched)
    found = benchmark(sessions, [torch.ones(2, 2), torch.ones(2, 2)], warmup=1, iterations=25)
    assert {name: len(one.milliseconds) for name, one in found.latencies.items()} == {"one": 25, "other": 25}
    turns = [(name, len(list(calls))) for name, calls in itertools.groupby(order)]
    # To see that the inputs fit, to warm up, and in turns of twenty.
    assert turns == [
        ("one", 1),
        ("other", 1),
        ("one", 1),
        ("other", 1),
        ("one", 20),
        ("other", 20),
        ("one", 5),
        ("other", 5),
    ]
    with pytest.raises(EngineError, match=r"1 inputs given, two\.onnx takes a, b"):
        benchmark(sessions, [torch.ones(2, 2)])
    with pytest.raises(EngineError, match="there is no file to time"):
        benchmark({})
    with pytest.raises(EngineError, match="time at least one"):
        Session(two).benchmark([torch.ones(2, 2)] * 2, iterations=0)


# Node by node against PyTorch


def test_a_difference_shows_at_its_own_node_and_nowhere_else(tmp_path: Path) -> None:
    gm, args = residual_net()
    path = export_onnx(gm, args, None, tmp_path / "m.onnx")
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "layer1.0.conv1.weight")
    array = numpy_helper.to_array(weight).copy()
    array[0, 0, 1, 1] = -array[0, 0, 1, 1] - 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    rows = compare_nodes(path, gm, args)
    # The weight's DQ differs in one value; the convolution is computed from PyTorch's DQ and is right.
    (wrong,) = (row for row in rows if row.sqnr < 100)
    assert wrong.node == "layer1_0_conv1_weight_quantizer"
    assert wrong.share == pytest.approx(1 / array.size)
    assert wrong.source == "model.py:8"


def test_below_a_node_that_the_file_lacks_pytorchs_tensors_are_still_used(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.qdq(b.input("x"), 0.1)
    # Exporting drops the identity; the quantizer above it is wrong in the file, what lies below it is not.
    same = b.call(torch.Tensor.contiguous, b.call(torch.neg, x, name="neg"), name="same")
    gm = b.build(b.call(torch.exp, same, name="exp"))
    args = (torch.randn(2, 50),)
    path = export_onnx(gm, args, None, tmp_path / "m.onnx")
    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name.endswith("scale"))
    scale.CopyFrom(numpy_helper.from_array(np.array(0.2, np.float32), scale.name))
    onnx.save(model, path)
    rows = {row.node: row for row in compare_nodes(path, gm, args)}
    assert set(rows) == {"x_quantize", "x_quantizer", "neg", "exp"}
    assert rows["x_quantize"].share > 0.5
    assert rows["neg"].largest == 0
    assert rows["exp"].sqnr > 120


def test_integers_off_by_a_step_are_counted(tmp_path: Path) -> None:
    b = GraphBuilder()
    gm = b.build(b.qdq(b.input("x"), 0.5))
    x = torch.tensor([[0.0, 0.5, 1.0, 60.0]])
    path = export_onnx(gm, (x,), None, tmp_path / "m.onnx", dynamic_shapes=None)
    model = onnx.load(path)
    scale = next(t for t in model.graph.initializer if t.name.endswith("scale"))
    scale.CopyFrom(numpy_helper.from_array(np.array(0.504, np.float32), scale.name))
    onnx.save(model, path)
    first, second = compare_nodes(path, gm, (x,))
    assert (first.node, first.dtype, first.share, first.largest) == ("x_quantize", torch.int8, 0.25, 1.0)
    assert second.node == "x_quantizer"


def test_another_graphs_file_is_refused(tmp_path: Path) -> None:
    gm, args = residual_net()
    path = export_onnx(gm, args, None, tmp_path / "m.onnx", dynamic_shapes=None)
    with pytest.raises(EngineError, match=r"ONNX Runtime stopped|has shape"):
        compare_nodes(path, gm, (args[0][:2],))
