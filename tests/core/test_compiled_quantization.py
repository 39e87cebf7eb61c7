"""What the compiler is given: one mask that it keeps, and nothing that backward computes from changed state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import fxq


def network(momentum: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8, momentum=momentum),
    )


def compiled(gm: nn.Module, graphs: list[fx.GraphModule]) -> Any:
    """The graph under the compiler's own partition into forward and backward."""

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return nop(graph, inputs)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(gm, fullgraph=True, backend=backend)


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scales", ["fixed", "moving-average"])
def test_forward_keeps_one_comparison_for_each_quantizer(scales: str, batch: Tensor) -> None:
    torch.compiler.reset()
    gm = fxq.prepare_qat(network(), batch, scales=scales)
    fxq.calibrate(gm, [batch], progress=False)
    graphs: list[fx.GraphModule] = []
    compiled(gm, graphs)(batch).sum().backward()
    forward, backward = graphs
    kept = [a for a in forward.graph.output_node().args[0] if isinstance(a, fx.Node)]  # type: ignore[union-attr]
    masks = [a for a in kept if a.meta["val"].dtype is torch.bool]
    assert {str(a.target) for a in masks} == {"aten.eq.Tensor"}
    assert len(masks) == 3  # the input of the graph needs no gradient
    assert not [n for n in backward.graph.nodes if "round" in str(n.target)]
    torch.compiler.reset()


@pytest.mark.parametrize("scales", ["fixed", "moving-average", "learned"])
def test_backward_sees_the_statistics_of_the_forward_pass(scales: str, batch: Tensor) -> None:
    """With momentum 1 the running statistics, and with them what is clipped, are others after the forward pass."""
    torch.compiler.reset()
    model = network(momentum=1.0)
    gm = fxq.prepare_qat(model, batch, scales=scales)
    fxq.calibrate(gm, [batch], progress=False)
    for norm in fxq.batch_norm.batch_norms(gm).values():
        norm.running_var.fill_(0.01)  # folded weights are ten times as large as calibrated: clipped
    eager = copy.deepcopy(gm)
    for forward, parameters in ((compiled(gm, []), gm), (eager, eager)):
        forward(batch).square().mean().backward()
        assert any(p.grad is not None for p in parameters.parameters())
    clipped = eager.get_parameter("0.weight").grad
    assert clipped is not None
    if scales == "fixed":
        assert (clipped == 0).any()
    for (name, mine), theirs in zip(gm.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    torch.compiler.reset()
