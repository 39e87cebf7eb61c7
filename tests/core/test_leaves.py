"""Functions marked with torch.fx.wrap: traced through where their decisions depend on shapes, whole where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from toys import image, traced

import fxq
from fxq.backends.onnxrt import Session
from fxq.errors import GuardError, TraceError
from fxq.graph import State, origin, state
from fxq.guards import Guard, GuardCheck


@fx.wrap
def window(x: Tensor, size: int) -> Tensor:
    n = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, (size - n % size) % size))
    if x.shape[-1] > size:  # a decision on a shape
        x = x.roll(size // 2, -1)
    return halves(x)[..., :n]


@fx.wrap
def halves(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., : x.shape[-1] // 2] *= 0.5
    return x


@fx.wrap
def rescaled(x: Tensor) -> Tensor:
    if float(x.abs().max()) > 1:  # a decision on values
        x = x / x.abs().max()
    return x


@fx.wrap
def fitted(sizes: list[int], limit: list[int]) -> list[int]:
    for i, size in enumerate(sizes):
        limit[i] = min(limit[i], size)
    return limit


class Windows(nn.Module):
    """A convolution between two calls of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.function, self.args = function, args

    def forward(self, x: Tensor) -> Tensor:
        return globals()[self.function](self.conv(x), *self.args)


class Fitted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        limit = [8, 8]
        rows, columns = fitted([x.shape[0], x.shape[2]], limit)
        return self.conv(x)[:rows, :, :columns] + limit[1]


def functions(gm: fx.GraphModule) -> list[str]:
    return [
        n.target.__name__ for n in gm.graph.nodes if n.op == "call_function" and n.target in (window, halves, rescaled)
    ]


def same(gm: fx.GraphModule, model: nn.Module, *shape: int) -> None:
    x = image(*shape)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)


def texts(gm: fx.GraphModule) -> list[str]:
    held: State = state(gm)
    return [note.text for note in held.notes]


def test_what_decides_by_shapes_is_traced_through_with_a_guard() -> None:
    model = Windows("window", 4).eval()
    gm = traced(model, image(2, 3, 10))
    assert functions(gm) == []
    assert [guard.text for guard in state(gm).guards] == ["x.shape[2] + ((4 + (-1)*(x.shape[2] % 4)) % 4) > 4"]
    for length in (5, 10, 16, 21):
        same(gm, model, 3, 3, length)
    with pytest.raises(GuardError, match=r"test_leaves\.py"):
        gm(image(2, 3, 3))
    (roll,) = [n for n in gm.graph.nodes if n.target == "roll"]
    assert "x.roll(size // 2, -1)" in origin(roll).code


def test_what_decides_by_values_stays_whole_with_the_reason() -> None:
    model = Windows("rescaled").eval()
    gm = traced(model, image(2, 3, 10))
    assert functions(gm) == ["rescaled"]
    assert texts(gm) == ["rescaled is kept whole and float: a tensor's value is used as a Python number"]
    assert "test_leaves.py" in str(state(gm).notes[0].source)
    same(gm, model, 2, 3, 10)
    quantized = fxq.quantize(model, [image(2, 3, 10)], progress=False)
    assert fxq.report(quantized).totals.weighted_quantized == 1
    assert functions(quantized) == ["rescaled"]


@pytest.mark.parametrize("name", [halves, "halves", f"{__name__}.halves"])
def test_a_function_is_a_leaf_by_name(name: Any) -> None:
    model = Windows("window", 4).eval()
    gm = traced(model, image(2, 3, 10), options={"leaf_modules": [name]})
    assert functions(gm) == ["halves"]
    assert texts(gm) == ["halves is kept whole and float: leaf_modules names it"]
    same(gm, model, 3, 3, 17)


def test_lists_that_a_function_changes_are_the_callers() -> None:
    model = Fitted().eval()
    gm = traced(model, image(2, 3, 10))
    assert [guard.text for guard in state(gm).guards] == ["x.shape[0] < 8", "x.shape[2] >= 8"]
    same(gm, model, 4, 3, 9)


