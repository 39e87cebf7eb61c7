"""Functionalize: whatever a program does in place, the graph computes the same and changes nothing."""

# ruff: noqa: ARG005, FBT003 (the tables hold calls as users write them, of one signature each)

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_place import Program, Program2, X, functional
from placing import check_pass
from torch import Tensor, nn
from toys import after, basic_net, image, preactivation_net, traced

from fxq.errors import TraceError
from fxq.passes import Functionalize


def unused_relu(x: Tensor) -> Tensor:
    y = x * 2
    y.relu_()
    return y + 1


def on_the_input(x: Tensor) -> Tensor:
    x.mul_(2)
    return x.relu()


def augmented(x: Tensor) -> Any:
    y = x
    y += 1
    return x, y


def module_skip(m: nn.Module, x: Tensor) -> Tensor:
    y = x * 2
    return m.relu(y) + y


def shared_module(m: nn.Module, x: Tensor) -> Tensor:
    a, b = x * 2, x - 1
    return m.relu(a) + m.relu(b) * a - m.relu(-x) + b


def positional(x: Tensor) -> Tensor:
    y = x - 0.5
    F.relu(y, True)
    F.hardtanh(y, 0.0, 0.5, True)
    return y


def keyword_input(x: Tensor) -> Tensor:
    y = x + 1
    F.relu(input=y, inplace=True)
    return y


def chained(x: Tensor) -> Any:
    y = x * 2
    z = y.relu_().add_(1).mul_(3)
    return y, z


def result_then_write(x: Tensor) -> Any:
    y = x * 2
    z = y.add_(1)
    y.mul_(2)
    z.sub_(1)
    return y, z


def write_through(take: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def program(x: Tensor) -> Any:
        y = x * 2
        before, view = y + 0, take(y)
        view.add_(1).relu_()
        again = take(y)
        y.mul_(3)
        return before, view, again, y

    return program


def views_of_views(x: Tensor) -> Any:
    y = x * 2
    a = y.transpose(1, 2)[:, 1:]
    b = a.permute(2, 0, 1)[0]
    b.add_(1)
    c = a.chunk(2, dim=1)[0]
    c.mul_(2)
    b.sub_(3)
    return a, b, c, y


def part_of_split(x: Tensor) -> Any:
    y = x * 2
    a, b = y.split([1, 2], dim=1)
    b.add_(1)
    a.mul_(b[:, :1])
    c = torch.unbind(y, 2)[-1]
    c.zero_()
    return a, b, c, y


def of_a_made_tuple(x: Tensor) -> Any:
    values, indices = torch.max(x, 1)
    first = values.view(-1)
    values.add_(1)
    first.mul_(2)
    return values, indices, first, x


def mixed_dtypes(x: Tensor) -> Any:
    y = x.to(torch.float16)
    y.add_(x)
    z = x * 2
    z.gt_(0.5)
    k = (x * 4).to(torch.int32)
    k.copy_(x)
    return y, z, k


def filled(x: Tensor) -> Any:
    y = x * 2
    a, b, c = y[:, 0], y[:, 1], y[:, 2]
    a.fill_(3.0)
    b.copy_(x[:1, 1])
    c.fill_(x.sum())
    return y, a, b, c


def reshaped_in_place(x: Tensor) -> Any:
    y = x * 2
    z = y.view(-1)
    y.unsqueeze_(0)
    y.add_(1)
    y.squeeze_(0).transpose_(0, 1)
    y[0].mul_(2)
    return y, z


def size_arithmetic(x: Tensor) -> Tensor:
    n = x.shape[0]
    n *= 2
    n //= 2
    y = x.view(n, -1)
    y @= torch.ones(12, 3)
    return y


def switched_off(m: nn.Module, x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, training=False, inplace=True)
    return m.drop(y).relu_() + x


def through_data(x: Tensor) -> Any:
    y = x * 2
    y.data += 1
    y.detach().mul_(2)
    z = y.requires_grad_(False)
    z.relu_()
    return y


PROGRAMS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        unused_relu,
        on_the_input,
        augmented,
        positional,
        keyword_input,
        chained,
        result_then_write,
        views_of_views,
        part_of_split,
        of_a_made_tuple,
        mixed_dtypes,
        filled,
        reshaped_in_place,
        size_arithmetic,
    )
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    functional(Program(PROGRAMS[name]), image(*X), golden=f"passes/functionalize_{name}")


