"""Op kinds: the table is sound, arguments are sorted right, and what is no kind is not taken for one."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from toys import image, traced

from fxq.ops import (
    IDENTITY_MODULES,
    KINDS,
    MODULES,
    REQUIRED,
    Spelling,
    bind,
    inplace_target,
    kind,
    kind_name,
    spelling,
    split_args,
)


def node(op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A node that calls `target` with a graph input in place of each ``...``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    swap = lambda a: x if a is ... else a  # noqa: E731
    made = graph.create_node(op, target, tuple(map(swap, args)), {k: swap(v) for k, v in (kwargs or {}).items()})
    graph.output(made)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_the_table_is_sound(name: str) -> None:
    found = KINDS[name]
    assert found.name == name
    assert 0 < found.tensors <= len(found.params)
    assert found.optional <= {p for p, default in found.params.items() if default is None}
    assert found.spatial[0] <= found.params.keys()
    first_optional = [default is REQUIRED for default in found.params.values()]
    assert first_optional == sorted(first_optional, reverse=True), "required parameters come first"


@pytest.mark.parametrize("name", KINDS)
def test_defaults_are_those_of_the_function(name: str) -> None:
    try:
        signature = inspect.signature(KINDS[name].target)
    except (TypeError, ValueError):
        return  # a builtin tells nothing; the numeric tests of canonicalize call each with its defaults
    for param, default in KINDS[name].params.items():
        if param in signature.parameters and default is not REQUIRED:
            assert signature.parameters[param].default == default, param


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_name_what_their_kind_has(module: type[nn.Module]) -> None:
    spelled = MODULES[module]
    params = KINDS[spelled.kind].params
    assert set(spelled.tensors) | set(spelled.attributes or {}) <= params.keys()
    assert module not in IDENTITY_MODULES


class TestBind:
    """One call's arguments by canonical name."""

    def full(self, made: fx.Node) -> dict[str, Any] | None:
        spelled = spelling(made)
        assert spelled is not None
        return bind(spelled, made.args, made.kwargs)

    def test_defaults_and_spatial_numbers(self) -> None:
        found = self.full(node("call_function", F.conv2d, (..., ..., None, 2), {"padding": [1]}))
        assert found is not None
        assert list(found) == list(KINDS["conv2d"].params)
        assert (found["stride"], found["padding"], found["dilation"], found["groups"]) == (
            (2, 2),
            (1, 1),
            (1, 1),
            1,
        )
        found = self.full(node("call_function", F.conv2d, (..., ...), {"padding": "same"}))
        assert found is not None
        assert found["padding"] == "same"

    def test_a_pool_moves_by_its_kernel(self) -> None:
        for stride in (None, []):
            found = self.full(node("call_function", torch.max_pool2d, (..., (3, 2), stride)))
            assert found is not None
            assert found["stride"] == (3, 2)

    @pytest.mark.parametrize(
        ("args", "expected"),
        [((..., 2, -1), (2, -1)), ((..., (2, -1)), (2, -1)), ((..., [6]), [6]), ((..., -1), (-1,))],
    )
    def test_variadic(self, args: tuple[Any, ...], expected: Any) -> None:
        for method in ("view", "reshape"):
            found = self.full(node("call_method", method, args))
            assert found is not None
            assert found["shape"] == expected

    def test_a_shape_from_another_tensor_is_whole(self) -> None:
        class Like(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.view(x.shape).view(x.size(0), -1).expand(x.size()[:1] + (3,))  # noqa: RUF005 (as users write it)

        gm = traced(Like(), image(2, 3))
        shapes = [self.full(n) for n in gm.graph.nodes if n.target in ("view", "expand")]
        assert [
            [getattr(a, "name", a) for a in (s["shape"] if isinstance(s["shape"], tuple) else [s["shape"]])]
            for s in shapes[:2]
            if s
        ] == [["getattr_1"], ["size", -1]]
        assert shapes[2] is not None
        assert shapes[2]["size"].name == "add"

    def test_reflected(self) -> None:
        found = self.full(node("call_method", "__rsub__", (..., 1)))
        assert found is not None
        assert (found["input"], found["other"].name) == (1, "x")
        found = self.full(node("call_function", torch.rsub, (..., 1)))
        assert found is not None
        assert found["input"] == 1

    @pytest.mark.parametrize(
        ("made", "why"),
        [
            (node("call_function", torch.add, (..., ...), {"alpha": 2}), "alpha"),
            (node("call_function", torch.add, (..., ...), {"out": ...}), "out"),
            (node("call_function", torch.div, (..., 2), {"rounding_mode": "floor"}), "rounding_mode"),
            (node("call_method", "mean", (...,), {"dtype": torch.float64}), "dtype"),
            (node("call_method", "view", (..., torch.int8)), "a dtype for a shape"),
            (node("call_function", F.softmax, (..., None)), "no dimension"),
            (node("call_function", F.conv2d, (...,)), "no weight"),
            (node("call_function", torch.relu, (..., 1, 2)), "too many"),
            (node("call_function", torch.relu, (...,), {"input": ...}), "twice"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_declined(self, made: fx.Node, why: str) -> None:
        assert self.full(made) is None, why
        assert kind(made) is None
        assert kind_name(made) not in KINDS

    @given(st.sampled_from(sorted(KINDS)), st.data())
    def test_binding_what_was_split_gives_the_same(self, name: str, data: st.DataObject) -> None:
        """Canonical arguments are a fixed point, whatever they are."""
        found = KINDS[name]
        sizes = st.one_of(st.integers(1, 5), st.tuples(*[st.integers(1, 5)] * max(found.spatial[1], 1)))
        full = {p: data.draw(sizes if p in found.spatial[0] else st.integers(1, 9)) for p in found.params}
        once = bind(Spelling(found, tuple(found.params)), tuple(full.values()), {})
        assert once is not None
        args, kwargs = split_args(found, once)
        assert len(args) == found.tensors
        assert bind(Spelling(found, tuple(found.params)), args, kwargs) == once


class TestNames:
    """What recipes and reports call a node."""

    @pytest.mark.parametrize(
        ("made", "name"),
        [
            (node("call_function", operator.add, (..., 1)), "add"),
            (node("call_method", "add", (..., 1)), "add"),
            (node("call_function", torch.add, (..., 1)), "add"),
            (node("call_function", torch.add, (..., 1), {"alpha": 2}), "torch.add"),
            (node("call_method", "add", (..., 1), {"alpha": 2}), "Tensor.add"),
            (node("call_method", "cumsum", (..., 1)), "cumsum"),
            (node("call_function", torch.einsum, ("ij->ji", ...)), "einsum"),
            (node("get_attr", "weight"), "get_attr"),
        ],
    )
    def test_names(self, made: fx.Node, name: str) -> None:
        assert kind_name(made) == name

    def test_modules_are_named_after_their_type(self) -> None:
        gm = traced(nn.Sequential(nn.Tanhshrink()), image(2))
        assert [kind_name(n) for n in gm.graph.nodes] == ["placeholder", "Tanhshrink", "output"]

    def test_a_kind_needs_its_own_argument_list(self) -> None:
        assert kind(node("call_function", torch.flatten, (..., 1))) is None
        assert kind(node("call_function", torch.flatten, (...,), {"start_dim": 1})) is KINDS["flatten"]


class TestInplace:
    """What computes out of place what a call computes in place."""

    @pytest.mark.parametrize(
        ("made", "expected"),
        [
            (node("call_function", operator.iadd, (..., 1)), operator.add),
            (node("call_function", operator.imatmul, (..., ...)), operator.matmul),
            (node("call_function", operator.iand, (..., ...)), operator.and_),
            (node("call_function", torch.relu_, (...,)), torch.relu),
            (node("call_function", F.leaky_relu_, (...,)), F.leaky_relu),
            (node("call_function", torch.clamp_min_, (..., 0)), torch.clamp_min),
            (node("call_method", "masked_fill_", (..., ..., 0)), "masked_fill"),
            (node("call_method", "__iadd__", (..., 1)), "__add__"),
            (node("call_method", "__init__", (...,)), None),
            (node("call_method", "add", (..., 1)), None),
            (node("call_function", torch.relu, (...,)), None),
        ],
    )
    def test_inplace(self, made: fx.Node, expected: Any) -> None:
        assert inplace_target(made) == expected
