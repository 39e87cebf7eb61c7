"""Writes that a graph cannot repeat are refused at the user's line, and the model's own tensors stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_place import Program, X, functional
from torch import Tensor, fx, nn
from toys import image, traced

from fxq.errors import TraceError
from fxq.passes import Functionalize


def writes_out(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


def writes_expanded_base(x: Tensor) -> Any:
    y = x[:1] * 2
    z = y.expand(3, 3, 4)
    y.add_(1)
    w = y.as_strided((3, 4), (4, 1))
    w.add_(1)
    return z, w


def resizes(x: Tensor) -> Tensor:
    y = x * 2
    y.resize_(2, 2)
    return y


def random_numbers(x: Tensor) -> Tensor:
    return torch.empty_like(x).normal_() + x


def several_bases(x: Tensor) -> Any:
    a, b = x * 2, x * 3
    c, d = torch.broadcast_tensors(a, b)
    b.add_(1)
    return a, b, c, d


def another_dtype(x: Tensor) -> Any:
    y = x * 2
    y.view(torch.int32).add_(1)
    return y


def position_from_values(x: Tensor) -> Tensor:
    y = x * 2
    y[: (x > 9).sum()] = 0
    return y


def written_second(x: Tensor) -> Tensor:
    y = x * 2
    second_first(x, y)
    return y


@fx.wrap
def second_first(x: Tensor, y: Tensor) -> Tensor:
    return y.add_(x)


@fx.wrap
def adds_to_rows(x: Tensor, y: Tensor) -> Tensor:
    if float(y.abs().max()) > 0:  # keeps it whole
        x[1:] += y[1:]
    return x


def whole_functions(x: Tensor) -> Any:
    y = x * 2
    row = y[1]
    z = adds_to_rows(y, x)
    adds_to_rows(y[:, 1:], x[:, 1:])
    return y, z, row, adds_to_rows(x + 1, y)


def test_whole_functions_that_write_their_first_argument_work_on_a_copy() -> None:
    gm = functional(Program(whole_functions), image(*X))
    calls = [n for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "adds_to_rows_on_a_copy"]
    assert len(calls) == 3


def test_a_function_that_is_traced_through_may_write_any_argument() -> None:
    functional(Program(written_second), image(*X))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "out": (writes_out, r"writes its result into another tensor \(out=\)"),
    "as_strided": (writes_expanded_base, "is a view through as_strided whose memory is changed later"),
    "resize": (resizes, "cannot be rewritten"),
    "random": (random_numbers, "cannot be rewritten"),
    "several bases": (several_bases, "gives views of several tensors, and one is changed later"),
    "another dtype": (another_dtype, "is a view of another dtype whose memory is changed later"),
    "position from values": (position_from_values, "a position that depends on values"),
    "second argument": (written_second, "changes a tensor that is not its first argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    program, why = REFUSED[name]
    line = program.__code__.co_firstlineno
    with pytest.raises(TraceError, match=why) as caught:
        Functionalize()(traced(Program(program), image(*X), options={"leaf_modules": ["second_first"]}))
    assert caught.value.source is not None
    file, number = caught.value.source.split(": ")[0].rsplit(":", 1)
    assert file == __file__
    assert line < int(number) <= line + 6
    assert "without changing a tensor in place" in (caught.value.hint or "")


class Counting(nn.Module):
    """Counts its calls in a buffer, with or without the input's help."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "number":
            self.calls.add_(1)
        else:
            self.calls.add_(x.sum())
        return x + self.calls


def test_the_models_own_tensors() -> None:
    with pytest.raises(TraceError, match="the model changes its own calls when it runs"):
        traced(Counting("number"), image(*X))
    gm = traced(Counting("input"), image(*X))
    with pytest.raises(TraceError, match=r"changes the model's own calls"):
        Functionalize()(gm)
    assert float(gm.calls) == 0


class Leaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


def test_statistics_of_the_batch_need_no_running_ones() -> None:
    def program(m: nn.Module, x: Tensor) -> Tensor:
        x = F.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True)
        return F.instance_norm(x, m.norm.running_mean, m.norm.running_var)

    model = Program(program, norm=nn.BatchNorm1d(3))
    gm = functional(model, image(*X), golden="passes/functionalize_batch_statistics")
    held = copy.deepcopy(gm.state_dict())
    gm(image(*X))
    assert all(torch.equal(held[k], v) for k, v in gm.state_dict().items())


def test_leaf_modules_that_write() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Leaf())
    gm = traced(model, image(2, 4), options={"leaf_modules": [Leaf]})
    with pytest.raises(TraceError, match="changes its input in a way that cannot be rewritten"):
        Functionalize()(gm)
