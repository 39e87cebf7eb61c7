"""A batch that the model does not take ends in an error that says what was expected, what came, and the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rank_worker import prepared
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fxq
from fxq.batches import each_batch, misfit
from fxq.errors import CalibrationError, RecipeError
from fxq.quantizer import quantizers

IMAGES, LABELS = torch.randn(4, 3, 16, 16), torch.arange(4)
EXPECTED = r"the example was float32 \[2, 3, 16, 16\]"
FREE = r"forward=lambda model, batch: …"


@pytest.mark.parametrize(
    ("batch", "got", "way_out"),
    [
        ((LABELS, IMAGES), r"x is int64 \[4\]", r"batch\[1\] looks like it: .*forward=.*model\(batch\[1\]\)"),
        ({"label": LABELS, "image": IMAGES}, "x is a dict with the keys label, image", r"model\(batch\['image'\]\)"),
        (IMAGES[0], r"x is float32 \[3, 16, 16\]", r"single sample.*model\(batch\[None\]\)"),
        (IMAGES[:, :1], r"x is float32 \[4, 1, 16, 16\]", FREE),
        (IMAGES.permute(0, 2, 3, 1), r"x is float32 \[4, 16, 16, 3\]", FREE),
        (IMAGES.double(), r"x is float64 \[4, 3, 16, 16\]", "convert the data to float32"),
        (IMAGES.double().numpy(), r"x is float64 \[4, 3, 16, 16\]", "convert the data to float32"),
        (IMAGES.byte(), r"x is uint8 \[4, 3, 16, 16\]", "convert the data to float32"),
        ("cat.png", "x is a str", FREE),
        (None, "x is missing", FREE),
    ],
)
def test_a_batch_of_another_kind_is_told_from_what_was_expected(batch: Any, got: str, way_out: str) -> None:
    with pytest.raises(CalibrationError, match=rf"does not take this batch: {got}, {EXPECTED}[\s\S]*{way_out}") as told:
        fxq.calibrate(prepared("mse"), [IMAGES, batch])
    assert "while fxq calibrated on batch 1" in told.value.__notes__
    assert told.value.__cause__ is not None


def test_the_way_out_works() -> None:
    gm, other = prepared("mse"), prepared("mse")
    loader = DataLoader(TensorDataset(LABELS, IMAGES), 2)
    fxq.calibrate(gm, loader, forward=lambda model, batch: model(batch[1]))
    fxq.calibrate(other, IMAGES.split(2))
    for name, quantizer in quantizers(gm).items():
        assert torch.equal(quantizer.scale, quantizers(other)[name].scale)


def test_a_batch_like_the_example_keeps_the_models_own_error() -> None:
    gm = prepared("mse")
    assert misfit(gm, IMAGES, RuntimeError("out of memory")) is None
    assert misfit(gm, torch.randn(7, 3, 16, 16), RuntimeError("out of memory")) is None


def test_an_error_of_a_forward_of_ones_own_stays_as_it_is() -> None:
    with pytest.raises(KeyError, match="nope") as told:
        fxq.calibrate(prepared("mse"), [{"image": LABELS}], forward=lambda model, batch: model(batch["nope"]))
    assert "while fxq calibrated on batch 0" in told.value.__notes__


def test_batches_that_reach_nothing_are_told() -> None:
    with pytest.raises(CalibrationError, match=r"none of 2 batches reached a quantizer[\s\S]*call the given model"):
        fxq.calibrate(prepared("mse"), [IMAGES, IMAGES], forward=lambda model, batch: None)  # noqa: ARG005
    with pytest.raises(CalibrationError, match=r"none of 1 batches reached a quantizer[\s\S]*empty"):
        fxq.calibrate(prepared("mse"), [IMAGES[:0]])


def test_one_tensor_array_or_dict_is_one_batch() -> None:
    for alone in (IMAGES, IMAGES.numpy(), {"x": IMAGES}):
        assert fxq.calibrate(prepared("mse"), alone).batches == 1
    gm = prepared("mse")
    fxq.calibrate(gm, IMAGES)
    fxq.solve(gm, "max", batches=IMAGES)
    assert any(True for _ in gm.bias_corrections.buffers())
    with pytest.raises(CalibrationError, match=r"batches is a int[\s\S]*DataLoader"):
        each_batch(5)


@pytest.mark.parametrize("most", [0, -1, 1.5, "2"])
def test_max_batches_is_a_whole_number(most: Any) -> None:
    with pytest.raises(CalibrationError, match=r"max_batches is .*\n.*whole number"):
        fxq.calibrate(prepared("max"), [IMAGES], max_batches=most)
    assert fxq.calibrate(prepared("max"), [IMAGES] * 3, max_batches=np.int64(2)).batches == 2  # type: ignore[arg-type]


def test_a_method_that_statistics_cannot_answer_is_told_once() -> None:
    gm = prepared("mse")
    fxq.calibrate(gm, IMAGES)
    with pytest.raises(CalibrationError) as told:
        fxq.solve(gm, "moving-average")
    assert told.value.message.count("cannot answer") == 1
    observed = [q.tensor for q in quantizers(gm).values() if not q.weight]
    assert f"{len(observed)} quantizers cannot be solved: {', '.join(observed)}: Histogram" in told.value.message
    with pytest.raises(RecipeError, match="method is a int"):
        fxq.solve(gm, 5)  # type: ignore[arg-type]


def test_the_first_of_several_inputs_that_is_unlike_is_named() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(3, 4), torch.nn.Linear(5, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.one(a) + self.two(b)

    gm = fxq.prepare(Two().eval(), (torch.randn(2, 3), torch.randn(2, 5)))
    with pytest.raises(CalibrationError, match=r"b is float32 \[2, 6\], the example was float32 \[2, 5\]") as told:
        fxq.calibrate(gm, [(torch.randn(2, 3), torch.randn(2, 6))])
    assert "a is" not in told.value.message
