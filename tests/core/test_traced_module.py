"""A traced graph as a module: names that fx cannot hold, errors that name the place, and what cannot be pickled."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from toys import basic_net, image, seeded, traced

import fxq
from fxq.errors import FxqError
from fxq.graph import origin
from fxq.tracing.traced_module import TracedModule

NAMES = ("graph", "code", "meta", "lambda", "class", "recompile")


class Named(nn.Module):
    """Submodules, a parameter and a buffer with names that a GraphModule has itself, or that Python keeps."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(4, 4))
        self.inner = nn.Sequential()
        for name in ("for", "graph", "for_"):
            self.inner.add_module(name, nn.Linear(4, 4))
        self.register_parameter("print_readable", nn.Parameter(torch.randn(4)))
        self.register_buffer("import", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        for name in NAMES:
            x = getattr(self, name)(x)
        return self.inner(x) * self.print_readable + getattr(self, "import")


def test_names_that_a_graph_module_cannot_hold() -> None:
    model, x = seeded(Named), image(2, 4)
    gm = traced(model, x)
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
    keys = gm.state_dict().keys()
    assert {"graph_.weight", "lambda_.weight", "inner.graph.weight", "inner.for__.weight", "import_"} <= keys
    assert len(keys) == len(model.state_dict())
    paths = [origin(n).module_path for n in gm.graph.nodes if n.op == "call_module"]
    assert paths == [*NAMES, "inner.for", "inner.graph", "inner.for_"]
    quantized = fxq.quantize(model, [x], recipe=fxq.Recipe([fxq.Rule("lambda", None)]), progress=False)
    floats = [row.module_path for row in fxq.report(quantized).weighted if not row.low]
    assert floats == ["lambda"]
    assert list(model._modules) == [*NAMES, "inner"]


def test_other_names_are_kept() -> None:
    model = basic_net()
    assert traced(model, image(1, 3, 16, 16)).state_dict().keys() == model.state_dict().keys()


def test_a_call_that_fails_names_node_module_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    gm = traced(basic_net(), image(2, 3, 16, 16))
    for each in (gm, copy.deepcopy(gm)):
        assert isinstance(each, TracedModule)
        with pytest.raises(RuntimeError, match="expected input") as caught:
            each(image(2, 4, 16, 16))
        (note,) = caught.value.__notes__
        assert note.startswith("in node stem_0, of module stem.0, at ")
        assert "toys.py:" in note
        assert note.endswith("whose inputs had the shapes x [2, 3, 16, 16] when it was traced")
    assert capsys.readouterr() == ("", "")


def test_later_stages_name_it_too() -> None:
    x = image(2, 3, 16, 16)
    quantized = fxq.quantize(basic_net(), [x], progress=False)
    with pytest.raises(RuntimeError) as caught:
        quantized(image(2, 4, 16, 16))
    assert "of module stem.0" in caught.value.__notes__[0]


def test_a_compiled_graph() -> None:
    gm, x = traced(basic_net(), image(2, 3, 16, 16)), image(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(gm, backend="eager", fullgraph=True)(x), gm(x))


def test_pickling_says_what_to_do() -> None:
    gm = traced(basic_net(), image(2, 3, 16, 16))
    with pytest.raises(FxqError, match="cannot be pickled") as caught:
        torch.save(gm, io.BytesIO())
    assert "state_dict" in (caught.value.hint or "")


def test_a_leaf_with_such_a_name_is_noted_under_the_users() -> None:
    class Rescaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.max() if x.max() > 0 else x

    model = nn.Sequential()
    model.add_module("graph", Rescaled())
    gm = traced(model, image(2, 4), options={"on_untraceable": "leaf"})
    (note,) = gm.meta["fxq"].notes
    assert (note.module_path, note.node) == ("graph", "graph")
