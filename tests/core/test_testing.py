"""The checks for passes: what they let pass, what they catch, and how small they make it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda
from torch import fx, nn
from toys import basic_net, image, traced

from fxq.editor import Editor
from fxq.errors import PassError, VerifyError
from fxq.graph import state
from fxq.match import Match, Op, Pattern, Var
from fxq.ops import kind_name
from fxq.passbase import Pass
from fxq.passes import PREPARE, ConvertQuantizers, FuseBatchNorm
from fxq.rewriting import RewritePass
from fxq.testing import RandomReport, check_pass, check_pass_on_random_graphs, graph_for, random_model

X = (2, 3, 16, 16)


@dataclass(frozen=True)
class HardSwish(RewritePass):
    """SiLU becomes Hardswish."""

    name = "hard-swish"
    requires = ("canonical",)
    numeric = "changes-values"

    def pattern(self) -> Pattern:
        return Pattern(Op("silu", Var("x")))

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.retarget(match.output, F.hardswish, (match["x"],))


@dataclass(frozen=True)
class ReluOfSum(RewritePass):
    """A pass with a mistake: ``relu(a + b)`` becomes ``relu(a) + b``."""

    name = "relu-of-sum"
    requires = ("canonical",)

    def pattern(self) -> Pattern:
        return Pattern(Op("relu", Op("add", Var("a"), Var("b"))))

    def rewrite(self, editor: Editor, match: Match) -> None:
        with editor.before(match.output):
            relu = editor.call(torch.relu, (match["a"],), like=match.output)
        editor.retarget(match.output, operator.add, (relu, match.value("b")))


@dataclass(frozen=True)
class Hidden(HardSwish):
    """Changes the graph behind the editor's back."""

    name = "hidden"

    def call(self, editor: Editor) -> None:
        for node in editor.graph.nodes:
            if node.target is F.silu:
                node.target = F.hardswish
        editor.gm.recompile()


@dataclass(frozen=True)
class HiddenWeights(HardSwish):
    """Changes weights in place, which no editor sees."""

    name = "hidden-weights"

    def call(self, editor: Editor) -> None:
        with torch.no_grad():
            for parameter in editor.gm.parameters():
                parameter.mul_(2)


@dataclass(frozen=True)
class Boastful(HardSwish):
    """Counts a change that it did not make."""

    name = "boastful"

    def call(self, editor: Editor) -> None:
        editor.counts["retargeted"] += 1


@dataclass(frozen=True)
class Restless(HardSwish):
    """Adds another negation pair each time."""

    name = "restless"
    numeric = "exact"

    def call(self, editor: Editor) -> None:
        node = next(n for n in editor.graph.nodes if n.op == "placeholder")
        with editor.after(node):
            made = editor.call(operator.neg, (node,), like=node)
            twice = editor.call(operator.neg, (made,), like=node)
        editor.replace(node, twice, only=lambda user: user is not made)


@dataclass(frozen=True)
class Illegal(HardSwish):
    """Brings an in-place call into a functional graph."""

    name = "illegal"

    def call(self, editor: Editor) -> None:
        for node in editor.graph.nodes:
            if node.target is F.silu:
                editor.retarget(node, torch.relu_, node.args)


@dataclass(frozen=True)
class Talkative(HardSwish):
    """Notes something new on each run."""

    name = "talkative"

    def call(self, editor: Editor) -> None:
        super().call(editor)
        editor.note(next(iter(editor.graph.nodes)), self.name, f"note {len(state(editor.gm).notes)}")


def swish() -> nn.Module:
    return Lambda(lambda m, x: F.silu(m.conv(F.silu(x))), conv=nn.Conv2d(3, 3, 1))


def test_a_good_pass() -> None:
    result = check_pass(HardSwish(), swish(), image(*X))
    assert result.counts == {"retargeted": 2}
    assert {kind_name(n) for n in result.graph_module.graph.nodes} & {"silu", "hardswish"} == {"hardswish"}
    assert check_pass_on_random_graphs(HardSwish(), count=20, extra={"silu": nn.SiLU}) == RandomReport(20, 20)


class SelfAttention(nn.Module):
    """Attention over the rows of a picture's channels: takes and gives [2, 4, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(1, 2)
        return self.attention(rows, rows, rows, need_weights=False)[0].view(-1, 4, 6, 6)


class Einsum(nn.Module):
    """A product of each matrix with itself, as an equation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,ncwk->nchk", x, x) * 0.1


class Scaled(nn.Module):
    """torch's own attention over tensors of three dimensions, which no exporter takes whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(1, 2)
        return nn.functional.scaled_dot_product_attention(rows, rows, rows).view(-1, 4, 6, 6)


class Packed(nn.Module):
    """Attention whose queries, keys and values one layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, -1)
        return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).view(-1, 4, 6, 6)


# What a pass looks for and random models do not have by themselves.
ATTENTION: dict[str, dict[str, type[nn.Module]]] = {
    "expand-attention": {"self_attention": SelfAttention},
    "decompose-attention": {"scaled": Scaled},
    "decompose-products": {"einsum": Einsum},
    "separate-projections": {"packed": Packed},
}


RARE = ("advise", "decompose-activations", "propagate-quantization", "quantize-concat", "quantize-norms", "tie-scales")


@pytest.mark.parametrize("p", PREPARE.passes, ids=lambda p: p.name)
def test_the_built_in_passes(p: Pass) -> None:
    """On random models too each of them keeps its word; what some of them look for is rare in these."""
    rare = p.name in RARE
    extra = ATTENTION.get(p.name)
    assert check_pass_on_random_graphs(p, count=12, layers=10, must_change=not rare, extra=extra).graphs == 12


