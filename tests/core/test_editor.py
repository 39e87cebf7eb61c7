"""The Editor: each change is made, counted, and none that changes nothing is counted."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from toys import basic_net, image, seeded, traced

from fxq.editor import Editor
from fxq.graph import Annotation, TensorInfo, attribute, edge_annotations, origin, tensor_info
from fxq.passes import ExpandModules, Functionalize


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.norm(self.conv(x)), self.conv(y)], dim=1)


@pytest.fixture
def editor() -> Editor:
    gm = traced(seeded(Two), image(1, 3, 5, 5), image(1, 3, 5, 5))
    return Editor(ExpandModules()(Functionalize()(gm).graph_module).graph_module)


def named(editor: Editor, name: str) -> fx.Node:
    return next(n for n in editor.graph.nodes if n.name == name)


def names(editor: Editor) -> list[str]:
    return [n.name for n in editor.graph.nodes]


def legal(editor: Editor) -> None:
    editor.graph.lint()
    editor.gm.recompile()


def test_new_nodes_inherit(editor: Editor) -> None:
    conv = named(editor, "conv")
    with editor.after(conv):
        relu = editor.call(torch.relu, (conv,), like=conv, name="conv_relu")
        more = editor.call(operator.mul, (relu, 2), like=conv, info=TensorInfo((1,), torch.float64))
    assert names(editor)[names(editor).index("conv") :][:3] == ["conv", "conv_relu", "mul"]
    assert (origin(relu).source, origin(relu).module_path) == (origin(conv).source, "conv")
    assert (origin(conv).call, origin(relu).call) == (True, False)
    assert tensor_info(relu) == tensor_info(conv)
    assert tensor_info(more) == TensorInfo((1,), torch.float64)
    assert editor.counts == {"created": 2}
    legal(editor)


def test_after_an_input_is_after_all_inputs(editor: Editor) -> None:
    x = named(editor, "x")
    with editor.after(x):
        first = editor.call(torch.relu, (x,), like=x)
        editor.call(torch.relu, (first,), like=x)
    assert names(editor)[:4] == ["x", "y", "relu", "relu_1"]
    with editor.before(x.next.next):
        editor.call(torch.neg, (x,), like=x)
    assert names(editor)[2] == "neg"
    legal(editor)


def test_stored_tensors_and_modules(editor: Editor) -> None:
    conv = named(editor, "conv")
    with editor.before(conv):
        editor.set_tensor("deep.er.scale", torch.ones(4))
        node = editor.get_attr("deep.er.scale", like=conv)
        editor.set_module("deep.act", nn.ReLU())
        called = editor.call_module("deep.act", (node,), like=conv)
    assert node.name == "deep_er_scale"
    assert tensor_info(node) == TensorInfo((4,), torch.float32)
    assert called.op == "call_module"
    assert not any(m.training for m in editor.gm.modules())
    assert [n.name for n in editor.stored("deep.er.scale")] == ["deep_er_scale"]
    assert [n.name for n in editor.stored("conv.weight")] == ["conv_weight"]
    assert editor.stored("nothing") == ()
    assert isinstance(attribute(editor.gm, "deep.er")._buffers["scale"], Tensor)
    editor.set_tensor("deep.er.scale", nn.Parameter(torch.zeros(2)))
    assert attribute(editor.gm, "deep.er")._buffers == {}
    assert isinstance(attribute(editor.gm, "deep.er.scale"), nn.Parameter)
    assert editor.counts == {"stored": 3, "created": 2}
    editor.erase(called)
    editor.erase(node)
    assert list(editor.stored("deep.er.scale")) == []
    legal(editor)


def test_free_paths(editor: Editor) -> None:
    assert editor.free_path("conv.bias") == "conv.bias", "a bias registered as None is nothing"
    assert editor.free_path("conv.weight") == "conv.weight_1"
    editor.set_tensor("conv.weight_1", torch.ones(1))
    assert editor.free_path("conv.weight") == "conv.weight_2"
    assert editor.free_path("not.there") == "not.there"


def test_retarget_counts_only_what_changes(editor: Editor) -> None:
    conv = named(editor, "conv")
    assert not editor.retarget(conv, conv.target, conv.args, conv.kwargs)  # type: ignore[arg-type]
    assert not editor.modified
    assert editor.retarget(conv, conv.target, conv.args, {**conv.kwargs, "groups": 1.0})  # type: ignore[arg-type]
    assert editor.retarget(conv, torch.relu, conv.args[:1])
    assert (conv.name, conv.target, editor.counts) == ("conv", torch.relu, {"retargeted": 2})
    legal(editor)


def test_methods_and_keywords(editor: Editor) -> None:
    conv = named(editor, "conv")
    with editor.after(conv):
        node = editor.graph.call_method("relu_", (conv,))
    editor.retarget_method(node, "relu_")
    editor.set_kwarg(conv, "groups", 1)
    editor.set_arg(conv, 0, conv.args[0])
    editor.map_args(conv, lambda n: n)
    assert not editor.modified
    editor.retarget_method(node, "relu")
    editor.set_kwarg(conv, "groups", value=3)
    editor.set_arg(conv, 0, named(editor, "y"))
    assert (node.target, conv.kwargs["groups"], conv.args[0]) == ("relu", 3, named(editor, "y"))
    assert editor.counts == {"retargeted": 1, "rewired": 2}
    editor.map_args(named(editor, "cat"), {named(editor, "norm"): node, named(editor, "conv_1"): conv}.__getitem__)
    assert named(editor, "cat").args[0] == [node, conv]
    assert editor.counts["rewired"] == 3


def test_replace_and_erase(editor: Editor) -> None:
    conv, norm = named(editor, "conv"), named(editor, "norm")
    with editor.after(conv):
        relu = editor.call(torch.relu, (conv,), like=conv)
    assert editor.replace(conv, relu) == 1
    assert relu.args == (conv,)
    assert editor.replace(norm, relu, only=lambda user: user.name == "nobody") == 0
    assert editor.replace(norm, relu) == 1
    before = editor.counts["erased"]
    editor.erase_dead([norm])
    assert editor.counts["erased"] - before == 5, "the norm and its four tensors"
    assert "norm_weight" not in names(editor)
    with pytest.raises(RuntimeError, match="still had 1 users"):
        editor.erase(relu)
    x = named(editor, "x")
    editor.erase_dead([x, named(editor, "output"), relu])
    assert "x" in names(editor)
    legal(editor)


def test_what_was_made_of_a_node_takes_its_place(editor: Editor) -> None:
    """A chain of new nodes reads the old one; everybody else reads the chain's end."""
    conv = named(editor, "conv")
    readers = [n.name for n in conv.users]
    with editor.after(conv):
        half = editor.call(operator.mul, (conv, 0.5), like=conv, name="half")
        gate = editor.call(torch.sigmoid, (conv,), like=conv, name="gate")
        both = editor.call(operator.mul, (half, gate), like=conv, name="both")
    assert editor.replace(conv, both) == len(readers)
    assert [n.name for n in conv.users] == ["half", "gate"]
    assert [n.name for n in both.users] == readers
    legal(editor)


