"""Canonicalize: every way to write an operation becomes its kind's one call, with the same result to the
bit.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from placing import Lambda, check_pass, of_kind
from spellings import SPELLINGS, Call, V
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from toys import after, image, lenet

from fxq.ops import KINDS, kind, kind_name
from fxq.passes import Canonicalize, Functionalize


def canonical(call: Call, x: Tensor, **parts: Any) -> fx.GraphModule:
    """The canonical graph of a call; it gives what the call gives."""
    model = Lambda(lambda _, x: call(x), **parts).eval()
    gm = after((Functionalize(), Canonicalize()), model, x.clone())
    with torch.no_grad():
        torch.manual_seed(0)
        expected = pytree.tree_leaves(call(x.clone()))
        torch.manual_seed(0)
        found = pytree.tree_leaves(gm(x.clone()))
    assert len(expected) == len(found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return gm


def test_every_kind_has_spellings() -> None:
    assert sorted(SPELLINGS) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_spellings(name: str) -> None:
    x, calls = SPELLINGS[name]
    for index, call in enumerate(calls):
        gm = canonical(call, x)
        made = of_kind(gm, name)
        assert made, f"spelling {index} of {name} gave\n{gm.graph}"
        for node in made:
            assert node.target is KINDS[name].target
            names = list(KINDS[name].params)[KINDS[name].tensors :]
            assert list(node.kwargs) == [n for n in names if n not in KINDS[name].optional or n in node.kwargs]
        assert not Canonicalize()(gm).modified


DECLINED: dict[str, tuple[Tensor, Call]] = {
    "add with alpha": (V, lambda x: torch.add(x, V, alpha=2)),
    "sub with alpha": (V, lambda x: x.sub(V, alpha=0.5)),
    "rounded division": (V, lambda x: torch.div(x, 0.3, rounding_mode="floor")),
    "mean in another dtype": (V, lambda x: x.mean(0, dtype=torch.float64)),
    "sum in another dtype": (V, lambda x: torch.sum(x, dtype=torch.float64)),
    "softmax over a default dimension": (V, lambda x: nn.Softmax(None)._call_impl(x)),
    "a view of another dtype": (V, lambda x: x.view(torch.int32)),
    "a bitwise operation": (V, lambda x: (x > 0) & (x < 1)),
}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    x, call = DECLINED[name]
    gm = canonical(call, x)
    assert {kind_name(n) for n in gm.graph.nodes} & KINDS.keys() <= {"mul", "getitem"}
    last = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    assert kind(last) is None, gm.graph
    assert not Canonicalize()(gm).modified


def test_arithmetic_on_sizes_is_left_alone() -> None:
    gm = canonical(lambda x: x.reshape(x.shape[0] * x.size(1), 1) * math.pi, V)
    assert kind_name(next(n for n in gm.graph.nodes if n.op == "output").args[0]) == "mul"


def test_names_of_what_is_no_kind() -> None:
    gm = canonical(lambda x: torch.add(x, x, alpha=2) - x.sub(x, alpha=3), V)
    names = [kind_name(n) for n in gm.graph.nodes]
    assert names == ["placeholder", "torch.add", "Tensor.sub", "sub", "output"]


def test_golden() -> None:
    gm = after((Functionalize(),), lenet(), image(1, 1, 28, 28))
    result = check_pass(Canonicalize(), gm, "passes/canonicalize_lenet")
    with torch.no_grad():
        x = image(1, 1, 28, 28)
        torch.testing.assert_close(result.graph_module(x), lenet()(x), rtol=0, atol=0)
