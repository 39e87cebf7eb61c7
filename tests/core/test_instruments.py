"""What watches a pipeline: dumps, numeric checks, hooks, the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from placing import Lambda
from scaling import RoundedScaled, Scaled
from torch import Tensor, fx, nn
from toys import (
    basic_net,
    bottleneck_net,
    branches,
    image,
    lenet,
    nested_inputs,
    nested_model,
    seeded,
    traced,
)

import fxq
from fxq.editor import Editor
from fxq.errors import FxqError, PassError, VerifyError
from fxq.graph import state
from fxq.instruments import Dump, Instrument, NumericCheck, format_diff, node_values
from fxq.manager import PassManager, Pipeline
from fxq.passbase import Pass, PassResult
from fxq.passes import CONVERT, PREPARE, PREPARE_QAT
from fxq.printer import format_graph

X = (2, 3, 16, 16)


@dataclass(frozen=True)
class ChangingScaled(Scaled):
    """The same, declared as what it is."""

    name = "changing-scaled"
    numeric = "changes-values"


@dataclass(frozen=True)
class Broken(Pass):
    """Brings an in-place operation into a functional graph."""

    name = "broken"

    def call(self, editor: Editor) -> None:
        for node in list(editor.graph.nodes):
            if node.target is torch.relu:
                editor.retarget(node, torch.relu_, node.args)


def small() -> fx.GraphModule:
    return traced(Lambda(lambda _, x: torch.sigmoid(torch.relu(x)) + x), image(2, 3))


# Dumps.


def dumped(pipeline: Pipeline, **options: Any) -> str:
    said: list[str] = []
    PassManager(instruments=[Dump(said.append, **options)]).run(pipeline, small())
    return "".join(said)


def test_a_dump_shows_what_changed() -> None:
    pipeline = Pipeline("p", (PREPARE.passes[0], ChangingScaled(2.0)))
    gm = small()
    first = format_graph(gm)
    assert dumped(pipeline) == (
        f"== before changing-scaled{{factor=2.0}}\n{first}\n"
        f"== after changing-scaled{{factor=2.0}}: created 1, rewired 1\n"
        f"{format_graph(ChangingScaled(2.0)(gm).graph_module)}\n"
    )
    assert dumped(pipeline, every=True).startswith("== functionalize: nothing changed\n== before changing-scaled")
    assert dumped(pipeline, only=["functionalize"]) == ""
    assert dumped(pipeline, only=["functionalize"], every=True) == "== functionalize: nothing changed\n"


def test_a_dump_as_a_difference() -> None:
    assert dumped(Pipeline("p", (ChangingScaled(2.0),)), diff=True) == (
        "== changing-scaled{factor=2.0}: created 1, rewired 1\n"
        "…\n"
        " %relu = relu(%x) : float32[2,3]\n"
        "-%sigmoid = sigmoid(%relu) : float32[2,3]\n"
        "+%mul = mul(%relu, 2.0) : float32[2,3]\n"
        "+%sigmoid = sigmoid(%mul) : float32[2,3]\n"
        " %add = add(%sigmoid, %x) : float32[2,3]\n"
    )
    assert format_diff("a\nb", "a\nb") == ""


def test_a_dump_of_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VerifyError):
        PassManager(instruments=[Dump()]).run(Pipeline("p", (PREPARE.passes[0], Broken())), small())
    out = capsys.readouterr().out
    assert out.startswith("== before broken\n%x = placeholder()")
    assert "== broken failed: pass broken left an illegal graph: the graph is not functional: relu changes" in out
    assert out.endswith("return %add\n")


# Numbers.


@pytest.mark.parametrize("build", [basic_net, bottleneck_net, branches], ids=lambda b: b.__name__)
def test_built_in_passes_do_what_they_declare(build: Callable[[], nn.Module]) -> None:
    check = NumericCheck()
    gm = PassManager(instruments=[check]).run(PREPARE, traced(build(), image(*X)))
    assert check.differences["insert-quantizers"] == 0
    assert check.differences["expand-modules"] == 0
    assert 0 <= check.differences.get("fuse-batch-norm", 0) < 1e-6
    fxq.calibrate(gm, [image(*X)], progress=False)
    manager = PassManager(instruments=[check])
    manager.run(CONVERT, gm)
    assert list(check.differences) == [run.name for run in manager.log if run.modified]
    assert 1e-4 < check.differences["convert-quantizers"] < 0.1


def test_training_is_checked_too() -> None:
    check = NumericCheck()
    gm = PassManager(instruments=[check]).run(PREPARE_QAT, traced(basic_net(), image(*X)))
    assert check.differences["residual-add"] == 0
    assert "observed" in state(gm).properties


def test_a_check_feeds_no_observer() -> None:
    gm = PassManager(instruments=[NumericCheck()]).run(PREPARE, traced(lenet(), image(1, 1, 28, 28)))
    quantizers = [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]
    assert quantizers
    assert not any(q.fed for q in quantizers if not q.weight)  # type: ignore[union-attr]


CLAIMS = {
    "exact": (Scaled(1.0 + 1e-6), True),
    "exact and nothing changes": (Scaled(1.0), False),
    "rounding": (RoundedScaled(1.0 + 1e-6), False),
    "more than rounding": (RoundedScaled(1.01), True),
    "changes": (ChangingScaled(7.0), False),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_claim_names_the_first_node_that_differs(claim: str) -> None:
    p, wrong = CLAIMS[claim]
    manager = PassManager(instruments=[NumericCheck()])
    if not wrong:
        manager.run(Pipeline("p", (p,)), small())
        return
    with pytest.raises(
        PassError, match=f"pass {p.name} declares itself {p.numeric} and changes the output by"
    ) as caught:
        manager.run(Pipeline("p", (p,)), small())
    assert "the first node that differs is sigmoid, by" in caught.value.message
    assert caught.value.node == "sigmoid"
    assert "test_instruments.py:" in str(caught.value.source)


@dataclass(frozen=True)
class Overfed(Pass):
    """Gives ReLU an argument too many."""

    name = "overfed"

    def call(self, editor: Editor) -> None:
        (node,) = editor.graph.find_nodes(op="call_function", target=torch.relu)
        editor.retarget(node, torch.relu, (*node.args, 3))


def test_a_graph_that_does_not_run_any_more_is_the_passs_error() -> None:
    with pytest.raises(PassError, match=r"pass overfed left a graph that does not run: TypeError: relu\(\) takes 1"):
        PassManager(instruments=[NumericCheck()]).run(Pipeline("p", (Overfed(),)), small())


def test_an_input_may_be_called_output() -> None:
    class Named(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return torch.relu(output) * 2

    gm = traced(Named(), image(2, 3))
    with pytest.raises(PassError, match="the first node that differs is mul, by"):
        PassManager(instruments=[NumericCheck()]).run(Pipeline("p", (Scaled(3.0),)), gm)
    assert torch.equal(node_values(gm)["output"], image(2, 3))
    assert torch.equal(node_values(gm)["return"], gm(image(2, 3)))


def test_what_counts_as_a_difference() -> None:
    @dataclass(frozen=True)
    class Wider(Scaled):
        name = "wider"

        def call(self, editor: Editor) -> None:
            node = next(n for n in editor.graph.nodes if n.target is torch.relu)
            with editor.after(node):
                made = editor.call(torch.Tensor.double, (node,), like=node)
            editor.replace(node, made)

    with pytest.raises(PassError, match="changes the output by inf of its magnitude"):
        PassManager(instruments=[NumericCheck()]).run(Pipeline("p", (Wider(),)), small())


def test_own_inputs_nested_inputs_and_what_is_random() -> None:
    gm = traced(nested_model(), *nested_inputs())
    named, pair = nested_inputs()
    values = node_values(gm)
    torch.testing.assert_close(values["return"]["sum"], nested_model()(named, pair)["sum"])
    doubled = node_values(gm, ({k: 2 * v for k, v in named.items()}, pair))
    assert not torch.equal(doubled["return"]["sum"], values["return"]["sum"])

    model = Lambda(lambda _, x: torch.nn.functional.dropout(x, 0.5, training=True))
    random = traced(model, image(4, 16))
    assert torch.equal(node_values(random)["return"], node_values(random)["return"])


def test_values_are_those_before_a_write() -> None:
    values = node_values(traced(Lambda(lambda _, x: torch.relu_(x + 1)), image(3, 4)))
    assert bool((values["add"] < 0).any())
    assert not bool((values["return"] < 0).any())


# Hooks and the table.


class Recorder(Instrument):
    """Notes each hook."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, gm: fx.GraphModule) -> None:
        self.calls.append("start")

    def before(self, p: Pass, gm: fx.GraphModule) -> None:
        self.calls.append(f"before {p.name}")

    def after(self, p: Pass, result: PassResult) -> None:
        self.calls.append(f"after {p.name} {result.modified}")

    def failed(self, p: Pass, gm: fx.GraphModule, error: FxqError) -> None:
        self.calls.append(f"failed {p.name} {type(error).__name__}")


