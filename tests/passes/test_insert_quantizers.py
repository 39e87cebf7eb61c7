"""Insertion: one quantizer a tensor, under its name, on the annotated edges."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from placing import (
    STUDY,
    Lambda,
    Lambda2,
    activation_quantizers,
    before,
    check_pass,
    convert,
    decided,
    node,
    prepared,
    reads,
    same_numbers,
)
from torch import Tensor, nn
from toys import after, basic_net, branches, image, lenet, seeded

import fxq
from fxq.calibration import calibrate
from fxq.editor import Editor
from fxq.errors import TraceError
from fxq.graph import Annotation, edge_annotations, state
from fxq.passes import PREPARE
from fxq.passes.insert_quantizers import InsertQuantizers
from fxq.quantizer import Quantizer, quantizers
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.verify import is_quantizer

X = (2, 3, 16, 16)


def conv(inputs: int = 3, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def test_golden_and_second_run() -> None:
    result = check_pass(
        InsertQuantizers(), before("insert-quantizers", branches(), image(*X)), "passes/insert_branches"
    )
    assert result.counts == {"stored": 7, "created": 7, "rewired": 8}
    assert "observed" in state(result.graph_module).properties


def test_quantizers_are_made_where_the_model_is() -> None:
    gm = before("insert-quantizers", branches(), image(*X)).to("meta")
    made = quantizers(InsertQuantizers()(gm).graph_module)
    assert len(made) == 7
    assert {t.device.type for quantizer in made.values() for t in quantizer.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("build", [basic_net, branches])
def test_observing_changes_no_value(build: object) -> None:
    model = build()  # type: ignore[operator]
    plain, observed = before("insert-quantizers", model, image(*X)), prepared(model, image(*X))
    with torch.no_grad():
        assert torch.equal(plain(image(*X)), observed(image(*X)))
    same_numbers(observed, model, image(*X))


def test_names_and_keys() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28))
    for name, quantizer in quantizers(gm).items():
        assert quantizer.tensor == name
        call = node(gm, f"{name}_quantizer")
        assert call.target == f"quantizers.{name}"
        assert call.args == (node(gm, name),)
    weights = {n for n, q in quantizers(gm).items() if q.weight}
    assert weights == {"conv1_weight", "conv2_weight", "fc1_weight", "fc2_weight", "fc3_weight"}
    assert activation_quantizers(gm) == ["x", "max_pool2d", "view", "relu_2", "relu_3"]
    assert "quantizers.view.scale" in gm.state_dict()


def test_a_quantizer_stands_right_behind_its_tensor() -> None:
    """Behind the last input, for inputs."""
    model = seeded(lambda: Lambda2(lambda m, x, y: m.a(x) * m.b(y) + m.c(x), a=conv(), b=conv(), c=conv()))
    gm = prepared(model, image(*X), image(*X))
    nodes = list(gm.graph.nodes)
    assert [n.op for n in nodes[:2]] == ["placeholder"] * 2
    assert {n.name for n in nodes[2:4]} == {"x_quantizer", "y_quantizer"}
    for n in nodes:
        if is_quantizer(n) and n.args[0].op != "placeholder":
            assert n.prev is n.args[0]


def test_one_quantizer_for_a_tensor_with_many_readers() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.a(x) * m.b(x) + x.mean(), a=conv(), b=conv()))
    gm = prepared(model, image(*X))
    assert activation_quantizers(gm) == ["x"]
    assert reads(gm, "a")[0] == reads(gm, "b")[0] == "x_quantizer"
    assert reads(gm, "mean") == ["x"]  # nobody asked for this edge


def test_a_matrix_product_with_itself() -> None:
    gm = prepared(Lambda(lambda _, x: x @ x), image(4, 4))
    assert reads(gm, "matmul") == ["x_quantizer", "x_quantizer"]


def test_folding_batch_norm_renames_no_quantizer() -> None:
    unfused = PREPARE.without("fuse-batch-norm")
    fused, plain = prepared(basic_net(), image(*X)), fxq.prepare(basic_net(), image(*X), pipeline=unfused)
    missing = set(activation_quantizers(plain)) - set(activation_quantizers(fused))
    assert missing == set()
    weights = [{n for n, q in quantizers(gm).items() if q.weight} for gm in (fused, plain)]
    assert weights[0] == weights[1]


# Conflicts.


def shared_input() -> nn.Module:
    return seeded(lambda: Lambda(lambda m, x: m.a(x) * m.b(x) * m.c(x), a=conv(), b=conv(), c=conv()))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_later_rule_decides_on_a_shared_tensor(order: tuple[str, str]) -> None:
    specs = {"a": QSpec(method="entropy"), "b": QSpec(dtype="uint8", symmetric=False, method="max")}
    recipe = Recipe([Rule(name, EdgeSpecs(input=specs[name])) for name in order])
    gm = prepared(shared_input(), image(*X), recipe=recipe, target=STUDY)
    assert activation_quantizers(gm) == ["x"]
    held = quantizers(gm)["x"].spec
    assert (held.qdtype.name, held.calibration.name) == {"b": ("uint8", "max"), "a": ("int8", "entropy")}[order[1]]
    for name in "abc":
        assert reads(gm, name)[0] == "x_quantizer"
        annotation = edge_annotations(node(gm, name))[0]
        assert annotation.spec == held  # what the edge really gets
        if name != order[1]:
            assert "x has one quantizer (R29)" in annotation.reason
    calibrate(gm, [image(*X)], progress=False)
    convert(gm)(image(*X))


def test_excluding_one_reader_leaves_the_others() -> None:
    gm = prepared(shared_input(), image(*X), recipe=Recipe([Rule("b", None)]))
    assert [reads(gm, name)[0] for name in "abc"] == ["x_quantizer", "x", "x_quantizer"]


def test_a_quantized_output_is_read_by_everyone() -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.a(x)
        return y, y.mean(), m.b(y)

    model = seeded(lambda: Lambda(forward, a=conv(), b=conv(4, 4)))
    gm = prepared(model, image(*X), recipe=Recipe([Rule("a", EdgeSpecs(output=QSpec(method="max")))]))
    assert reads(gm, "mean") == ["a_quantizer"]
    assert reads(gm, "b")[0] == "a_quantizer"
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    assert output.args[0][0].name == "a_quantizer"  # type: ignore[index,union-attr]
    assert activation_quantizers(gm) == ["x", "a"]
    result = check_pass(
        InsertQuantizers(),
        before(
            "insert-quantizers",
            model,
            image(*X),
            recipe=Recipe([Rule("a", EdgeSpecs(output=QSpec(method="max")))]),
        ),
    )
    assert result.counts["created"] == 4


def test_a_weight_that_is_an_activation_elsewhere() -> None:
    """One stored tensor, one quantizer: of a weight, whose range is its own."""
    model = Lambda(lambda m, x: F.linear(x, m.w) + m.w @ m.w, w=nn.Parameter(image(4, 4)))
    gm = prepared(model, image(4, 4))
    assert [q.tensor for q in quantizers(gm).values()] == ["x", "w"]
    calibrate(gm, [image(4, 4)], progress=False)
    convert(gm)(image(4, 4))


def test_a_reader_decided_to_be_float_reads_float() -> None:
    """An output's quantizer does not overrule what a recipe says of one reader."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y) + m.c(y)

    model = seeded(lambda: Lambda(forward, a=conv(), b=conv(4), c=conv(4)))
    recipe = Recipe([Rule("a", EdgeSpecs(output=QSpec())), Rule("b", None), Rule("op:add", None)])
    gm = prepared(model, image(*X), recipe=recipe)
    assert [reads(gm, name)[0] for name in "bc"] == ["a", "a_quantizer"]
    check_pass(InsertQuantizers(), before("insert-quantizers", model, image(*X), recipe=recipe))


