"""Patterns: what they find, in which order, and why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda, before
from torch import Tensor, fx, nn
from toys import image, seeded, traced

from fxq.errors import PassError
from fxq.match import MAX_READERS, Constant, OneOf, Op, Pattern, Var, explain, find, maybe
from fxq.ops import kind_name
from fxq.random_models import random_model

X = image(2, 4, 5, 5)


def graph(function: Callable[..., Any], **parts: Any) -> fx.Graph:
    """The canonical graph of a function of a module's parts; nothing is folded."""
    return before("fuse-batch-norm", seeded(lambda: Lambda(function, **parts)), X).graph


def found(g: fx.Graph, pattern: Pattern) -> list[list[str]]:
    """The nodes of each match by name."""
    return [[n.name for n in m.nodes] for m in find(g, pattern).matches]


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


CONV = Op("conv2d", Var("x"), Constant("weight"), name="conv")


CHAIN = Pattern(maybe("relu", maybe("batch_norm", CONV, name="norm"), name="act"))


# What a part may be.


def test_optional_links_are_taken_where_they_are() -> None:
    g = graph(
        lambda m, x: m.d(torch.relu(m.n(m.c(torch.relu(m.b(m.m(m.a(x)))))))),
        a=conv(), b=conv(), c=conv(), d=conv(), m=nn.BatchNorm2d(4), n=nn.BatchNorm2d(4),
    )  # fmt: skip
    assert found(g, CHAIN) == [["a", "m"], ["b", "relu"], ["c", "n", "relu_1"], ["d"]]
    matches = find(g, CHAIN).matches
    assert [m.get("norm") and m["norm"].name for m in matches] == ["m", None, "n", None]
    assert [m.get("act") and m["act"].name for m in matches] == [None, "relu", "relu_1", None]
    assert [m["conv"].name for m in matches] == ["a", "b", "c", "d"]
    assert [m.output.name for m in matches] == ["m", "relu", "relu_1", "d"]
    assert matches[1]["x"] is matches[0].output


def test_attributes_literals_and_lists() -> None:
    g = graph(
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + 3.0,
        a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1, groups=2),
    )  # fmt: skip
    assert found(g, Pattern(Op("conv2d", groups=2))) == [["b"]]
    assert found(g, Pattern(Op("conv2d", groups=lambda n: n < 2))) == [["a"]]
    assert found(g, Pattern(Op("conv2d", padding=[1, 1], groups=1.0))) == [["a"]]
    assert found(g, Pattern(Op("conv2d", no_such=1))) == []
    assert found(g, Pattern(Op("add", Op("cat", [Op("conv2d"), Op("conv2d", groups=2)], dim=1), 3.0))) == [
        ["a", "b", "cat", "add"]
    ]
    assert found(g, Pattern(Op("cat", [Var("a"), Var("b"), Var("c")]))) == []
    assert found(g, Pattern(Op("cat", [Op("conv2d", groups=2), Var()]))) == []
    assert found(g, Pattern(Op("add", Var(), 4.0))) == []
    assert found(g, Pattern(Op("add", Var(), Constant(equals=3)))) == [["add"]]
    assert found(g, Pattern(Op("add", Var(), Constant(equals=3.5)))) == []
    assert found(g, Pattern(Op("conv2d", Var(), Var(), Var(), Var()))) == []


def test_true_is_not_one() -> None:
    g = graph(lambda _, x: torch.flatten(x, 1))
    assert found(g, Pattern(Op("flatten", start_dim=1))) == [["flatten"]]
    assert found(g, Pattern(Op("flatten", start_dim=True))) == []


def test_constants() -> None:
    g = graph(lambda m, x: (x * m.one_half) * m.scales, one_half=torch.tensor(0.5), scales=torch.ones(4, 1, 1))
    assert found(g, Pattern(Op("mul", Var(), Constant(equals=0.5)))) == [["mul"]]
    assert found(g, Pattern(Op("mul", Var(), Constant(where=lambda t: t.dim() == 3)))) == [["mul_1"]]
    assert found(g, Pattern(Op("mul", Constant("c")))) == []
    assert found(g, Pattern(Op("mul", Var(where=lambda n: n.op == "placeholder")))) == [["mul"]]
    assert found(g, Pattern(Op("mul", Var(), Constant(equals=0.1)))) == []


def test_functions_methods_and_modules_of_a_graph_that_is_not_canonical() -> None:
    model = Lambda(lambda m, x: m.act(m.lin(F.relu(x).relu())), act=nn.Hardtanh(-2, 2), lin=nn.Linear(5, 5))
    g = traced(seeded(lambda: model), X).graph
    assert found(g, Pattern(Op(F.relu))) == [["relu"]]
    assert found(g, Pattern(Op("relu", Op(F.relu)))) == [["relu", "relu_1"]]
    assert found(g, Pattern(Op(nn.Hardtanh, Op(nn.Linear, in_features=5), min_val=-2))) == [["lin", "act"]]
    assert found(g, Pattern(Op(nn.Module, name="m"))) == [["lin"], ["act"]]
    assert found(g, Pattern(Op((nn.Linear, nn.Hardtanh), Op("relu")))) == [["relu_1", "lin"]]
    assert found(g, Pattern(Op("Lin*"))) == [["lin"]]
    assert found(g, Pattern(Op(nn.Hardtanh, min_val=-1))) == []