def test_hooks_come_in_order() -> None:
    seen = Recorder()
    manager = PassManager(instruments=[seen])
    with pytest.raises(VerifyError):
        manager.run(Pipeline("p", (PREPARE.passes[0], ChangingScaled(2.0), Broken(), Scaled())), small())
    assert seen.calls == [
        "start", "before functionalize", "after functionalize False", "before changing-scaled",
        "after changing-scaled True", "before broken", "failed broken VerifyError",
    ]  # fmt: skip
    assert [run.name for run in manager.log] == ["functionalize", "changing-scaled"]


def test_an_instrument_that_objects_stops_the_run_with_its_place() -> None:
    class Objects(Recorder):
        def after(self, p: Pass, result: PassResult) -> None:
            raise PassError("no")

    seen = Objects()
    with pytest.raises(PassError) as caught:
        PassManager(instruments=[seen]).run(Pipeline("p", (Scaled(),)), small())
    assert caught.value.__notes__ == ["in pass scaled of pipeline p, after nothing"]
    assert seen.calls[-1] == "failed scaled PassError"


def test_the_table() -> None:
    manager = PassManager()
    manager.run(PREPARE, traced(basic_net(), image(*X)))
    lines = manager.table().splitlines()
    assert lines[0].split() == ["pass", "changes", "nodes", "ms", "verify", "ms"]
    assert [line.split()[0] for line in lines[1:]] == [*(p.name for p in PREPARE), "total"]
    assert len({len(line) for line in lines}) == 1
    row = next(line for line in lines if line.startswith("residual-add"))
    assert "annotated 2" in row
    by_name = {run.name: run for run in manager.log}
    assert by_name["advise"].verify_seconds == 0
    assert by_name["insert-quantizers"].verify_seconds > 0
    assert (
        by_name["insert-quantizers"].nodes == by_name["annotate"].nodes + by_name["insert-quantizers"].counts["created"]
    )
    total = sum(run.seconds for run in manager.log) * 1e3
    assert lines[-1].split()[1] == f"{total:.1f}"


def test_a_model_keeps_its_numbers_under_all_instruments() -> None:
    said: list[str] = []
    model = basic_net()
    manager = PassManager(instruments=[Dump(said.append, diff=True), NumericCheck(), Recorder()])
    watched = manager.run(PREPARE, traced(model, image(*X)))
    plain = PassManager().run(PREPARE, traced(basic_net(), image(*X)))
    assert format_graph(watched) == format_graph(plain)
    assert said


def test_seeded_models_are_what_the_check_runs() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.lin(x), lin=nn.Linear(3, 3)))
    x: Tensor = image(2, 3)
    torch.testing.assert_close(node_values(traced(model, x))["return"], model(x))