def test_modules() -> None:
    relu = nn.ReLU(inplace=True)
    functional(Program(module_skip, relu=relu), image(*X), golden="passes/functionalize_module_skip")
    functional(Program(shared_module, relu=relu), image(*X))
    assert relu.inplace
    functional(Program(switched_off, drop=nn.Dropout(inplace=True)), image(*X))
    for module in (nn.Threshold(0.1, 20, inplace=True), nn.RReLU(inplace=True), nn.ELU(inplace=True)):
        functional(Program(module_skip, relu=module), image(*X))


def test_attributes_of_tensors() -> None:
    with pytest.raises(TraceError, match=r"(?s)attribute data of a tensor is assigned.*test_functionalize.py:\d+"):
        traced(Program(through_data), image(*X))

    def program(x: Tensor) -> Tensor:
        y = x * 2
        y.detach().mul_(2)
        z = y.requires_grad_(False)
        z.relu_()
        t = y.mT
        t.add_(1)
        t[0] += 1
        return y

    functional(Program(program), image(*X))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(6, 4),
    "view by the batch": lambda x: x.view(x.size(0), -1),
    "reshape": lambda x: torch.reshape(x, (2, 12)),
    "flatten": lambda x: x.flatten(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:1].squeeze(),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "transpose": lambda x: x.transpose(0, 2),
    "transpose by keyword": lambda x: torch.transpose(x, dim0=-1, dim1=0),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "t": lambda x: x[0].t(),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(2, 0, 1),
    "permute by tuple": lambda x: torch.permute(x, (-1, 0, -2)),
    "movedim": lambda x: x.movedim(0, 2),
    "movedim of several": lambda x: torch.movedim(x, (0, 1), (2, 0)),
    "select": lambda x: x.select(1, -1),
    "narrow": lambda x: x.narrow(2, 1, 2),
    "narrow from the end": lambda x: x.narrow(dim=2, start=-2, length=2),
    "diagonal": lambda x: x.diagonal(1, dim1=2, dim2=1),
    "slice": lambda x: x[:, 1:],
    "slice with a step": lambda x: x[..., ::2],
    "slices": lambda x: x[1:, :2, -3:-1],
    "ints and slices": lambda x: x[0, 1:, 2],
    "new dimensions": lambda x: x[None, :, 1, ..., None],
    "all": lambda x: x[:],
    "chunk": lambda x: x.chunk(3, 2)[1],
    "chunk from the end": lambda x: torch.chunk(x, 2, dim=-1)[-1],
    "split": lambda x: torch.split(x, 2, dim=1)[1],
    "split by sizes": lambda x: x.split([1, 3], -1)[1],
    "tensor_split": lambda x: x.tensor_split((1,), dim=2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "a copy": lambda x: x.transpose(0, 1).reshape(-1),
    "advanced index": lambda x: x[torch.tensor([1, 0])],
}


@pytest.mark.parametrize("name", VIEWS)
def test_writes_through(name: str) -> None:
    functional(Program(write_through(VIEWS[name])), image(*X))


def test_views_by_modules() -> None:
    def program(m: nn.Module, x: Tensor) -> Any:
        y = x * 2
        z = m.part(y)
        z.add_(1)
        return y, z

    for part in (nn.Flatten(), nn.Unflatten(2, (2, 2)), nn.Identity()):
        functional(Program(program, part=part), image(*X))


MASK = torch.arange(24).view(X) % 3 == 0