def test_a_whole_function_may_change_the_lists_that_it_is_given() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next = nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            limit = fitted([x.shape[0], x.shape[2]], [8, 8])
            return self.next(self.conv(x)[: limit[0], :, : limit[1]])

    model = Sized().eval()
    prepared = fxq.prepare(model, image(2, 3, 10), leaf_modules=[fitted])
    fxq.calibrate(prepared, [image(2, 3, 10)], progress=False)
    same(fxq.trace(model, image(2, 3, 10), leaf_modules=["fitted"]), model, 2, 3, 10)
    assert fxq.convert(prepared)(image(2, 3, 10)).shape == (2, 3, 8)


@fx.wrap
def shortcut(x: Tensor, y: Tensor) -> None:
    x[:, :, 1:] += y[:, :, 1:]


def test_a_whole_function_that_writes_is_exported(tmp_path: Path) -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv1d(3, 3, 3, padding=1), nn.Conv1d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            shortcut(y, x)
            return self.two(y)

    model, x = Shortcut().eval(), image(2, 3, 10)
    quantized = fxq.quantize(model, [x], progress=False, leaf_modules=["shortcut"])
    with torch.inference_mode():
        simulated = quantized(x)
        assert float((simulated - model(x)).abs().max()) < 0.1
    path = fxq.export(quantized, tmp_path / "m.onnx")
    torch.testing.assert_close(Session(path).run(x)[0], simulated, rtol=1e-3, atol=1e-3)


@fx.wrap
def resized(x: Tensor) -> Tensor:
    return resized_zeros(x) + 1


@fx.wrap
def resized_zeros(x: Tensor) -> Tensor:
    return (2 * x).resize_(x.shape[0], 3, 10)


@fx.wrap
def written_out(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.mul(x, 0.5, out=y)
    return y


@pytest.mark.parametrize(("name", "line"), [("resized", "resize_"), ("written_out", "out=y")])
def test_a_write_that_nobody_can_rewrite_names_the_function_to_keep_whole(name: str, line: str) -> None:
    model, x = Windows(name).eval(), image(2, 3, 10)
    with pytest.raises(TraceError) as caught:
        fxq.prepare(model, x)
    assert line in str(caught.value.source)
    assert f"or keep {name} whole with leaf_modules=[{name!r}]" in str(caught.value.hint)
    quantized = fxq.quantize(model, [x], progress=False, leaf_modules=[name])
    assert fxq.report(quantized).totals.weighted_quantized == 1
    with torch.inference_mode():
        torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0.1)


def test_a_long_guard_is_shortened_for_people() -> None:
    guard = Guard("x.shape[0] + " * 40 + "1 > 7", ("x",), "net.py:3", "if n > 7:")
    assert not guard.holds({"x": (0, 0)})
    assert len(guard.shown) < 140
    assert guard.shown.endswith("1 > 7")
    with pytest.raises(GuardError, match=r"traced for x\.shape\[0\] \+ .* … .* > 7, and x is \[0\]"):
        GuardCheck(["x"], [guard])(torch.ones(0))


def test_a_name_that_nothing_has() -> None:
    with pytest.raises(TraceError, match="leaf_modules names 'halve'") as caught:
        traced(Windows("window", 4), image(2, 3, 10), options={"leaf_modules": ["halve"]})
    assert "torch.fx.wrap" in str(caught.value.hint)
    with pytest.raises(TraceError, match="leaf_modules holds"):
        traced(Windows("window", 4), image(2, 3, 10), options={"leaf_modules": [same]})


def test_tracing_leaves_marked_functions_as_they_were() -> None:
    before = globals()["window"]
    traced(Windows("window", 4), image(2, 3, 10))
    with pytest.raises(TraceError):
        traced(Windows("window", "four"), image(2, 3, 10))
    assert globals()["window"] is before
    assert fx.symbolic_trace(Windows("halves")).graph.find_nodes(op="call_function", target=halves)
