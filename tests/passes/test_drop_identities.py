"""Drop identities: what repeats its input goes, what only looks like it stays."""

# ruff: noqa: FBT003 (the tables hold calls as users write them)

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda, check_pass
from torch import Tensor, fx, nn
from toys import after, image, seeded, traced

from fxq.graph import state
from fxq.ops import kind_name
from fxq.passes import Canonicalize, DropIdentities, ExpandModules, Functionalize

BEFORE = (Functionalize(), ExpandModules(), Canonicalize())


def dropped(call: Callable[..., Any], *shape: int, **parts: nn.Module) -> list[str]:
    """The kinds that are left of a call; numbers, legality and a second run are checked."""
    model = Lambda(lambda m, x: call(m, x) if parts else call(x), **parts).eval()
    x = image(*shape)
    result = check_pass(DropIdentities(), after(BEFORE, model, x))
    assert "canonical" in state(result.graph_module).properties
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(x), model(x), rtol=0, atol=0)
    return [kind_name(n) for n in result.graph_module.graph.nodes if n.op not in ("placeholder", "output")]


GONE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "dropout in place": lambda x: F.dropout2d(x, 0.5, False, True),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5),
    "feature alpha dropout": lambda x: F.feature_alpha_dropout(x, 0.5),
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "cat of one": lambda x: torch.cat([x], dim=1),
    "permutation that moves nothing": lambda x: x.permute(0, 1, 2, 3),
    "flatten of one dimension": lambda x: x.flatten(3),
    "several": lambda x: torch.cat([x.clone().detach()]).contiguous(),
}
STAYS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a permutation": (lambda x: x.permute(0, 1, 3, 2), "permute"),
    "a permutation of equal sizes": (lambda x: x.permute(0, 2, 1, 3), "permute"),
    "a flatten": (lambda x: x.flatten(2), "flatten"),
    "cat of two": (lambda x: torch.cat([x, x]), "cat"),
    "a reshape that holds for this batch only": (lambda x: x.reshape(1, -1, 4, 3), "reshape"),
    "an expand that holds for this batch only": (lambda x: x.expand(1, 4, 4, 3), "expand"),
}


@pytest.mark.parametrize("name", GONE)
def test_gone(name: str) -> None:
    assert dropped(lambda x: torch.relu(GONE[name](x * 2)), 1, 4, 4, 3) == ["mul", "relu"]


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    call, kind = STAYS[name]
    assert dropped(lambda x: torch.relu(call(x * 2)), 1, 4, 4, 3) == ["mul", kind, "relu"]


def test_dropout_that_the_user_wants_stays() -> None:
    model = Lambda(lambda _, x: F.dropout(x, 0.5))
    gm = after(BEFORE, model, image(2, 3))
    assert not check_pass(DropIdentities(), gm).modified


def test_modules() -> None:
    parts = {"drop": nn.Dropout2d(), "same": nn.Identity(), "alpha": nn.AlphaDropout()}
    kinds = dropped(lambda m, x: m.alpha(m.same(m.drop(torch.relu(x)))), 1, 4, 4, 3, **parts)
    assert kinds == ["relu"]


def test_nodes_without_a_reader_go() -> None:
    def call(x: Tensor) -> Tensor:
        unread = x.exp() + 1
        torch._assert(x.dim() == 4, "rank")
        y = x * 2
        y.relu_()
        operator.add(unread, 1)
        return x * 3

    assert dropped(call, 1, 4, 4, 3) == ["mul"]


def test_an_input_that_nobody_reads_stays() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.clone()

    gm = after((*BEFORE, DropIdentities()), Two(), image(2), image(3))
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "placeholder", "output"]
    torch.testing.assert_close(gm(image(2), image(3)), image(2))


def test_the_output_itself() -> None:
    assert dropped(lambda x: x.clone(), 1, 4, 4, 3) == []


def test_golden() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.drop = nn.Dropout(0.2)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(torch.relu(self.conv(x))).contiguous()
            return self.fc(torch.cat([x.mean((2, 3))], dim=1).clone())

    model = seeded(Block)
    gm = after(BEFORE, model, image(2, 3, 6, 6))
    result = check_pass(DropIdentities(), gm, "passes/drop_identities")
    assert result.counts == {"rewired": 4, "erased": 4}
    with torch.no_grad():
        x = image(2, 3, 6, 6)
        torch.testing.assert_close(result.graph_module(x), model(x), rtol=0, atol=0)


def test_it_needs_a_functional_graph() -> None:
    """``x.clone()`` is no identity while something still writes to the copy."""
    gm: fx.GraphModule = traced(Lambda(lambda _, x: x.clone().relu_() + x), image(2))
    with pytest.raises(Exception, match="drop-identities needs a graph that is functional"):
        DropIdentities()(gm)