BAD: dict[str, tuple[Pass, str]] = {
    "hidden": (Hidden(), "pass hidden changed the graph past the Editor"),
    "hidden weights": (HiddenWeights(), "pass hidden-weights says nothing of what it changed"),
    "boastful": (Boastful(), "pass boastful says that it changed the graph, and it did not"),
    "restless": (Restless(), "pass restless changes its own result on a second run"),
    "talkative": (Talkative(), "pass talkative says more on a second run: note 1"),
    "illegal": (Illegal(), "the graph is not functional"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_caught(case: str) -> None:
    p, message = BAD[case]
    with pytest.raises(PassError, match=message):
        check_pass(p, swish(), image(*X))
    with pytest.raises(PassError, match=message):
        check_pass_on_random_graphs(p, count=20, extra={"silu": nn.SiLU})


def test_what_changed_is_shown() -> None:
    with pytest.raises(PassError) as caught:
        check_pass(Restless(), swish(), image(*X))
    assert "+%neg_2 = " in caught.value.__notes__[0]
    with pytest.raises(PassError) as caught:
        check_pass(HiddenWeights(), swish(), image(*X))
    assert caught.value.__notes__ == ["the printed graphs are equal: what differs is stored"]
    with pytest.raises(VerifyError):
        check_pass(Illegal(), swish(), image(*X))


def test_a_second_run_may_be_left_out() -> None:
    assert check_pass(Restless(), swish(), image(*X), idempotent=False).modified


def test_a_pass_that_finds_nothing_is_not_checked() -> None:
    with pytest.raises(PassError, match="pass hard-swish changed nothing, so there is nothing to check"):
        check_pass(HardSwish(), basic_net(), image(*X))
    assert not check_pass(HardSwish(), basic_net(), image(*X), must_change=False).modified

    @dataclass(frozen=True)
    class Never(HardSwish):
        name = "never"

        def pattern(self) -> Pattern:
            return Pattern(Op("no_such_kind"))

    with pytest.raises(PassError, match="pass never changed none of 5 random graphs") as caught:
        check_pass_on_random_graphs(Never(), count=5)
    assert "extra=" in str(caught.value.hint)


def test_the_smallest_failing_model_is_printed() -> None:
    with pytest.raises(PassError) as caught:
        check_pass_on_random_graphs(ReluOfSum(), count=200)
    text = caught.value.message
    assert text.startswith("pass relu-of-sum declares itself exact and changes the output by")
    program = text.split("):\n", 1)[1].split("\nand its graph:\n")[0].splitlines()
    assert program[0] == "x0: float32[2, 4, 6, 6]"
    assert len(program) == 3
    assert program[1].endswith(" of x0, x0")
    assert program[1].startswith("x1 = add")
    assert program[2] in ("x2 = ReLU() of x1", "x2 = ReLU(inplace=True) of x1")
    assert text.count("\n%") == 3
    assert "(of seed " in text


def test_random_models_are_repeatable_and_diverse() -> None:
    example = torch.randn(2, 4, 6, 6)
    for seed in range(3):
        assert torch.equal(random_model(seed)(example), random_model(seed)(example))
    seen: set[object] = set()
    for seed in range(40):
        gm = traced(random_model(seed), example)
        assert gm(example).shape == example.shape
        seen |= {kind_name(n) for n in gm.graph.nodes}
    assert {"Conv2d", "BatchNorm2d", "add", "cat", "sigmoid", "MaxPool2d", "placeholder"} <= seen


def test_the_graph_that_a_pass_wants() -> None:
    @dataclass(frozen=True)
    class Wants(HardSwish):
        requires = ("annotated", "fused")

    assert {"annotated", "fused"} <= state(graph_for(Wants(), basic_net(), image(*X))).properties
    assert "observed" not in state(graph_for(Wants(), basic_net(), image(*X))).properties
    assert state(graph_for(HardSwish(), basic_net(), image(*X))).properties == {
        "traced",
        "functional",
        "canonical",
    }
    gm: Callable[[], fx.GraphModule] = lambda: graph_for(ConvertQuantizers(), basic_net(), image(*X))  # noqa: E731
    assert "observed" in state(gm()).properties

    @dataclass(frozen=True)
    class Late(HardSwish):
        requires = ("quantized",)

    with pytest.raises(PassError, match=r"no pass of fxq\.passes\.PREPARE gives a graph that is quantized"):
        graph_for(Late(), basic_net(), image(*X))


def test_a_module_that_lost_its_parameters_can_be_printed() -> None:
    """A convolution without bias that stays beside one that is folded."""
    model = Lambda(
        lambda m, x: m.b(m.norm(m.a(x))),
        a=nn.Conv2d(3, 4, 1, bias=False), norm=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1, bias=False),
    ).eval()  # fmt: skip
    fused = check_pass(FuseBatchNorm(), model, image(*X)).graph_module
    assert "Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1), bias=False)" in str(fused)
    assert sorted(fused.state_dict()) == ["a.bias", "a.weight", "b.weight"]


def test_a_check_on_random_graphs_can_allow_that_nothing_changes() -> None:
    @dataclass(frozen=True)
    class Absent(HardSwish):
        name = "absent"

        def pattern(self) -> Pattern:
            return Pattern(Op("no_such_kind"))

    assert check_pass_on_random_graphs(Absent(), count=3, must_change=False) == RandomReport(3, 0)