def test_arguments_are_matched_in_their_canonical_order_however_they_were_written() -> None:
    g = traced(Lambda(lambda m, x: F.conv2d(weight=m.w, input=x, stride=2), w=torch.randn(4, 4, 1, 1)), X).graph
    assert found(g, Pattern(Op("conv2d", Var("x"), Constant("w"), None, stride=(2, 2)))) == [["conv2d"]]


def test_commutative_operands() -> None:
    g = graph(lambda m, x: (m.a(x) + torch.relu(x)) * (torch.relu(x) + m.b(x)), a=conv(), b=conv())
    ordered = Pattern(Op("add", Op("conv2d"), Op("relu")))
    either = Pattern(Op("add", Op("conv2d", name="c"), Op("relu", name="r"), commutative=True))
    assert found(g, ordered) == [["a", "relu", "add"]]
    assert found(g, either) == [["a", "relu", "add"], ["relu_1", "b", "add_1"]]
    assert [m["c"].name for m in find(g, either).matches] == ["a", "b"]
    swapped = Pattern(Op("mul", Op("add", Op("relu")), Op("add", Op("conv2d")), commutative=True))
    (match,) = find(g, swapped).matches
    assert match.nodes[-1].name == "mul"
    assert found(g, Pattern(Op("mul", Op("add", Op("relu")), Op("add", Op("conv2d"))))) == []


def test_alternatives_keep_their_order() -> None:
    g = graph(lambda _, x: F.relu6(x) + F.silu(x))
    pattern = Pattern(Op("add", OneOf(Op("silu", name="s"), Op("relu6", name="r")), OneOf(Op("silu", name="t"))))
    (match,) = find(g, pattern).matches
    assert (match.get("s"), match["r"].name, match["t"].name) == (None, "relu6", "silu")


def test_one_part_twice_is_one_node() -> None:
    x = Var("x")
    square = Pattern(Op("mul", x, Op("sigmoid", x), commutative=True))
    g = graph(lambda _, x: (torch.sigmoid(x) * x) + torch.sigmoid(x * 2) * x)
    assert found(g, square) == [["sigmoid", "mul"]]
    miss = find(g, square).nearest
    assert miss is not None
    assert (miss.node.name, miss.matched) == ("mul_2", 2)
    assert miss.reason == "mul_1 is not x, which x is elsewhere"


# Several outputs.


def split() -> Pattern:
    halves = Op("chunk", Var("x"), name="halves")
    return Pattern(Op("relu", Op("getitem", halves, 0), name="a"), Op("sigmoid", Op("getitem", halves, 1), name="b"))


def test_several_outputs() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        a, b = torch.chunk(x, 2, 1)
        c, d = torch.chunk(x * 2, 2, 1)
        return torch.relu(a) * torch.sigmoid(b) + torch.sigmoid(d) * torch.relu(c) + torch.relu(b)[:, :1]

    g = graph(forward)
    pattern = split()
    # The second half of the first split has two readers.
    (match,) = find(g, pattern).matches
    assert [n.name for n in match.outputs] == ["relu_1", "sigmoid_1"]
    assert {n.name for n in match.nodes} == {"chunk_1", "getitem_2", "getitem_3", "relu_1", "sigmoid_1"}
    assert "getitem_1 is read by relu_2 too" in explain(g, pattern)


def test_several_outputs_over_a_shared_input() -> None:
    x = Var("x")
    pair = Pattern(Op("conv2d", x, name="a"), Op("conv2d", x, name="b"))
    g = graph(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv())
    assert found(g, pair) == [["a", "b"]]
    assert found(graph(lambda m, x: m.a(x) + m.b(torch.relu(x)), a=conv(), b=conv()), pair) == []


def test_outputs_that_cannot_become_one_node_are_left_alone() -> None:
    x = Var("x")
    pair = Pattern(Op("add", x, Var(), name="a"), Op("mul", x, Var(), name="b"))

    def forward(_: Any, x: Tensor) -> Tensor:
        a = x + 1
        return x * torch.relu(a)

    g = graph(forward)
    assert found(g, pair) == []
    assert "relu comes after add, with which its reader is to be replaced" in explain(g, pair)


def test_a_tensor_with_too_many_readers_for_several_outputs() -> None:
    x = Var("x")
    pair = Pattern(Op("relu", x), Op("sigmoid", x))
    g = graph(lambda _, x: sum((torch.relu(x) for _ in range(MAX_READERS)), torch.sigmoid(x)))
    assert found(g, pair) == []
    assert "x has more than 64 readers to choose from" in explain(g, pair)


# Order.


def test_overlapping_matches_the_later_wins() -> None:
    g = graph(lambda _, x: torch.relu(torch.relu(torch.relu(x))))
    assert found(g, Pattern(Op("relu", Op("relu")))) == [["relu_1", "relu_2"]]