# Later additions.


def test_a_new_annotation_reads_the_quantizer_that_is_there() -> None:
    gm = prepared(shared_input(), image(*X), recipe=Recipe([Rule("b", None)]))
    editor = Editor(gm)
    spec = quantizers(gm)["x"].spec
    editor.annotate(node(gm, "b"), 0, Annotation(spec, "recipe", "after all"))
    result = InsertQuantizers()(gm)
    assert result.counts == {"rewired": 1}
    assert reads(result.graph_module, "b")[0] == "x_quantizer"
    assert activation_quantizers(result.graph_module) == ["x"]


# Names.


@pytest.mark.parametrize("method", ["half", "double", "to"])
def test_tensors_named_like_a_modules_attribute(method: str) -> None:
    """``x.to(...)`` makes a node called ``to``, which no submodule may be called."""
    call = (lambda x: x.to(torch.float32)) if method == "to" else (lambda x: getattr(x, method)())
    build = Lambda(lambda m, x: m.a(call(x)), a=conv())
    build.a.to(torch.float32 if method == "to" else getattr(torch, method))  # type: ignore[union-attr,operator]
    gm = prepared(seeded(lambda: build), image(*X))
    tensor = reads(gm, "a")[0].removesuffix("_quantizer")
    assert tensor == method
    assert f"{method}_" in quantizers(gm)
    assert quantizers(gm)[f"{method}_"].tensor == method
    calibrate(gm, [image(*X)], progress=False)
    quantized = convert(gm)
    assert torch.isfinite(quantized(image(*X))).all()


def test_a_model_with_quantizers_of_its_own() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.quantizers[0](x), quantizers=nn.ModuleList([conv()])))
    with pytest.raises(TraceError) as caught:
        prepared(model, image(*X))
    assert caught.value.message == "the model has an attribute called 'quantizers', which fxq needs"
    assert caught.value.hint == "rename it in the model"
    assert caught.value.module_path == "quantizers.0"


# Copies.


def test_a_prepared_graph_can_be_copied_and_saved() -> None:
    gm = prepared(basic_net(), image(*X))
    twin = copy.deepcopy(gm)
    calibrate(twin, [image(*X)], progress=False)
    assert not quantizers(gm)["x"].solved
    assert all(a.spec == b.spec for a, b in zip(quantizers(gm).values(), quantizers(twin).values(), strict=True))
    assert decided(twin, "blocks_0_add") == decided(gm, "blocks_0_add")
    fresh = prepared(basic_net(), image(*X))
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(quantizers(fresh)["x"].scale, quantizers(twin)["x"].scale)


def test_without_annotations_nothing_happens() -> None:
    gm = after(PREPARE.passes[:-1], seeded(lambda: Lambda(lambda _, x: x.relu())), image(2, 3))
    result = check_pass(InsertQuantizers(), gm)
    assert not result.modified
    assert quantizers(result.graph_module) == {}


def test_weights_wait_for_no_data() -> None:
    gm = prepared(lenet(), image(1, 1, 28, 28))
    assert all((q.observer is None) == name.endswith("_weight") for name, q in quantizers(gm).items())
    assert all(isinstance(q, Quantizer) for q in quantizers(gm).values())


def test_half_precision_tensors_keep_their_type() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x)

    gm = prepared(seeded(lambda: Lambda(forward, a=conv())).bfloat16(), image(*X).bfloat16())
    assert gm(image(*X).bfloat16()).dtype is torch.bfloat16
