"""What the tests of the placing passes share: from a model to a prepared graph, and looks at it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from golden import check_golden
from torch import Tensor, fx, nn
from toys import after

import fxq
from fxq.graph import Note, edge_annotations, state
from fxq.manager import PassManager, Pipeline
from fxq.ops import kind_name
from fxq.passbase import Pass, PassResult
from fxq.passes import PREPARE, Annotate, ConvertQuantizers
from fxq.printer import format_graph
from fxq.quantizer import Mode, Quantizer
from fxq.recipe import QSpec, Recipe, Rule
from fxq.target import Target
from fxq.verify import is_quantizer, verify

MAX: Final = Recipe([Rule("*", QSpec(method="max"))])
"""What is quantized by default is calibrated by its extreme values, which is exact on one batch."""

STUDY: Final = replace(Target.load("tensorrt"), refuses=())
"""TensorRT's placement, with specs in simulation that TensorRT itself refuses."""


class Lambda(nn.Module):
    """A function of a module's own parts as a model: ``Lambda(lambda m, x: m.conv(x) + x, conv=...)``."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Lambda2(Lambda):
    """As :class:`Lambda`, with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def upto(name: str, pipeline: Pipeline = PREPARE) -> tuple[Pass, ...]:
    """The pipeline's passes before the one called `name`."""
    names = [p.name for p in pipeline]
    return pipeline.passes[: names.index(name)]


def before(
    name: str, model: nn.Module, *args: Any, recipe: Recipe | None = None, target: Any = "tensorrt"
) -> fx.GraphModule:
    """The graph that pass `name` of fxq.prepare gets."""
    return after(upto(name), model, *args, recipe=recipe, target=target)


def annotated(model: nn.Module, *args: Any, recipe: Recipe | None = None) -> fx.GraphModule:
    """The graph right behind ``annotate``."""
    return after((*upto("annotate"), Annotate()), model, *args, recipe=recipe)


def prepared(model: nn.Module, *args: Any, recipe: Recipe | None = None, target: Any = "tensorrt") -> fx.GraphModule:
    """What fxq.prepare gives, in eval mode."""
    return fxq.prepare(model.eval(), args, recipe=recipe, target=target)


def check_pass(p: Pass, gm: fx.GraphModule, golden: str | None = None) -> PassResult:
    """Run a pass on a copy: golden text, honest ``modified``, a legal graph, an idle second run."""
    text = format_graph(gm)
    result = p(gm)
    done = format_graph(result.graph_module)
    assert format_graph(gm) == text, "the pass changed the graph that it was to copy"
    assert result.modified == (done != text)
    verify(result.graph_module)
    if golden is not None:
        check_golden(golden, done)
    again = p(result.graph_module)
    assert not again.modified
    assert again.notes == ()
    assert format_graph(again.graph_module) == done
    return result


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node called `name`."""
    (found,) = [n for n in gm.graph.nodes if n.name == name]
    return found


def of_kind(gm: fx.GraphModule, kind: str) -> list[fx.Node]:
    """The nodes of one op kind."""
    return [n for n in gm.graph.nodes if kind_name(n) == kind]


def decided(gm: fx.GraphModule, name: str) -> dict[int | str, str]:
    """Edge to ``spec rule`` for a node's annotations; ``float`` for edges that are decided to stay so."""
    found = edge_annotations(node(gm, name))
    return {edge: f"{a.spec or 'float'} {a.rule}" for edge, a in found.items()}


def reads(gm: fx.GraphModule, name: str) -> list[str]:
    """The names of the nodes that `name` reads: ``x_quantizer`` where the edge is quantized."""
    return [a.name for a in node(gm, name).args if isinstance(a, fx.Node)]


def notes(gm: fx.GraphModule, kind: str | None = None) -> list[Note]:
    """The graph's notes of one kind, advice left out by default."""
    return [n for n in state(gm).notes if (n.kind == kind if kind else n.kind != "advice")]


def activation_quantizers(gm: fx.GraphModule) -> list[str]:
    """The tensors with a quantizer, weights left out, in order; each of them must have one only."""
    tensors = [n.args[0] for n in gm.graph.nodes if is_quantizer(n)]
    assert len(tensors) == len(set(tensors)), "a tensor with two quantizers"
    return [t.name for t in tensors if isinstance(t, fx.Node) and t.op != "get_attr"]


def fake_quantized(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a calibrated graph whose quantizers quantize; unsolved weights are solved."""
    gm = copy.deepcopy(gm)
    for n in gm.graph.nodes:
        if is_quantizer(n):
            quantizer = gm.get_submodule(str(n.target))
            assert isinstance(quantizer, Quantizer)
            quantizer.mode = Mode.QUANTIZE
    return gm


def same_numbers(gm: fx.GraphModule, model: nn.Module, *args: Tensor) -> None:
    """A prepared graph computes what the model does; folding BatchNorm is the only rounding."""
    with torch.no_grad():
        torch.testing.assert_close(gm(*args), model.eval()(*args), rtol=1e-4, atol=1e-5)


def convert(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph behind ``convert-quantizers`` and nothing else; verified."""
    return PassManager().run(Pipeline("convert", (ConvertQuantizers(),)), gm)