def test_back_to_back_matches() -> None:
    g = graph(lambda _, x: torch.relu(torch.sigmoid(torch.relu(torch.sigmoid(x)))))
    assert found(g, Pattern(Op("relu", Op("sigmoid", Var("x"))))) == [
        ["sigmoid", "relu"],
        ["sigmoid_1", "relu_1"],
    ]


def test_two_matches_that_want_one_node() -> None:
    """A shared part belongs to nobody; one that is not shared has one reader, or no match."""

    def forward(_: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return torch.relu(y) + torch.sigmoid(y)

    g = graph(forward)
    both = Pattern(Op(("relu", "sigmoid"), Op("tanh")))
    assert found(g, both) == []
    assert "tanh is read by" in explain(g, both)
    assert found(g, Pattern(Op(("relu", "sigmoid"), Op("tanh", shared=True)))) == [["relu"], ["sigmoid"]]


def test_a_node_belongs_to_one_match() -> None:
    x = Var("x")
    pair = Pattern(Op("relu", x), Op("sigmoid", x))
    g = graph(lambda _, x: torch.relu(x) + torch.sigmoid(x) + torch.relu(x))
    result = find(g, pair)
    assert [[n.name for n in m.nodes] for m in result.matches] == [["sigmoid", "relu_1"]]
    assert [str(m.reason) for m in result.misses] == ["sigmoid belongs to the match at relu_1"]


def chains_by_hand(g: fx.Graph) -> list[list[str]]:
    """Convolution, BatchNorm if there, ReLU if there, as a plain loop from the convolution on finds them."""
    chains = []
    for first in g.nodes:
        if kind_name(first) != "conv2d":
            continue
        chain = [first]
        for link in ("batch_norm", "relu"):
            (*others,) = chain[-1].users
            if len(others) == 1 and kind_name(others[0]) == link:
                chain.append(others[0])
        chains.append(chain)
    return [[n.name for n in chain] for chain in chains]


def test_chains_of_random_graphs_are_those_that_a_loop_finds() -> None:
    lengths = set()
    for seed in range(40):
        g = before("fuse-batch-norm", random_model(seed, 12), torch.randn(2, 4, 6, 6)).graph
        chains = sorted(chains_by_hand(g))
        assert sorted(found(g, CHAIN)) == chains
        lengths |= set(map(len, chains))
    assert lengths == {1, 2, 3}


def test_a_check_that_declines_leaves_the_nodes_to_others() -> None:
    g = graph(lambda _, x: torch.relu(torch.relu(torch.relu(x))))
    pattern = Pattern(Op("relu", Op("relu", name="inner")))
    result = find(g, pattern, lambda m: "not the last" if m.output.name == "relu_2" else None)
    assert [[n.name for n in m.nodes] for m in result.matches] == [["relu", "relu_1"]]
    assert [(m.node.name, m.reason, m.complete) for m in result.misses] == [("relu_2", "not the last", True)]


# Why not.


def test_the_nearest_miss() -> None:
    g = graph(lambda m, x: torch.relu(m.a(x) + x) + torch.relu(m.b(x).abs()) + torch.relu(x), a=conv(), b=conv())
    pattern = Pattern(Op("relu", Op("add", Op("conv2d"), Op("conv2d"))))
    text = explain(g, pattern)
    assert text.startswith("0 matches\nnearest miss at relu (")
    assert "test_match.py:" in text
    assert text.endswith("x is no call of conv2d")
    assert explain(g, Pattern(Op("silu"))) == "0 matches\nno node comes near; the graph calls abs, add, conv2d, relu"
    assert explain(g, Pattern(Op("conv2d"))) == "2 matches\n  at a\n  at b"


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no output": (Pattern, "the output of a pattern has to be a call"),
    "anything": (lambda: Pattern(Var("x")), "the output of a pattern has to be a call"),
    "maybe anything": (lambda: Pattern(maybe("relu", Var("x"))), "the output of a pattern has to be a call"),
    "two names": (lambda: Pattern(Op("add", Var("x"), Var("x"))), "two parts called x"),
    "nothing shared": (lambda: Pattern(Op("relu", Var("x")), Op("relu", Var("y"))), "shares no part"),
    "a number": (lambda: Op(3), "a pattern calls 3"),  # type: ignore[arg-type]
    "half a sum": (lambda: Op("add", Var(), commutative=True), "a commutative pattern has two operands"),
}


@pytest.mark.parametrize("case", BAD)
def test_patterns_that_are_none(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(PassError, match=message):
        make()


def test_asking_a_match_for_what_it_has_not() -> None:
    (match,) = find(graph(lambda _, x: x + 2), Pattern(Op("add", Var("x"), Var("y")))).matches
    assert (match["x"].name, match.value("y"), match.get("y")) == ("x", 2, None)
    with pytest.raises(PassError, match="y is 2 in this match, no node"):
        match["y"]
    with pytest.raises(PassError, match="no part called 'z'") as caught:
        match["z"]
    assert caught.value.hint == "it has x, y"
