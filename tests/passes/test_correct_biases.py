"""Corrections go into the biases, once, where they belong."""

from __future__ import annotations

import copy

import torch
from golden import check_golden
from torch import Tensor, fx, nn
from toys import basic_net, image, seeded

import fxq
from fxq.bias_correction import CORRECTIONS
from fxq.passes import CorrectBiases


def with_corrections(model: nn.Module, x: Tensor, **corrections: Tensor) -> fx.GraphModule:
    prepared = fxq.prepare(model, x)
    fxq.calibrate(prepared, [x], progress=False, bias_correction=False)
    holder = nn.Module()
    for name, value in corrections.items():
        holder.register_buffer(name, value)
    prepared.add_module(CORRECTIONS, holder)
    return prepared


def test_a_bias_gains_its_correction_and_nothing_else_changes() -> None:
    gain = torch.arange(8, dtype=torch.float32)
    prepared = with_corrections(seeded(basic_net), image(4, 3, 16, 16), blocks_0_bn1=gain)
    before = copy.deepcopy(prepared.state_dict())
    result = CorrectBiases()(prepared)
    assert result.modified
    after = result.graph_module.state_dict()
    changed = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
    assert changed == {"blocks.0.conv1.bias"}
    torch.testing.assert_close(after["blocks.0.conv1.bias"], before["blocks.0.conv1.bias"] + gain)
    assert fxq.format_graph(result.graph_module) == fxq.format_graph(prepared)


def test_an_operation_without_a_bias_gets_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3, bias=False)))
    prepared = with_corrections(model, torch.rand(8, 4), _0=torch.tensor([1.0, 2.0, 3.0]))
    result = CorrectBiases()(prepared)
    check_golden("correct_biases/new_bias", fxq.format_graph(result.graph_module))
    x = torch.rand(2, 4)
    torch.testing.assert_close(result.graph_module(x), prepared(x) + torch.tensor([1.0, 2.0, 3.0]))


def test_nothing_to_correct_is_no_change() -> None:
    x = image(4, 3, 16, 16)
    zeros = with_corrections(seeded(basic_net), x, blocks_0_bn1=torch.zeros(8))
    assert not CorrectBiases()(zeros).modified
    assert not CorrectBiases()(fxq.prepare(seeded(basic_net), x)).modified


def test_two_layers_that_share_a_bias_get_one_each() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    prepared = with_corrections(seeded(Shared), torch.rand(8, 4), layer=torch.ones(4), layer_1=2 * torch.ones(4))
    gm = CorrectBiases()(prepared).graph_module
    nodes = {n.name: n for n in gm.graph.nodes}
    one, two = (nodes[name].args[2] for name in ("layer", "layer_1"))
    assert isinstance(one, fx.Node)
    assert isinstance(two, fx.Node)
    assert one.target != two.target
    difference = gm.get_parameter(str(two.target)) - gm.get_parameter(str(one.target))
    torch.testing.assert_close(difference.detach(), torch.ones(4))
