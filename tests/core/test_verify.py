"""What is legal at which stage, and how a breach is named."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable

import pytest
import torch
from placing import MAX, before, convert, node, prepared
from torch import fx, nn
from toys import basic_net, image, lenet, plain_state, traced

from fxq.calibration import calibrate
from fxq.editor import Editor
from fxq.errors import PassError, VerifyError
from fxq.graph import Annotation, edge_annotations, state
from fxq.quantizer import Quantizer, quantizers
from fxq.recipe import QSpec
from fxq.verify import PROPERTIES, is_dequantized, is_quantizer, quantizer_of, unknown, verify

X = (2, 3, 16, 16)


def graph() -> fx.GraphModule:
    """A traced graph of a residual network."""
    return traced(basic_net(), image(*X))


def observed() -> fx.GraphModule:
    return prepared(basic_net(), image(*X), recipe=MAX)


def quantized() -> fx.GraphModule:
    gm = observed()
    calibrate(gm, [image(*X)], progress=False)
    return convert(gm)


@pytest.mark.parametrize("build", [graph, observed, quantized])
def test_what_fxq_makes_is_legal(build: Callable[[], fx.GraphModule]) -> None:
    verify(build())


def test_properties() -> None:
    assert list(PROPERTIES) == [
        "traced",
        "functional",
        "canonical",
        "fused",
        "annotated",
        "observed",
        "quantized",
    ]
    assert unknown(("traced", "fussed", "observed")) == ["fussed"]
    assert state(quantized()).properties == set(PROPERTIES)


def breach(gm: fx.GraphModule, *properties: str) -> VerifyError:
    """The error that a graph with these claims raises."""
    with pytest.raises(VerifyError) as caught:
        verify(plain_state(gm, *properties))
    return caught.value


def test_graphs_from_elsewhere() -> None:
    with pytest.raises(PassError, match="does not come from fxq"):
        verify(fx.symbolic_trace(nn.ReLU()))


def test_a_missing_attribute() -> None:
    gm = before("annotate", lenet(), image(1, 1, 28, 28))
    del gm.conv1.weight  # type: ignore[union-attr]
    with pytest.raises(VerifyError, match="the graph is broken"):
        verify(gm)


def test_an_unordered_graph() -> None:
    gm = before("annotate", lenet(), image(1, 1, 28, 28))
    first, second = node(gm, "conv1"), node(gm, "fc3")
    first.args = (second, *first.args[1:])
    with pytest.raises(VerifyError, match="the graph is broken"):
        verify(gm)


def test_functional() -> None:
    for target, kwargs in ((torch.relu_, {}), (torch.nn.functional.relu, {"inplace": True})):
        gm = before("annotate", lenet(), image(1, 1, 28, 28))
        relu = node(gm, "relu")
        relu.target, relu.kwargs = target, kwargs
        error = breach(gm)
        assert error.message == "the graph is not functional: relu changes a tensor in place"
        assert error.node == "relu"
        assert "toys.py:" in str(error.source)


def test_functional_item_assignment_and_out() -> None:
    gm = before("annotate", lenet(), image(1, 1, 28, 28))
    relu = node(gm, "relu")
    relu.target, relu.args = operator.setitem, (relu.args[0], 0, 1.0)
    assert "changes a tensor in place" in breach(gm).message
    gm = before("annotate", lenet(), image(1, 1, 28, 28))
    node(gm, "relu").kwargs = {"out": node(gm, "conv1")}
    assert "out=" in breach(gm).message


def test_canonical() -> None:
    gm = before("annotate", lenet(), image(1, 1, 28, 28))
    node(gm, "relu").target = torch.nn.functional.relu
    error = breach(gm)
    assert error.message == "the graph is not canonical: relu is not written as relu's canonical call"
    identity = traced(nn.Sequential(nn.Identity(), nn.ReLU()), image(2))
    assert "is an identity" in breach(identity, "canonical").message


def change(gm: fx.GraphModule, name: str, edge: int | str, annotation: Annotation) -> fx.GraphModule:
    Editor(gm).annotate(node(gm, name), edge, annotation)
    return gm


def test_annotated() -> None:
    full = QSpec("int8", symmetric=True, granularity="per-tensor", method="max")
    cases = {
        "annotates edge 7, which it does not have": (7, Annotation(None, "R1", "why")),
        "annotates edge -1, which it does not have": (-1, Annotation(None, "R1", "why")),
        "annotates edge input, which it does not have": ("input", Annotation(full, "R1", "why")),
        "annotates edge 0 without a rule": (0, Annotation(full, "", "why")),
        "annotates edge 0 with a spec that leaves something open": (
            0,
            Annotation(QSpec("int8"), "R1", "why"),
        ),
    }
    for message, (edge, annotation) in cases.items():
        gm = before("insert-quantizers", lenet(), image(1, 1, 28, 28))
        assert breach(change(gm, "relu", edge, annotation)).message == f"the graph is not annotated: relu {message}"


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("stem_2", "is a second quantizer on one tensor (R29)"),
        ("stem_2_quantizer", "quantizes what is quantized already"),
    ],
)
def test_observed_quantizers_beyond_the_first(tensor: str, said: str) -> None:
    gm = observed()
    editor, read = Editor(gm), node(gm, tensor)
    editor.set_module("quantizers.again", Quantizer(quantizers(gm)["stem_2"].spec, tensor="stem_2", axis=None))
    with editor.after(read):
        editor.call_module("quantizers.again", (read,), like=read)
    assert said in breach(gm).message


def test_observed_edges_read_their_quantizer() -> None:
    gm = observed()
    Editor(gm).set_arg(node(gm, "blocks_0_bn1"), 0, node(gm, "stem_2"))
    error = breach(gm)
    assert error.message.endswith("blocks_0_bn1 reads stem_2 in float, which its annotation quantizes")
    assert error.module_path == "blocks.0.conv1"


def test_quantized_leftovers() -> None:
    gm = observed()
    assert "is an observer left over" in _first_of(plain_state(gm, "quantized"), gm)


def _first_of(claimed: fx.GraphModule, gm: fx.GraphModule) -> str:
    for n in claimed.graph.nodes:  # otherwise the annotated edges are the first breach
        n.meta.pop("edges", None)
    assert edge_annotations(next(iter(gm.graph.nodes))) == {}
    return breach(claimed).message


def test_quantized_integers_go_nowhere_else() -> None:
    gm = quantized()
    integers = node(gm, "stem_2_quantize")
    Editor(gm).set_arg(node(gm, "pool"), 0, integers)
    assert "stem_2_quantize feeds something that takes no integers" in breach(gm).message


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_quantized_scales_are_positive(bad: float) -> None:
    gm = quantized()
    gm.get_buffer("quantizers.fc_weight.scale")[3] = bad
    error = breach(gm)
    assert "has a scale that is not positive (R9)" in error.message
    assert error.node == "fc_weight_dequantize"


def test_quantized_edges_read_real_values() -> None:
    gm = quantized()
    Editor(gm).set_arg(node(gm, "blocks_0_bn1"), 0, node(gm, "stem_2"))
    assert "reads stem_2 in float, which its annotation quantizes" in breach(gm).message


def test_only_what_is_claimed_is_checked() -> None:
    gm = observed()
    Editor(gm).set_arg(node(gm, "blocks_0_bn1"), 0, node(gm, "stem_2"))
    gm.meta["fxq"] = dataclasses.replace(state(gm), properties=frozenset({"traced", "functional"}))
    verify(gm)


def test_looking_at_nodes() -> None:
    gm, converted = observed(), quantized()
    call = node(gm, "stem_2_quantizer")
    assert is_quantizer(call)
    assert quantizer_of(call) is quantizers(gm)["stem_2"]
    assert quantizer_of(node(gm, "stem_2")) is None
    assert not is_quantizer(node(graph(), "stem_0"))
    assert is_dequantized(node(converted, "stem_2_dequantize"))
    assert not is_dequantized(node(converted, "stem_2_quantize"))
    assert not is_dequantized(call)


def test_verifying_changes_nothing() -> None:
    gm = quantized()
    before_ = copy.deepcopy(gm.state_dict())
    verify(gm)
    assert all(torch.equal(value, before_[key]) for key, value in gm.state_dict().items())
