"""The passes of quantization-aware training: printed graphs, what they decline, second runs that change nothing."""

from __future__ import annotations

import pytest
import torch
from golden import check_golden
from torch import Tensor, nn
from toys import basic_net, image, seeded

import fxq
from fxq.errors import PassError
from fxq.graph import state
from fxq.passes import FinishTraining, KeepDropout, RestoreTraining, SetAsideTraining
from fxq.printer import format_graph


class Regularized(nn.Module):
    """A layer with BatchNorm, dropout behind it, and a BatchNorm that nothing folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout2d(0.5)
        self.head, self.first = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(self.first(x))))))


def regularized() -> torch.fx.GraphModule:
    return fxq.prepare_qat(seeded(Regularized), image(2, 3, 8, 8))


def test_the_graph_that_trains() -> None:
    check_golden("passes/qat_regularized", format_graph(regularized()))
    check_golden("passes/qat_basic", format_graph(fxq.prepare_qat(basic_net(), image(4, 3, 16, 16))))


def test_the_graph_that_it_becomes() -> None:
    gm = regularized()
    fxq.calibrate(gm, [image(2, 3, 8, 8)], progress=False)
    result = FinishTraining()(gm)
    assert result.modified
    check_golden("passes/qat_finished", format_graph(result.graph_module))
    again = FinishTraining()(result.graph_module)
    assert not again.modified
    assert format_graph(again.graph_module) == format_graph(result.graph_module)


def test_a_second_run_changes_nothing() -> None:
    gm = regularized()
    text = format_graph(gm)
    again = KeepDropout()(gm)
    assert not again.modified
    assert format_graph(again.graph_module) == text


def test_a_graph_for_inference_is_finished_already() -> None:
    prepared = fxq.prepare(basic_net(), image(4, 3, 16, 16))
    assert not FinishTraining()(prepared).modified


def test_the_finished_graph_computes_what_eval_mode_computed() -> None:
    gm = regularized()
    fxq.calibrate(gm, [image(2, 3, 8, 8)], progress=False)
    gm.eval()
    x = image(2, 3, 8, 8, seed=3)
    with torch.no_grad():
        assert torch.equal(gm(x), FinishTraining()(gm).graph_module(x))


def test_statistics_that_are_read_by_two_layers_stay_with_a_note() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    gm = fxq.prepare_qat(seeded(Shared), image(2, 3, 4, 4))
    notes = [note.text for note in state(gm).notes if note.rule == SetAsideTraining.name]
    assert len(notes) == 1
    assert "BatchNorm is not folded into conv" in notes[0]
    fxq.calibrate(gm, [image(2, 3, 4, 4)], progress=False)
    before = gm.get_buffer("norm.running_mean").clone()
    gm(image(2, 3, 4, 4, seed=1))
    assert not torch.equal(gm.get_buffer("norm.running_mean"), before)
    gm.eval()
    with torch.no_grad():
        assert torch.equal(gm(image(2, 3, 4, 4)), fxq.convert(gm)(image(2, 3, 4, 4)))


def test_dropout_between_a_layer_and_its_norm_is_said_to_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.BatchNorm2d(4))
    gm = fxq.prepare_qat(seeded(lambda: model), image(2, 3, 4, 4))
    assert any("is left out" in note.text for note in state(gm).notes)
    assert not [m for m in gm.modules() if isinstance(m, nn.Dropout)]


def test_restoring_needs_placed_quantizers() -> None:
    traced = fxq.trace(basic_net(), image(4, 3, 16, 16))
    with pytest.raises(PassError, match="observed"):
        RestoreTraining()(traced)
