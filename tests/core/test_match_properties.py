"""Patterns and rewrites on graphs that nobody chose: what is found is all that is there, and rewriting keeps values."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import Lambda, before
from torch import Tensor, fx

from fxq.editor import Editor
from fxq.match import Match, OneOf, Op, Part, Pattern, Var, find, maybe
from fxq.ops import kind_name
from fxq.rewriting import RewritePass
from fxq.testing import check_pass

ONE: Mapping[str, Callable[..., Tensor]] = {"relu": torch.relu, "neg": torch.neg, "sigmoid": torch.sigmoid}
TWO: Mapping[str, Callable[..., Tensor]] = {"add": torch.add, "mul": torch.mul}
Step = tuple[str, int, int]

STEPS: st.SearchStrategy[list[Step]] = st.lists(
    st.tuples(st.sampled_from([*ONE, *TWO, "relu", "neg"]), st.integers(0, 3), st.integers(0, 3)),
    min_size=1,
    max_size=12,
)


def program(steps: list[Step]) -> Lambda:
    """A model of one operation a step, each on tensors of a few steps before; gives all that nothing reads."""

    def run(_: Lambda, x: Tensor) -> Any:
        values, read = [x], set()
        for name, first, second in steps:
            places = [max(0, len(values) - 1 - back) for back in (first, second)][: 2 if name in TWO else 1]
            read.update(places)
            values.append((ONE | TWO)[name](*(values[i] for i in places)))
        return tuple(value for i, value in enumerate(values) if i and i not in read)

    return Lambda(run)


def graph(steps: list[Step]) -> fx.GraphModule:
    return before("fuse-batch-norm", program(steps), torch.randn(2, 3))


def patterns() -> list[Pattern]:
    x, y = Var("x"), Var("y")
    neg = Op("neg", x, name="neg")
    return [
        Pattern(Op("relu", neg)),
        Pattern(Op("relu", Op("relu", x, shared=True))),
        Pattern(maybe("relu", maybe("neg", Op("add", x, y)))),
        Pattern(Op("add", Op("relu", x), y, commutative=True)),
        Pattern(Op("add", neg, neg)),
        Pattern(Op("mul", Op("add", x, y), x, commutative=True)),
        Pattern(Op("add", OneOf(Op("relu", x), Op("neg", x)), Op(("neg", "sigmoid"), y), commutative=True)),
        Pattern(Op("mul", Op("neg", x, shared=True), Op("neg", x, shared=True))),
    ]


Bound = dict[Part, Any]


def embeddings(part: Any, value: Any, bound: Bound) -> Iterator[Bound]:
    """Every way in which a part of the tests' patterns can be a value, by trying all."""
    if part in bound:
        if bound[part] is value:
            yield bound
    elif isinstance(part, Var):
        yield {**bound, part: value}
    elif isinstance(part, OneOf):
        for choice in part.choices:
            yield from embeddings(choice, value, {**bound, part: value})
    elif isinstance(value, fx.Node) and kind_name(value) in part.calls:
        orders = [tuple(value.args), tuple(value.args)[::-1]] if part.commutative else [tuple(value.args)]
        for order in orders:
            ways = [{**bound, part: value}]
            for operand, argument in zip(part.operands, order, strict=True):
                ways = [more for way in ways for more in embeddings(operand, argument, way)]
            yield from ways


def own(bound: Bound) -> set[fx.Node]:
    return {value for part, value in bound.items() if isinstance(part, Op) and not part.shared}


