"""The ritual around a pass: requirements, copies, promises, honest results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
import torch
from placing import Lambda
from torch import fx
from toys import image, plain_state, seeded, traced

from fxq.editor import Editor
from fxq.errors import PassError, RecipeError
from fxq.graph import EDGES, Annotation, state
from fxq.passbase import Pass, PassResult, providers
from fxq.passes import PREPARE
from fxq.printer import format_graph


@dataclass(frozen=True)
class Replace(Pass):
    """Every call of one function becomes a call of another."""

    name: ClassVar[str] = "replace"
    requires: ClassVar[tuple[str, ...]] = ("traced",)

    old: Callable[..., object] = torch.tanh
    new: Callable[..., object] = torch.sigmoid

    def call(self, editor: Editor) -> None:
        for node in editor.graph.find_nodes(op="call_function", target=self.old):
            editor.retarget(node, self.new, node.args)
            editor.note(node, self.name, "it was another function", kind="advice")


@dataclass(frozen=True)
class Plain(Pass):
    """What a pass looks like without annotations of its class attributes."""

    name = "plain"
    provides = ("fused",)

    def call(self, editor: Editor) -> None:
        pass


def graph() -> fx.GraphModule:
    return traced(seeded(lambda: Lambda(lambda _, x: torch.tanh(torch.tanh(x)) * 2)), image(2, 3))


def test_a_pass_works_on_a_copy() -> None:
    gm = graph()
    text = format_graph(gm)
    result = Replace()(gm)
    assert isinstance(result, PassResult)
    assert format_graph(gm) == text
    assert result.graph_module is not gm
    assert result.modified
    assert result.counts == {"retargeted": 2}
    x = image(2, 3)
    assert torch.equal(result.graph_module(x), torch.sigmoid(torch.sigmoid(x)) * 2)
    assert torch.equal(gm(x), torch.tanh(torch.tanh(x)) * 2)


def test_a_pass_works_in_place_when_asked() -> None:
    gm = graph()
    result = Replace()(gm, inplace=True)
    assert result.graph_module is gm
    assert "tanh(" not in gm.code  # recompiled


def test_an_unchanged_graph_is_not_modified() -> None:
    gm = Replace()(graph()).graph_module
    again = Replace()(gm)
    assert not again.modified
    assert again.counts == {}
    assert again.notes == ()


def test_notes_are_kept_once() -> None:
    result = Replace()(graph())
    assert [(n.node, n.rule, n.kind) for n in result.notes] == [
        ("tanh", "replace", "advice"),
        ("tanh_1", "replace", "advice"),
    ]
    assert state(result.graph_module).notes == result.notes
    assert "test_passbase.py:" in str(result.notes[0].source)

    class Twice(Plain):
        def call(self, editor: Editor) -> None:
            node = next(iter(editor.graph.nodes))
            for _ in range(3):
                editor.note(node, "R1", "the same")

    once = Twice()(graph())
    assert len(once.notes) == 1
    assert Twice()(once.graph_module).notes == ()


def test_a_pass_provides_properties_whether_it_changed_something_or_not() -> None:
    gm = graph()
    result = Plain()(gm)
    assert not result.modified
    assert state(result.graph_module).properties == {"traced", "fused"}
    assert state(gm).properties == {"traced"}


def test_requirements_are_checked_and_providers_named() -> None:
    @dataclass(frozen=True)
    class Needy(Plain):
        requires = ("functional", "canonical")

    with pytest.raises(PassError) as caught:
        Needy()(graph())
    assert caught.value.message == "pass plain needs a graph that is functional, canonical"
    assert "Functionalize()" in str(caught.value.hint)
    assert "DropIdentities()" in str(caught.value.hint)
    Needy()(plain_state(graph(), "functional", "canonical"))


def test_providers() -> None:
    assert providers("observed") == "InsertQuantizers()"
    assert providers("no-such") == "a pass that provides 'no-such'"


def test_the_promise_is_checked_on_the_result() -> None:
    @dataclass(frozen=True)
    class Promising(Replace):
        def ensures(self, gm: fx.GraphModule) -> None:
            left = [n.name for n in gm.graph.nodes if n.target is torch.tanh]
            if left:
                raise PassError(f"pass {self.name} promised none of {left}")

    assert Promising()(graph()).modified
    with pytest.raises(PassError, match="promised none of"):
        Promising(old=torch.relu)(graph())


def test_a_bug_in_a_pass_is_a_pass_error() -> None:
    class Buggy(Plain):
        def call(self, editor: Editor) -> None:
            raise KeyError("oops")

    with pytest.raises(PassError, match="pass plain failed: KeyError: 'oops'") as caught:
        Buggy()(graph())
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_bug_in_a_promise_is_a_pass_error() -> None:
    class Promising(Plain):
        def ensures(self, gm: fx.GraphModule) -> None:
            raise KeyError("oops")

    with pytest.raises(PassError, match="pass plain failed: KeyError: 'oops'"):
        Promising()(graph())


def past_by_arguments(editor: Editor) -> None:
    first, last = editor.graph.find_nodes(op="call_function", target=torch.tanh)
    last.args = first.args


def past_by_erasing(editor: Editor) -> None:
    _, last = editor.graph.find_nodes(op="call_function", target=torch.tanh)
    last.replace_all_uses_with(last.args[0])
    editor.graph.erase_node(last)


def past_by_annotating(editor: Editor) -> None:
    first, _ = editor.graph.find_nodes(op="call_function", target=torch.tanh)
    first.meta[EDGES] = {0: Annotation(None, "R1", "so")}


@pytest.mark.parametrize("change", [past_by_arguments, past_by_erasing, past_by_annotating])
def test_changes_past_the_editor_are_refused(change: Callable[[Editor], None]) -> None:
    class Past(Plain):
        def call(self, editor: Editor) -> None:
            change(editor)

    with pytest.raises(PassError, match="pass plain changed the graph past the Editor") as caught:
        Past()(graph())
    assert "editor.retarget" in str(caught.value.hint)


def test_errors_for_users_pass_through() -> None:
    class Refusing(Plain):
        def call(self, editor: Editor) -> None:
            raise RecipeError("no")

    with pytest.raises(RecipeError, match="no"):
        Refusing()(graph())


def test_a_broken_graph_is_a_pass_error() -> None:
    class Breaking(Plain):
        def call(self, editor: Editor) -> None:
            tanh, last = editor.graph.find_nodes(op="call_function", target=torch.tanh)
            editor.set_arg(tanh, 0, last)  # reads what comes later

    gm = graph()
    with pytest.raises(PassError, match="pass plain left a broken graph: Argument 'tanh_1'") as caught:
        Breaking()(gm)
    assert "graph()" not in caught.value.message
    assert torch.equal(gm(image(2, 3)), torch.tanh(torch.tanh(image(2, 3))) * 2)


def test_graphs_from_elsewhere_are_refused() -> None:
    with pytest.raises(PassError, match="does not come from fxq"):
        Replace()(fx.symbolic_trace(torch.nn.ReLU()))


def test_options_and_text() -> None:
    assert Replace().options == {}
    assert str(Replace()) == "replace"
    changed = Replace(new=torch.exp)
    assert list(changed.options) == ["new"]
    assert str(changed).startswith("replace{new=")
    assert Replace() == Replace()
    assert Replace() != changed
    with pytest.raises(FrozenInstanceError):
        changed.new = torch.tanh  # type: ignore[misc]


def test_a_pass_must_say_what_it_does() -> None:
    class Idle(Pass):
        name = "idle"

    with pytest.raises(TypeError, match="abstract"):
        Idle()  # type: ignore[abstract]


DECLARED: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": None}, "has no name"),
    "a name that pipelines cannot write": ({"name": "my pass"}, "is called 'my pass'"),
    "a string of requirements": ({"requires": "canonical"}, "requires of pass plain is 'canonical', no tuple"),
    "a string of promises": ({"provides": "fused"}, "provides of pass plain is 'fused', no tuple"),
    "an unknown promise about numbers": ({"numeric": "Exact"}, "numeric of pass plain is 'Exact'"),
    "options without dataclass": ({"__annotations__": {"limit": "int"}, "limit": 3}, "has the options limit and is no"),
}


@pytest.mark.parametrize("case", DECLARED)
def test_a_class_that_declares_something_wrongly(case: str) -> None:
    attributes, message = DECLARED[case]
    kind = type("Wrong", (Plain,), attributes)
    with pytest.raises(PassError, match=message) as caught:
        kind()
    assert caught.value.hint


@pytest.mark.parametrize("p", PREPARE.passes, ids=str)
def test_built_in_passes_are_documented(p: Pass) -> None:
    text = type(p).__doc__ or ""
    assert p.numeric in ("exact", "rounding", "changes-values")
    assert p.name == p.name.lower().replace("_", "-")
    assert len(text.splitlines()) > 3
