"""Pipelines as data, and the manager that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from counting import calls_of
from placing import Lambda, prepared
from torch import fx, nn
from toys import basic_net, bottleneck_net, branches, image, lenet, preactivation_net, seeded, traced

import fxq
from fxq.editor import Editor
from fxq.errors import PassError, RecipeError, VerifyError
from fxq.graph import state
from fxq.manager import PassManager, Pipeline
from fxq.passbase import Pass
from fxq.passes import CONVERT, PREPARE, Annotate, ConvertQuantizers, DropIdentities, FuseBatchNorm, InsertQuantizers
from fxq.printer import format_graph
from fxq.quantizer import quantizers
from fxq.recipe import Recipe, Rule
from fxq.reports import report

X = (2, 3, 16, 16)


@dataclass(frozen=True)
class Named(Pass):
    """Does nothing under a name of its own."""

    name = "named"

    def call(self, editor: Editor) -> None:
        pass


@dataclass(frozen=True)
class TwoTimes(Pass):
    """Put a multiplication by 2 behind every input."""

    name = "two-times"
    factor: float = 2.0

    def call(self, editor: Editor) -> None:
        for node in editor.graph.find_nodes(op="placeholder"):
            with editor.after(node):
                made = editor.call(torch.mul, (node, self.factor), like=node)
            editor.replace(node, made)


def names(pipeline: Pipeline) -> list[str]:
    return [p.name for p in pipeline]


# Pipelines.


def test_the_prepare_pipeline() -> None:
    assert str(PREPARE) == (
        "prepare(functionalize, expand-modules, expand-attention, decompose-products, canonicalize, drop-identities, "
        "fuse-batch-norm, separate-projections, decompose-attention, decompose-activations, annotate, advise, "
        "residual-add, quantize-concat, quantize-norms, propagate-quantization, tie-scales, insert-quantizers)"
    )
    assert names(CONVERT)[-3:] == ["convert-quantizers", "write-clamped-sums", "quantize-biases"]
    PREPARE.check_order(frozenset({"traced"}))
    CONVERT.check_order(frozenset({"traced", "observed"}))


def test_editing_by_name() -> None:
    base = Pipeline("base", (FuseBatchNorm(), Annotate()))
    new = Named()
    assert names(base.after("fuse-batch-norm", new)) == ["fuse-batch-norm", "named", "annotate"]
    assert names(base.after("annotate", new, new)) == ["fuse-batch-norm", "annotate", "named", "named"]
    assert names(base.before("fuse-batch-norm", new)) == ["named", "fuse-batch-norm", "annotate"]
    assert names(base.replace("annotate", new)) == ["fuse-batch-norm", "named"]
    assert names(base.without("annotate")) == ["fuse-batch-norm"]
    assert names(base) == ["fuse-batch-norm", "annotate"]
    assert base.after("annotate", new).name == "base"
    assert str(Pipeline("p", (TwoTimes(3.0), Named()))) == "p(two-times{factor=3.0}, named)"


def test_unknown_names() -> None:
    for edit in ("after", "before", "replace", "without"):
        with pytest.raises(PassError) as caught:
            getattr(PREPARE, edit)("fuse-bn")
        assert caught.value.message == "pipeline prepare has no pass 'fuse-bn'"
        assert "fuse-batch-norm" in str(caught.value.hint)


def test_pipelines_hold_passes() -> None:
    with pytest.raises(PassError) as caught:
        Pipeline("p", (Annotate,))  # type: ignore[arg-type]
    assert caught.value.hint == "write Annotate()"
    with pytest.raises(PassError, match="is no pass"):
        PREPARE.after("annotate", print)  # type: ignore[arg-type]
    assert Pipeline("p", [Named()]).passes == (Named(),)  # type: ignore[arg-type]


ORDERS = {
    "a provider left out": (
        PREPARE.without("annotate"),
        "in pipeline prepare, advise needs a graph that is annotated",
        "add Annotate() before it",
    ),
    "a provider that comes later": (
        PREPARE.without("drop-identities").after("fuse-batch-norm", DropIdentities()),
        "in pipeline prepare, fuse-batch-norm needs a graph that is canonical",
        "move drop-identities before it",
    ),
    "a stage that no pass gives": (
        Pipeline("late", (InsertQuantizers(),)),
        "in pipeline late, insert-quantizers needs a graph that is annotated",
        "add Annotate() before it",
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_is_checked_before_anything_runs(case: str) -> None:
    pipeline, message, hint = ORDERS[case]
    gm = traced(lenet(), image(1, 1, 28, 28))
    text = format_graph(gm)
    with pytest.raises(PassError) as caught:
        PassManager().run(pipeline, gm, inplace=True)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert format_graph(gm) == text
    assert state(gm).properties == {"traced"}


def test_unknown_properties() -> None:
    @dataclass(frozen=True)
    class Odd(Named):
        provides = ("fussed",)

    with pytest.raises(PassError, match="pass named speaks of fussed, which is no property of a graph") as caught:
        Pipeline("p", (Odd(),)).check_order(frozenset())
    assert "fused" in str(caught.value.hint)


@pytest.mark.parametrize(("given", "hint"), [("prepare()", "Pipeline.parse"), ([DropIdentities()], "fxq.Pipeline(")])
def test_what_is_no_pipeline(given: Any, hint: str) -> None:
    with pytest.raises(PassError, match="is no pipeline") as caught:
        fxq.prepare(basic_net(), image(1, 3, 16, 16), pipeline=given)
    assert hint in str(caught.value.hint)


# Running.


def test_the_log_is_honest() -> None:
    """Each pass says modified exactly if the text changed, and a second run of it changes nothing."""
    for build, shape in (
        (lenet, (1, 1, 28, 28)),
        (basic_net, X),
        (bottleneck_net, X),
        (preactivation_net, X),
        (branches, X),
    ):
        gm = traced(build(), image(*shape))
        for p in PREPARE:
            before = format_graph(gm)
            result = p(gm)
            gm = result.graph_module
            changed = format_graph(gm) != before
            # What functionalize switches off inside an activation module is no part of the text.
            assert result.modified == changed or (result.modified and p.name == "functionalize"), p.name
            assert result.modified == bool(result.counts)
            assert not p(gm).modified, p.name


def test_the_log() -> None:
    manager = PassManager()
    gm = manager.run(PREPARE, traced(basic_net(), image(*X)))
    assert [run.name for run in manager.log] == names(PREPARE)
    by_name = {run.name: run for run in manager.log}
    assert by_name["residual-add"].counts == {"annotated": 2}
    assert not by_name["advise"].modified
    assert by_name["insert-quantizers"].counts["created"] == 14
    assert all(run.seconds > 0 for run in manager.log)
    assert {"traced", "functional", "canonical", "fused", "annotated", "observed"} == state(gm).properties
    manager.run(Pipeline("none", ()), gm)
    assert manager.log == []


def test_a_copy_unless_in_place() -> None:
    gm = traced(lenet(), image(1, 1, 28, 28))
    text = format_graph(gm)
    made = PassManager().run(PREPARE, gm)
    assert made is not gm
    assert format_graph(gm) == text
    assert PassManager().run(PREPARE, gm, inplace=True) is gm
    assert format_graph(gm) == format_graph(made)


def test_a_custom_pass_goes_in_by_name() -> None:
    model = lenet()
    gm = fxq.prepare(model, image(1, 1, 28, 28), pipeline=PREPARE.before("canonicalize", TwoTimes()))
    with torch.no_grad():
        expected = model(2 * image(1, 1, 28, 28))
        torch.testing.assert_close(gm(image(1, 1, 28, 28)), expected, rtol=1e-5, atol=1e-6)
    assert "two-times" in state(gm).provenance["prepare"]
    assert next(n for n in gm.graph.nodes if n.name == "x_quantizer" or "mul" in n.name)


@dataclass(frozen=True)
class Unfunctional(Pass):
    """Brings an in-place operation into a functional graph."""

    name = "unfunctional"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.find_nodes(op="call_function", target=torch.relu)):
            editor.retarget(node, torch.relu_, node.args)


def test_verification_names_pass_and_node() -> None:
    pipeline = PREPARE.after("canonicalize", Unfunctional())
    with pytest.raises(VerifyError) as caught:
        PassManager().run(pipeline, traced(lenet(), image(1, 1, 28, 28)))
    assert caught.value.message == (
        "pass unfunctional left an illegal graph: the graph is not functional: relu changes a tensor in place"
    )
    assert caught.value.node == "relu"
    assert "toys.py:" in str(caught.value.source)
    (note,) = caught.value.__notes__
    assert note == (
        "in pass unfunctional of pipeline prepare, after functionalize, expand-modules, expand-attention, "
        "decompose-products, canonicalize"
    )


def test_verification_can_be_turned_off() -> None:
    pipeline = PREPARE.after("canonicalize", Unfunctional())
    gm = PassManager(verify_each=False).run(pipeline, traced(lenet(), image(1, 1, 28, 28)))
    assert [n for n in gm.graph.nodes if n.target is torch.relu_]


def test_verification_follows_changes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxq import manager as room

    verified: list[fx.GraphModule] = []
    monkeypatch.setattr(room, "verify", verified.append)
    manager = PassManager()
    manager.run(PREPARE, traced(basic_net(), image(*X)))
    assert len(verified) == sum(run.modified for run in manager.log)
    assert len(verified) < len(manager.log)


def test_a_failing_pass_is_placed() -> None:
    class Buggy(Named):
        def call(self, editor: Editor) -> None:
            raise IndexError("out of range")

    with pytest.raises(PassError, match="pass named failed: IndexError") as caught:
        PassManager().run(Pipeline("p", (Buggy(),)), traced(lenet(), image(1, 1, 28, 28)))
    assert caught.value.__notes__ == ["in pass named of pipeline p, after nothing"]


def test_errors_for_users_are_theirs() -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(lenet(), image(1, 1, 28, 28), recipe=Recipe([Rule("nowhere", None)]))
    assert not hasattr(caught.value, "__notes__")


# Cost.


def chain(length: int) -> nn.Module:
    """`length` nodes in a row: layers, additions of the input, concatenations, data movement."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(length // 10))
            self.norms = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(length // 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for layer, norm in zip(self.layers, self.norms, strict=True):
                z = norm(layer(torch.relu(y))) + x
                y = torch.cat([z, y], 1)[:, 1:3].flatten(2).unsqueeze(3).squeeze(3).view_as(x)
            return y

    return seeded(Chain)


def visits(length: int) -> dict[str, float]:
    """How many functions run in each step, per node of the graph that it leaves."""
    gm = traced(chain(length), image(1, 2, 2, 2))
    counted = {}
    for p in PREPARE:
        cost = calls_of(partial(PassManager().run, Pipeline("one", (p,)), gm, inplace=True))
        counted[p.name] = cost / len(gm.graph.nodes)
    for quantizer in quantizers(gm).values():
        channels = () if quantizer.axis is None else (2,)
        quantizer.set_parameters(torch.ones(channels), torch.zeros(channels, dtype=torch.int32))
    pipeline = Pipeline("one", (ConvertQuantizers(),))
    steps = {"convert-quantizers": partial(PassManager().run, pipeline, gm, inplace=True)}
    steps |= {"format_graph": partial(format_graph, gm), "report": partial(report, gm)}
    return counted | {name: calls_of(step) / len(gm.graph.nodes) for name, step in steps.items()}


def test_work_per_node_does_not_grow_with_the_graph() -> None:
    """Passes, verification and reports are linear: in ten times the graph a node costs what it did."""
    small, large = visits(300), visits(3000)
    growing = {name: (small[name], large[name]) for name in small if large[name] > 1.3 * small[name] + 1}
    assert growing == {}


def test_a_model_of_one_operation() -> None:
    gm = prepared(Lambda(lambda _, x: torch.relu(x)), image(2, 3))
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_function", "output"]