def closed(root: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether nothing outside reads a node inside, but the last."""
    return all(node is root or nodes.issuperset(node.users) for node in nodes)


@given(STEPS, st.integers(0, len(patterns()) - 1))
@settings(max_examples=150, deadline=None)
def test_what_is_found_is_there_and_what_is_there_is_found(steps: list[Step], number: int) -> None:
    g, pattern = graph(steps).graph, patterns()[number]
    (output,) = pattern.outputs
    found = find(g, pattern)
    owned: set[fx.Node] = set()
    for match in found.matches:
        fits = [own(bound) for bound in embeddings(output, match.output, {})]
        assert set(match.nodes) in fits
        assert closed(match.output, set(match.nodes))
        assert owned.isdisjoint(match.nodes)
        owned.update(match.nodes)
    for node in g.nodes:
        if node not in owned:
            left = [own(bound) for bound in embeddings(output, node, {})]
            assert not any(closed(node, nodes) and owned.isdisjoint(nodes) for nodes in left)
    assert [str(m.output) for m in found.matches] == [str(n) for n in g.nodes if n in {m.output for m in found.matches}]


@dataclass(frozen=True)
class DropDoubleReLU(RewritePass):
    """The second of two ReLUs does nothing."""

    name = "drop-double-relu"
    requires = ("canonical",)

    def pattern(self) -> Pattern:
        return Pattern(Op("relu", Op("relu", name="first", shared=True)))

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.replace(match.output, match["first"])
        editor.erase(match.output)


@dataclass(frozen=True)
class NegateTheSum(RewritePass):
    """-a + -b is -(a + b), to the last bit."""

    name = "negate-the-sum"
    requires = ("canonical",)

    def pattern(self) -> Pattern:
        return Pattern(Op("add", Op("neg", Var("a"), name="left"), Op("neg", Var("b"), name="right")))

    def rewrite(self, editor: Editor, match: Match) -> None:
        with editor.before(match.output):
            total = editor.call(operator.add, (match["a"], match["b"]), like=match.output)
        editor.retarget(match.output, operator.neg, (total,))
        editor.erase_dead([match["left"], match["right"]])


@dataclass(frozen=True)
class DropDoubleNeg(RewritePass):
    """-(-x) is x; the inner negation may go on being read."""

    name = "drop-double-neg"
    requires = ("canonical",)

    def pattern(self) -> Pattern:
        return Pattern(Op("neg", Op("neg", Var("x"), name="inner", shared=True)))

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.replace(match.output, match["x"])
        editor.erase_dead([match.output])


@dataclass(frozen=True)
class Doubled(RewritePass):
    """x + x is x * 2."""

    name = "doubled"
    requires = ("canonical",)

    def pattern(self) -> Pattern:
        x = Var("x")
        return Pattern(Op("add", x, x))

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.retarget(match.output, operator.mul, (match["x"], 2))


@dataclass(frozen=True)
class PairedSigmoids(RewritePass):
    """Of a ReLU and a negation of one tensor the negation becomes a product: a pattern of two outputs."""

    name = "paired"
    requires = ("canonical",)

    def pattern(self) -> Pattern:
        x = Var("x")
        return Pattern(Op("neg", x, name="neg"), Op("relu", x))

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.retarget(match["neg"], operator.mul, (match["x"], -1))


REWRITES = (DropDoubleReLU(), NegateTheSum(), DropDoubleNeg(), Doubled(), PairedSigmoids())


@given(STEPS, st.sampled_from(REWRITES))
@settings(max_examples=120, deadline=None)
def test_rewriting_keeps_every_bit_wherever_matches_overlap(steps: list[Step], p: RewritePass) -> None:
    gm = graph(steps)
    result = check_pass(p, gm, must_change=False)
    assert not find(result.graph_module.graph, p.pattern()).matches
    assert result.modified == bool(find(gm.graph, p.pattern()).matches)


@given(STEPS, st.permutations(REWRITES))
@settings(max_examples=40, deadline=None)
def test_rewrites_of_one_another_keep_every_bit(steps: list[Step], passes: list[RewritePass]) -> None:
    gm = graph(steps)
    for p in passes:
        gm = check_pass(p, gm, must_change=False).graph_module


def test_the_hand_made_rewrites_do_change_graphs() -> None:
    """Else the tests above could not fail."""
    steps: list[Step] = [("neg", 0, 0), ("neg", 1, 0), ("add", 0, 1), ("relu", 0, 0), ("relu", 0, 0), ("add", 0, 0)]
    changed = {p.name for p in REWRITES if p(graph(steps)).modified}
    assert changed == {"negate-the-sum", "drop-double-relu", "doubled"}
    chain: list[Step] = [("neg", 0, 0), ("neg", 0, 0), ("neg", 0, 0), ("relu", 1, 0)]
    assert DropDoubleNeg()(graph(chain)).counts
    assert PairedSigmoids()(graph(chain)).modified


def test_a_match_whose_nodes_an_earlier_rewrite_took_is_found_again() -> None:
    chain: list[Step] = [("relu", 0, 0)] * 40
    result = check_pass(DropDoubleReLU(), graph(chain))
    assert [n.target for n in result.graph_module.graph.nodes].count(torch.relu) == 1
