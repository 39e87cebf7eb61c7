"""Export: nodes, names, provenance, numbers, and what else a graph may hold."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from converted_graphs import GraphBuilder, export, residual_net
from golden import check_golden
from torch import nn

import fxq
from fxq.backends.onnx_compare import compare_nodes
from fxq.backends.onnx_names import MODULE_PATH, NODE, SOURCE, properties
from fxq.backends.onnxrt import Session
from fxq.errors import ExportError
from fxq.graph import State, set_state
from fxq.target import Target

DYNAMIC = pytest.mark.parametrize("dynamic_shapes", ["batch", None])


def text(model: onnx.ModelProto) -> str:
    """The graph in lines: node name, operator, inputs, outputs, origin."""
    shapes = {v.name: v for v in [*model.graph.input, *model.graph.output, *model.graph.value_info]}

    def show(name: str) -> str:
        kind = shapes[name].type.tensor_type
        dims = ",".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
        return f"{name}:{onnx.TensorProto.DataType.Name(kind.elem_type).lower()}[{dims}]"

    lines = [f"opset {model.opset_import[0].version}", *(f"input {show(v.name)}" for v in model.graph.input)]
    for node in model.graph.node:
        known = properties(node)
        lines.append(f"{node.name} = {node.op_type}({', '.join(node.input)}) -> {show(node.output[0])}")
        lines.append(f"    {known[NODE]} | {known.get(MODULE_PATH, '')} | {known[SOURCE]}")
    return "\n".join([*lines, *(f"output {show(v.name)}" for v in model.graph.output)])


@DYNAMIC
def test_residual_net_is_exported_node_for_node(tmp_path: Path, dynamic_shapes: Any) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    check_golden(f"onnx_export/residual_{dynamic_shapes or 'static'}", text(model))


@DYNAMIC
def test_every_node_has_a_name_of_its_own_and_an_origin(tmp_path: Path, dynamic_shapes: Any) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    names = [node.name for node in model.graph.node]
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert {"layer1.0.conv1", "layer1.0.conv2", "fc", "act", "layer1_0_add"} <= set(names)
    # The second call of the module layer1.0.relu cannot have the module's name, which is taken.
    assert {"layer1.0.relu", "layer1_0_relu_1"} <= set(names)
    known = {node.name: node for node in gm.graph.nodes}
    for node in model.graph.node:
        held = properties(node)
        where = known[held[NODE]].meta["origin"]
        assert (held.get(MODULE_PATH, ""), held[SOURCE]) == (where.module_path, where.source)


@DYNAMIC
def test_of_several_nodes_the_last_has_the_plain_name(tmp_path: Path, dynamic_shapes: Any) -> None:
    b = GraphBuilder()
    x = b.input("x")
    gelu = b.call(F.gelu, x, name="blocks_0_act", module="blocks.0.act", approximate="tanh")
    # Taken, so the suffixes of the node before have to go around it.
    taken = b.call(torch.relu, gelu, name="blocks.0.act_1", module=None)
    silu = b.call(F.silu, taken, name="silu")
    gm = b.build(silu)
    model = export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        groups.setdefault(properties(node)[NODE], []).append(node.name)
    first = groups["blocks_0_act"]
    assert len(first) > 2
    assert first[-1] == "blocks.0.act"
    assert all(name.startswith("blocks.0.act_") for name in first[:-1])
    assert groups["silu"] == ["silu_1", "silu"]
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    # The value of a group is called after the FX node; what lies inside it tells so too.
    outputs = [name for node in model.graph.node for name in node.output]
    assert "blocks_0_act" in outputs
    assert all(name == "output" or name.split(".")[0].startswith(("blocks_0_act", "silu")) for name in outputs)


def test_hardswish_keeps_its_name_whatever_it_becomes(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.input("x")
    one = b.call(F.hardswish, x, name="features_0_2", module="features.0.2")
    gm = b.build(b.call(F.hardswish, one, name="features_1_2", module="features.1.2"))
    model = export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx")
    ends = [n.name for n in model.graph.node if not properties(n)[NODE].endswith("quantizer")]
    assert ends[-1] == "features.1.2"
    assert "features.0.2" in ends


@DYNAMIC
def test_node_by_node_the_numbers_are_pytorchs(tmp_path: Path, dynamic_shapes: Any) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes)
    rows = {row.node: row for row in compare_nodes(tmp_path / "m.onnx", gm, args)}
    assert set(rows) == {n.name for n in gm.graph.nodes if n.op == "call_function"}
    integers = [row for row in rows.values() if not row.dtype.is_floating_point]
    assert len(integers) == 4
    assert all(row.share <= 0.001 and row.largest <= 1 for row in integers)
    assert all(row.sqnr > 110 for row in rows.values())


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_a_dynamic_batch_takes_any_size(tmp_path: Path, batch: int) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx")
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    x = torch.randn(batch, 3, 8, 8)
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(x)
    torch.testing.assert_close(got, gm(x), rtol=1e-5, atol=1e-6)


def test_an_example_of_batch_one_gives_a_dynamic_batch(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, (args[0][:1],), tmp_path / "m.onnx")
    (got,) = Session(tmp_path / "m.onnx", optimize=False).run(args[0])
    torch.testing.assert_close(got, gm(args[0]), rtol=1e-5, atol=1e-6)


def test_static_shapes_are_the_examples(tmp_path: Path) -> None:
    gm, args = residual_net()
    model = export(gm, args, tmp_path / "m.onnx", dynamic_shapes=None)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 8, 8]
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [4, 10]


def test_nothing_about_the_graph_changes(tmp_path: Path) -> None:
    gm, args = residual_net()
    code, weights = gm.code, copy.deepcopy(gm.state_dict())
    metas = [dict(node.meta) for node in gm.graph.nodes]
    gm.train()
    export(gm, args, tmp_path / "m.onnx")
    assert gm.training
    assert gm.code == code
    assert [dict(node.meta) for node in gm.graph.nodes] == metas
    assert gm.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in gm.state_dict().items())


def test_the_second_file_equals_the_first(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "a.onnx")
    export(gm, args, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_export_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


# What else a graph may hold


def test_a_module_kept_whole_lends_its_name_to_all_its_nodes(tmp_path: Path) -> None:
    b = GraphBuilder()
    b.root.add_module("mixer", nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)))
    gm = b.build(b.graph.call_module("mixer", (b.qdq(b.input("x"), 0.05),)))
    x = torch.randn(2, 4)
    model = export(gm, (x,), tmp_path / "m.onnx")
    held = [node.name for node in model.graph.node if properties(node)[NODE] == "mixer"]
    assert len(held) > 2
    assert held[-1] == "mixer"
    (got,) = Session(tmp_path / "m.onnx").run(x)
    torch.testing.assert_close(got, gm(x), rtol=1e-5, atol=1e-6)


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.qdq(b.input("x"), 0.05)
    weight = b.weight("shared", torch.randn(4, 4))
    one = b.call(F.linear, x, weight, name="one")
    gm = b.build(b.call(F.linear, b.qdq(one, 0.05), weight, name="two"))
    model = export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in model.graph.initializer) == 1


def test_an_operation_without_translation_is_named(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.call(torch.relu, b.input("x"), name="relu")
    strange = b.call(torch.special.bessel_j0, x, name="head_bessel")
    gm = b.build(b.call(torch.relu, strange, name="relu_1"))
    with pytest.raises(ExportError, match="cannot translate the graph") as caught:
        export(gm, (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert (caught.value.node, caught.value.module_path) == ("head_bessel", "head")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, (1, 1), (None, None), (2, 1)])
def test_pooling_a_permuted_tensor_needs_no_gather(tmp_path: Path, size: Any) -> None:
    b = GraphBuilder()
    x = b.call(torch.permute, b.input("x"), (0, 3, 1, 2), name="permute")
    gm = b.build(b.call(F.adaptive_avg_pool2d, x, name="pool", output_size=size))
    args = (torch.randn(2, 4, 4, 3),)
    model = export(gm, args, tmp_path / "m.onnx")
    assert not {"Range", "Gather", "Shape"} & {node.op_type for node in model.graph.node}
    (got,) = Session(tmp_path / "m.onnx").run(*args)
    torch.testing.assert_close(got, gm(*args))


def test_a_device_in_the_graph_becomes_the_cpu(tmp_path: Path) -> None:
    b = GraphBuilder()
    x = b.input("x")
    ones = b.call(torch.ones, 3, name="ones", device=torch.device("meta"))
    gm = b.build(b.call(operator.add, x, ones, name="add"))
    export(gm, (torch.zeros(2, 3),), tmp_path / "m.onnx")
    (got,) = Session(tmp_path / "m.onnx").run(torch.zeros(2, 3))
    torch.testing.assert_close(got, torch.ones(2, 3))


def test_provenance_goes_into_the_file(tmp_path: Path) -> None:
    gm, args = residual_net()
    facts = {"torch": "2.x", "calibration": {"batches": 0, "performance_only": True}}
    set_state(gm, State(target=Target.load("tensorrt"), provenance=facts))
    model = export(gm, args, tmp_path / "m.onnx")
    held = {p.key: p.value for p in model.metadata_props}
    assert held == {
        "fxq.torch": "2.x",
        "fxq.calibration": '{"batches": 0, "performance_only": true}',
        "fxq.compute_dtype": "fp32",
        "fxq.target": "tensorrt",
        "fxq.rules": "R",
    }
    assert model.producer_name == "fxq"


def test_nothing_of_the_exporting_machine_is_in_the_file(tmp_path: Path) -> None:
    gm, args = residual_net()
    export(gm, args, tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    assert b"pkg.torch" not in data
    assert b"site-packages" not in data


@pytest.mark.parametrize("compute_dtype", ["fp32", "fp16", "bf16"])
def test_nothing_is_said_on_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str], compute_dtype: str) -> None:
    gm = fxq.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 6, 6))
    fxq.export(gm, tmp_path / "m.onnx", compute_dtype=compute_dtype)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("batch", [True, False])
def test_a_global_average_pool_stays_one_node(spatial: int, batch: bool, tmp_path: Path) -> None:
    """Runtimes have integer kernels for it, and none for a mean; ONNX's operator wants a batch."""
    pool = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d][spatial - 1]
    x = torch.randn(*([2] if batch else []), 3, *(4,) * spatial)
    for model in (pool(1), nn.Sequential(nn.ReLU(), pool((1,) * spatial))):
        for gm in (fxq.trace(model, x), fxq.convert(fxq.prepare(model, x))):  # a module call, and a function's
            path = tmp_path / "pool.onnx"
            written = export(gm, (x,), path, dynamic_shapes="batch" if batch else None)
            (node,) = [n for n in written.graph.node if n.op_type != "Relu"]
            assert node.op_type == ("GlobalAveragePool" if batch else "ReduceMean")
            torch.testing.assert_close(Session(path).run(x)[0], gm(x), rtol=0, atol=1e-6)
