"""Passes made of patterns: rewritten until none is left, in order, and stopped where that does not end."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from placing import Lambda, before, check_pass, node
from torch import Tensor, nn
from toys import basic_net, image, seeded

from fxq.editor import Editor
from fxq.errors import PassError
from fxq.graph import state
from fxq.match import Match, Op, Pattern, Var
from fxq.printer import format_graph
from fxq.rewriting import RewritePass

X = image(2, 4, 5, 5)


@dataclass(frozen=True)
class SquareOfSum(RewritePass):
    """``(a + b) * (a + b)`` becomes ``pow(a + b, 2)``; a sum with a number is left alone."""

    name = "square-of-sum"
    requires = ("canonical",)
    numeric = "rounding"

    def pattern(self) -> Pattern:
        total = Op("add", Var("a"), Var("b"), name="total")
        return Pattern(Op("mul", total, total))

    def check(self, match: Match) -> str | None:
        return None if match.get("b") else f"{match['total'].name} adds a number"

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.retarget(match.output, operator.pow, (match["total"], 2))


def test_a_rewrite_pass() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = x + m.c(x), x + 1
        return y * y + z * z

    model = seeded(lambda: Lambda(forward, c=nn.Conv2d(4, 4, 1)))
    gm = before("fuse-batch-norm", model, X)
    result = check_pass(SquareOfSum(), gm)
    assert result.modified
    assert node(result.graph_module, "mul").target is operator.pow
    assert node(result.graph_module, "mul_1").target is operator.mul
    (note,) = result.notes
    assert (note.node, note.rule, note.kind) == ("mul_1", "square-of-sum", "declined")
    assert note.text == "left alone: add_1 adds a number"
    torch.testing.assert_close(result.graph_module(X), model(X))
    assert SquareOfSum().explain(gm).startswith("1 matches\n  at mul\nnearest miss at mul_1")
    assert not SquareOfSum()(before("fuse-batch-norm", basic_net(), image(2, 3, 16, 16))).modified


@dataclass(frozen=True)
class Collapse(RewritePass):
    """``relu(relu(x))`` becomes ``relu(x)``."""

    name = "collapse"

    def pattern(self) -> Pattern:
        return Pattern(Op("relu", Op("relu", Var("x"), name="inner")))

    def rewrite(self, editor: Editor, match: Match) -> None:
        editor.replace(match.output, match["inner"])
        editor.erase(match.output)


def test_a_pattern_is_rewritten_until_none_is_left() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        for _ in range(9):
            x = torch.relu(x)
        return x

    gm = before("fuse-batch-norm", Lambda(forward), X)
    result = check_pass(Collapse(), gm)
    assert [n.op for n in result.graph_module.graph.nodes] == ["placeholder", "call_function", "output"]
    assert result.counts["erased"] == 8


@dataclass(frozen=True)
class ReadsBefore(RewritePass):
    """``sigmoid(relu(x))`` becomes ``sigmoid(x)``: back to back, each match reads what another one gives."""

    name = "reads-before"

    def pattern(self) -> Pattern:
        return Pattern(Op("sigmoid", Op("relu", Var("x"))))

    def rewrite(self, editor: Editor, match: Match) -> None:
        with editor.before(match.output):
            made = editor.call(torch.sigmoid, (match["x"],), like=match.output)
        editor.replace(match.output, made)
        editor.erase_dead([match.output])


def test_back_to_back_rewrites() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.sigmoid(torch.relu(x))
        return x

    result = check_pass(ReadsBefore(), before("fuse-batch-norm", Lambda(forward), X))
    assert "relu" not in format_graph(result.graph_module)
    assert result.counts["created"] == 4
    expected = X
    for _ in range(4):
        expected = torch.sigmoid(expected)
    assert torch.equal(result.graph_module(X), expected)
    assert state(result.graph_module).notes == ()


@dataclass(frozen=True)
class Endless(Collapse):
    """A rewrite that leaves its own pattern."""

    name = "endless"
    rounds = 5

    def rewrite(self, editor: Editor, match: Match) -> None:
        with editor.before(match.output):
            made = editor.call(torch.relu, (match["inner"],), like=match.output)
        editor.replace(match.output, made)
        editor.erase(match.output)


@dataclass(frozen=True)
class Idle(Collapse):
    """A rewrite that does nothing."""

    name = "idle"

    def rewrite(self, editor: Editor, match: Match) -> None:
        pass


def test_a_rewrite_that_does_not_end() -> None:
    gm = before("fuse-batch-norm", Lambda(lambda _, x: torch.relu(torch.relu(x))), X)
    with pytest.raises(PassError, match="pass endless still finds its pattern after 5 rounds") as caught:
        Endless()(gm)
    assert "test_rewriting.py:" in str(caught.value.source)
    with pytest.raises(PassError, match="pass idle found its pattern and changed nothing"):
        Idle()(gm)
