"""What a search for a pattern costs: no more, for each node, in a larger graph."""

from __future__ import annotations

import operator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from counting import calls_of
from torch import fx, nn

from fxq.match import Op, Pattern, Var, find, maybe


def long_graph(length: int) -> fx.Graph:
    """`length` calls, of which a pattern finds some and nearly finds others."""
    g = fx.Graph(nn.Module())
    x = y = g.placeholder("x")
    for i in range(length // 4):
        y = g.call_function(F.conv2d, (y, x, None))
        y = g.call_function((torch.relu, F.silu)[i % 2], (y,))
        y = g.call_function(torch.mul, (y, g.call_function(torch.sigmoid, (y if i % 3 else x,))))
    g.output(y)
    return g


def patterns() -> dict[str, Pattern]:
    x = Var("x")
    conv_ = Op("conv2d", Var("y"))
    return {
        "chain": Pattern(maybe("relu", maybe("batch_norm", conv_))),
        "swish": Pattern(Op("mul", x, Op("sigmoid", x), commutative=True)),
        "deep": Pattern(Op("mul", maybe("relu", Op("conv2d", Op("mul"))), Op("sigmoid"), commutative=True)),
        "pair": Pattern(Op("mul", x, Var()), Op("sigmoid", x)),
    }


@pytest.mark.parametrize("name", patterns())
def test_visits_grow_with_the_graph(name: str) -> None:
    pattern = patterns()[name]
    small, large = (find(long_graph(n), pattern) for n in (1_000, 10_000))
    assert len(large.matches) + len(large.misses) > 1_000
    assert large.visits <= 10.1 * small.visits
    assert large.visits < 20 * 10_000


def test_a_tensor_that_everyone_reads_costs_no_more() -> None:
    def wide(width: int) -> fx.Graph:
        g = fx.Graph(nn.Module())
        y = x = g.call_function(torch.relu, (g.placeholder("x"),))
        for _ in range(width):
            y = g.call_function(operator.add, (y, g.call_function(torch.sigmoid, (x,))))
        g.output(y)
        return g

    calls = {}
    for width in (500, 5_000):
        calls[width] = calls_of(partial(find, wide(width), Pattern(Op("sigmoid", Op("relu")))))
    assert calls[5_000] <= 10.1 * calls[500]