ASSIGNMENTS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "int": lambda y, v: operator.setitem(y, 0, 1.5),
    "int by a tensor": lambda y, v: operator.setitem(y, -1, v[0]),
    "slice": lambda y, v: operator.setitem(y, slice(1, None), v[:1]),
    "broadcast": lambda y, v: operator.setitem(y, (slice(None), 1), v[0, 0]),
    "a leading 1": lambda y, v: operator.setitem(y, (0, 0), v[:1, :1, 0].expand(1, 1)[..., None].expand(1, 1, 4)),
    "another dtype": lambda y, v: operator.setitem(y, (..., 0), (v * 9).to(torch.int64)[..., 0]),
    "everything": lambda y, v: operator.setitem(y, slice(None), v),
    "everything by a number": lambda y, v: operator.setitem(y, Ellipsis, 2),
    "new dimension": lambda y, v: operator.setitem(y, (None, 1), v[0]),
    "steps": lambda y, v: operator.setitem(y, (Ellipsis, slice(0, 4, 3)), v[..., :2]),
    "a mask and a number": lambda y, v: operator.setitem(y, y > 0, 0.0),
    "a mask and a scalar": lambda y, v: operator.setitem(y, y > 0, v.sum()),
    "a mask of fewer dimensions": lambda y, v: operator.setitem(y, y.sum(2) > 0, -1.0),
    "a mask of the last dimension": lambda y, v: operator.setitem(y, (..., y[0, 0] > 0), -1.0),
    "a mask behind an int": lambda y, v: operator.setitem(y, (1, y[1] > 0), -1.0),
    "a mask and a tensor": lambda y, v: operator.setitem(y, MASK, v.flatten()[:8]),
    "an index": lambda y, v: operator.setitem(y, torch.tensor([1, 0]), v),
    "an index and a number": lambda y, v: operator.setitem(y, torch.tensor([1]), 7),
    "an index of a later dimension": lambda y, v: operator.setitem(y, (slice(None), torch.tensor([2, 0])), v[:, :2]),
    "an int, a slice and an index": lambda y, v: operator.setitem(
        y, (0, slice(None), torch.tensor([2, 0])), v[0, :, :2]
    ),
    "two indices": lambda y, v: operator.setitem(
        y, (slice(None), torch.tensor([2, 0]), torch.tensor([1, 3])), v[..., 0, :2]
    ),
    "add to a slice": lambda y, v: operator.setitem(y, (0, slice(1, 3)), operator.iadd(y[0, 1:3], v[0, 1:3])),
    "add to an index": lambda y, v: operator.setitem(y, torch.tensor([1]), operator.iadd(y[torch.tensor([1])], 3)),
    "its own other half": lambda y, v: operator.setitem(y, (slice(None), slice(0, 1)), y[:, 1:2]),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_assignments(name: str) -> None:
    def program(x: Tensor, v: Tensor) -> Any:
        y = x * 2
        row = y[1]
        ASSIGNMENTS[name](y, v)
        inner = y.transpose(1, 2).transpose(1, 2)
        ASSIGNMENTS[name](inner, v + 1)
        return y, row, inner

    functional(Program2(program), image(*X), image(*X, seed=1))


def test_adding_to_a_slice_writes_once() -> None:
    def program(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1
        return y

    gm = functional(Program(program), image(*X), golden="passes/functionalize_add_to_slice")
    assert sum(n.target is torch.select_scatter for n in gm.graph.nodes) == 1


def test_residual_networks() -> None:
    functional(preactivation_net(), image(2, 3, 8, 8), golden="passes/functionalize_preactivation")
    functional(preactivation_net(norm=True), image(2, 3, 8, 8))
    functional(basic_net(), image(2, 3, 8, 8))


def test_nodes_keep_their_names() -> None:
    names = [n.name for n in traced(preactivation_net(), image(1, 3, 8, 8)).graph.nodes]
    gm = after((Functionalize(),), preactivation_net(), image(1, 3, 8, 8))
    assert [n.name for n in gm.graph.nodes] == names


def computed_positions(x: Tensor) -> Any:
    rows, columns = x.size(0), x.size(1)
    y, z = x * 2, x + 1
    y[: rows - 1] = 0
    y[-(rows // 2) :, 1 : columns - 1] += x[-(rows // 2) :, 1 : columns - 1]
    z[rows // 2 :, None, columns - 2] = 7
    return y, z


def test_items_at_computed_positions_follow_the_inputs_sizes() -> None:
    model = Program(computed_positions)
    gm = functional(model, image(4, 3, 5))
    for shape in ((2, 3, 5), (7, 6, 2)):
        with torch.no_grad():
            for found, expected in zip(gm(image(*shape)), model(image(*shape)), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_graph_without_writes_is_not_modified() -> None:
    gm = traced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), image(1, 3, 8, 8))
    assert not check_pass(Functionalize(), gm).modified
