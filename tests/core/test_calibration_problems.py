"""What goes wrong in calibration: no data, NaN, Ctrl-C, a model's own error; each names its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calibrating import Net, batch, equal, prepared, scales
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

from fxq import calibration
from fxq.calibration import calibrate, solve
from fxq.errors import CalibrationError
from fxq.quantizer import Quantizer, quantizers
from fxq.recipe import QSpec


def test_no_batch_is_an_error() -> None:
    spent = iter([])
    for nothing in ([], spent, DataLoader([])):  # type: ignore[arg-type]
        with pytest.raises(CalibrationError, match=r"no batch[\s\S]*only once"):
            calibrate(prepared(), nothing)


def test_a_graph_without_quantizers_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"no quantizers[\s\S]*fxq.prepare"):
        calibrate(fx.symbolic_trace(Net()), [batch()])


def test_quantizers_that_see_nothing_are_all_named() -> None:
    gm = prepared()
    for name in ("relu", "sqrt"):
        gm.quantizers.get_submodule(name).forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"2 quantizers saw no data: relu \(net.relu\), sqrt \(net.sqrt\)"):
        calibrate(gm, [batch()])
    assert not quantizers(gm)["x"].solved


@pytest.mark.parametrize("index", [0, 6, 7, 8, 19])
def test_nan_names_the_node_that_made_it_and_the_batch(index: int) -> None:
    data = [batch() for _ in range(20)]
    data[index][1][0, 0] = -1.0  # the root of a negative number; relu gave a positive numerator
    data[index][0][0] = prepared().weight[0] * 5
    with pytest.raises(CalibrationError) as caught:
        calibrate(prepared(), iter(data))
    error = caught.value
    assert error.message == f"batch {index}: NaN first comes up in sqrt"
    assert (error.node, error.module_path) == ("sqrt", "net.sqrt")
    assert error.source is not None
    assert "net.py:7" in error.source


def test_inf_before_nan_is_told() -> None:
    data = [batch() for _ in range(3)]
    x, y = data[1]
    x[:2] = prepared().weight[0] * 5
    y[:2, 0] = torch.tensor([0.0, -1.0])
    with pytest.raises(CalibrationError, match=r"batch 1: NaN first comes up in sqrt, and Inf before it in truediv"):
        calibrate(prepared(), data)


def test_bad_input_is_told_apart() -> None:
    data = [batch() for _ in range(3)]
    data[2][0][1, 1] = torch.inf
    with pytest.raises(CalibrationError, match="batch 2: the input x holds Inf itself"):
        calibrate(prepared(), data)


def test_nan_in_a_loop_of_ones_own_is_found_too() -> None:
    data = [batch() for _ in range(3)]
    data[1][0][0, 0] = torch.nan

    def forward(model: Any, pair: Any) -> None:
        assert model.training is False  # attributes are there in the second run as well
        model(y=pair[1], x=pair[0])

    with pytest.raises(CalibrationError, match="batch 1: the input x holds NaN itself"):
        calibrate(prepared(), data, forward=forward)


def test_nan_that_does_not_come_again_is_admitted() -> None:
    calls = itertools.count()

    def forward(model: Any, pair: Any) -> None:
        x, y = pair
        model(x * torch.nan if next(calls) == 0 else x, y)

    with pytest.raises(CalibrationError, match=r"quantizers of x, relu, sqrt[\s\S]*random"):
        calibrate(prepared(), [batch()], forward=forward)


def test_infinite_masks_off_the_quantized_paths_are_fine() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, -torch.inf).softmax(-1)

    gm = fx.symbolic_trace(Masked())
    gm.add_submodule("quantizers", nn.Module())
    softmax = next(n for n in gm.graph.nodes if n.name == "softmax")
    gm.add_submodule(
        "quantizers.softmax",
        Quantizer(QSpec("int8", symmetric=True, granularity="per-tensor", method="max"), tensor="softmax", axis=None),
    )
    with gm.graph.inserting_after(softmax):
        call = gm.graph.call_module("quantizers.softmax", (softmax,))
    softmax.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    gm.recompile()
    calibrate(gm, [torch.tensor([[1.0, -2.0, 3.0]])])
    with pytest.raises(
        CalibrationError, match="batch 0: NaN first comes up in softmax, and Inf before it in masked_fill"
    ):
        calibrate(gm, [torch.tensor([[-1.0, -2.0, -3.0]])])


def test_ctrl_c_keeps_what_was_collected() -> None:
    data = [batch() for _ in range(9)]

    def stopping() -> Iterator[Any]:
        yield from data[:6]
        raise KeyboardInterrupt

    gm, other = prepared("mse"), prepared("mse")
    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(gm, stopping())
    assert any("6 batches" in note for note in caught.value.__notes__)
    assert not quantizers(gm)["x"].solved
    assert solve(gm).batches == 6
    calibrate(other, data[:6])
    assert equal(scales(gm), scales(other))
    calibrate(gm, data[6:], reset=False)
    calibrate(other, data)
    assert equal(scales(gm), scales(other))


def test_ctrl_c_inside_a_batch_says_so() -> None:
    calls = itertools.count()

    def forward(model: Any, given: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        model(*given)

    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(prepared("mse"), [batch() for _ in range(9)], forward=forward)
    assert any("3 batches and a part of the next one" in note for note in caught.value.__notes__)


def test_an_error_of_the_model_says_which_batch() -> None:
    with pytest.raises(RuntimeError) as caught:
        calibrate(prepared(), [batch(), (torch.randn(4, 99), torch.randn(4, 4))])
    assert "while fxq calibrated on batch 1" in caught.value.__notes__


def test_the_place_of_nan_is_sought_only_when_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NonfiniteProbe", None)
    calibrate(prepared(), [batch() for _ in range(20)])
