"""What cannot be traced is named with the user's line, and modules that stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import (
    image,
    seeded,
    traced,
)
from tracing import same

from fxq.errors import TraceError
from fxq.graph import state


def line_of(text: str) -> str:
    """``file:line`` of the only line of this file that ends in the marker `text`."""
    (number,) = [i for i, row in enumerate(Path(__file__).read_text().splitlines(), 1) if row.endswith(f"# {text}")]
    return f"{__file__}:{number}"


class Stop(nn.Module):
    """One line each that a graph cannot hold."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.inner = nn.Sequential(nn.Linear(3, 3), StopInside()) if what == "inside" else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        if self.what == "bool":
            return x if x.sum() > 0 else -x  # bool
        if self.what == "loop":
            return sum(row for row in x[x > 0])  # loop
        if self.what == "len":
            return x * len(x.nonzero())  # len
        if self.what == "item":
            return x[: x.argmax().item()] if x.max().item() > 0 else x  # item
        return self._numbers(x)

    def _numbers(self, x: Tensor) -> Any:
        if self.what == "int":
            return x * int(x.sum())  # int
        if self.what == "float":
            return x * float(x.sum())  # float
        if self.what == "range":
            return [x * i for i in range(x.argmax())]  # range
        if self.what == "complex":
            return x * complex(x.sum())  # complex
        if self.what == "number":
            return torch.cat([*x.sum()])  # number
        if self.what == "keys":
            return torch.relu(**x)  # keys
        if self.what == "data":
            x.data = x * 2  # data
            return x
        if self.what == "wrong":
            return torch.relu(x, 1, 2)  # wrong
        return self.inner(x)


class StopInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.max() > 0:  # inside
            x = x - 1
        return x


STOPS = {
    "bool": "control flow depends on a tensor's value",
    "loop": "a loop runs over a tensor whose length depends on values",
    "len": "the length of a tensor depends on its values",
    "item": "control flow depends on a tensor's value",
    "int": "a tensor's value is used as a Python number",
    "float": "a tensor's value is used as a Python number",
    "range": "a tensor's value is used as a Python number",
    "complex": "a tensor's value is used as a complex number",
    "number": "a loop runs over Tensor, which has no items",
    "keys": "an input is unpacked with ** or .keys()",
    "data": "the attribute data of a tensor is assigned",
    "wrong": "tracing stopped with TypeError: relu() takes",
    "inside": "control flow depends on a tensor's value",
}


@pytest.mark.parametrize("what", STOPS)
def test_what_cannot_be_traced_names_the_users_line(what: str) -> None:
    with pytest.raises(TraceError) as caught:
        traced(Stop(what), image(2, 3))
    error = caught.value
    assert error.message.startswith(STOPS[what])
    assert error.source is not None
    assert error.source.startswith(f"{line_of(what)}: ")
    assert error.module_path == ("inner.1" if what == "inside" else None)
    for way in ("torch.where", "concrete_args", "leaf_modules"):
        assert way in (error.hint or "")
    assert error.source in str(error)


class TestLeaves:
    """Modules that stay whole."""

    def test_by_type_and_by_path(self) -> None:
        x = image(2, 3)
        for leaf in (StopInside, "inner.1", nn.Sequential, "inner"):
            model = Stop("inside")
            gm = traced(model, x, options={"leaf_modules": [leaf]})
            same(gm, model, x)
            assert any(n.op == "call_module" and n.target in ("inner.1", "inner") for n in gm.graph.nodes)

    def test_a_path_that_is_none(self) -> None:
        with pytest.raises(
            TraceError, match=r"leaf_modules names 'iner\.1', and the model has no such module"
        ) as error:
            traced(Stop("inside"), image(2, 3), options={"leaf_modules": ["iner.1"]})
        assert "inner.1" in (error.value.hint or "")

    def test_weighted_operations_inside_are_noted(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0)
        model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2), nn.LSTM(8, 4)))
        notes = state(traced(model, image(2, 3, 8))).notes
        assert [(n.node, n.module_path, n.kind) for n in notes] == [
            ("_1", "1", "opaque"),
            ("_2", "2", "opaque"),
        ]
        assert "8 weighted operations inside are not quantized" in notes[0].text
        assert "its weighted operations are not quantized" in notes[1].text
        assert "trace into a subclass of your own" in notes[0].text
