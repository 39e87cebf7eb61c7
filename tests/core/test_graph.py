"""Reading a graph: origins, infos, state, stored tensors, errors."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import fx, nn
from toys import basic_net, image, lenet, traced

from fxq.errors import ConvertError, PassError
from fxq.graph import (
    Annotation,
    Origin,
    State,
    TensorInfo,
    attribute,
    chain_users,
    constant,
    edge_annotations,
    error_at,
    has_state,
    origin,
    set_state,
    state,
    tensor_info,
    update_state,
)
from fxq.passes import ExpandModules, Functionalize
from fxq.recipe import Recipe
from fxq.target import Target


@pytest.fixture
def graph() -> fx.GraphModule:
    return traced(basic_net(), image(1, 3, 16, 16))


def named(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def test_what_a_strange_node_has() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    node = next(n for n in gm.graph.nodes if n.op == "call_module")
    assert origin(node) == Origin()
    assert origin(node).module_type is None
    assert tensor_info(node) is None
    assert dict(edge_annotations(node)) == {}
    node.meta.update(origin="x", tensor=(None,))
    assert (origin(node), tensor_info(node)) == (Origin(), None)


def test_state(graph: fx.GraphModule) -> None:
    plain = fx.symbolic_trace(lenet())
    assert (has_state(graph), has_state(plain)) == (True, False)
    with pytest.raises(PassError, match=r"(?s)does not come from fxq.*make it with fxq.trace") as caught:
        state(plain)
    assert caught.value.hint is not None
    held = state(graph)
    twin = copy.deepcopy(graph)
    update_state(graph, properties=held.properties | {"canonical"})
    assert state(graph).properties == {"traced", "canonical"}
    assert state(twin) is held, "a frozen state is shared, not copied, and a change makes a new one"
    set_state(plain, State(Target.load("tensorrt")))
    assert state(plain).recipe == Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        held.notes = ()  # type: ignore[misc]


def test_stored_tensors(graph: fx.GraphModule) -> None:
    gm = ExpandModules()(Functionalize()(graph).graph_module).graph_module
    weight = named(gm, "blocks_0_conv1_weight")
    assert constant(weight) is attribute(gm, "blocks.0.conv1.weight")
    for other in (named(gm, "x"), None, 3.0, named(gm, "blocks_0_conv1")):
        assert constant(other) is None
    with pytest.raises(AttributeError):
        attribute(gm, "blocks.7")


def test_users_behind_a_chain(graph: fx.GraphModule) -> None:
    found = chain_users(named(graph, "blocks_0_conv1"), lambda n: "bn" in n.name or "relu" in n.name)
    assert [n.name for n in found] == ["blocks_0_conv2"]
    assert [n.name for n in chain_users(named(graph, "fc"), lambda _: False)] == ["output"]


def test_errors_name_the_place(graph: fx.GraphModule) -> None:
    node = named(graph, "blocks_1_add")
    error = error_at(ConvertError, "it is so", node, "do this")
    assert isinstance(error, ConvertError)
    assert (error.node, error.module_path, error.hint) == ("blocks_1_add", "blocks.1", "do this")
    assert str(error).splitlines()[0] == "it is so"
    assert error.source is not None
    assert error.source.endswith(": out += identity")
    node.meta.clear()
    bare = error_at(ConvertError, "it is so", node)
    assert (bare.module_path, bare.source) == (None, None)


def test_annotations_are_values() -> None:
    first = Annotation(None, "R20", "because")
    assert first == Annotation(None, "R20", "because")
    assert (first.priority, first.tie) == (-1, None)
    assert TensorInfo((2, 3), torch.float32) == TensorInfo((2, 3), torch.float32)