def test_copies_of_a_call(editor: Editor) -> None:
    conv = named(editor, "conv")
    with editor.before(named(editor, "cat")):
        twin = editor.copy(conv, conv.args, conv.kwargs)
    assert (twin.name, twin.target, twin.meta["tensor"]) == ("conv_2", conv.target, conv.meta["tensor"])
    assert origin(twin) == origin(conv)
    assert editor.counts == {"created": 1}


def test_annotations(editor: Editor) -> None:
    conv = named(editor, "conv")
    note = Annotation(None, "R20", "why")
    editor.annotate(conv, 0, note)
    held: Any = edge_annotations(conv)
    editor.annotate(conv, 0, Annotation(None, "R20", "why"))
    editor.annotate(conv, "output", note)
    assert editor.counts == {"annotated": 2}
    assert dict(held) == {0: note}, "what a copy of the graph may share is not changed"


def test_notes_are_no_change(editor: Editor) -> None:
    editor.note(named(editor, "conv"), "R22", "text", "advice")
    assert not editor.modified
    (note,) = editor.notes
    assert (note.node, note.rule, note.text, note.module_path, note.kind) == (
        "conv",
        "R22",
        "text",
        "conv",
        "advice",
    )
    assert note.source == origin(named(editor, "conv")).source


def test_drop_unused() -> None:
    gm = traced(basic_net(), image(1, 3, 16, 16))
    gm = ExpandModules()(Functionalize()(gm).graph_module).graph_module
    editor = Editor(gm)
    editor.drop_unused()
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    assert set(gm.state_dict()) == used
    assert editor.counts["dropped"] > 0
    legal(editor)
    again = Editor(gm)
    again.drop_unused()
    assert not again.modified


def test_drop_unused_keeps_what_a_kept_module_holds() -> None:
    gm = traced(nn.Sequential(nn.LSTM(3, 4), nn.ReLU()).eval()[:1], image(2, 3))
    editor = Editor(gm)
    keys = set(gm.state_dict())
    editor.drop_unused()
    assert set(gm.state_dict()) == keys
    assert len(keys) == 4
