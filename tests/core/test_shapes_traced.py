"""Models that ask for their shapes: what stays an expression, what becomes a guard, and what each guard is for."""

from __future__ import annotations

import builtins
import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_nets import NETWORKS, Normalizing, inputs, network
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torchvision_models import torchvision_model
from toys import image, nested_inputs, nested_model, seeded, traced

import fxq
from fxq.errors import ExportError, GuardError, TraceError
from fxq.graph import state
from fxq.guards import Guard


class Asks(nn.Module):
    """A linear layer and one question about the shape behind it, with a parameter and a buffer at hand."""

    def __init__(self, ask: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.ask = nn.Linear(4, 4), ask
        self.table = nn.Parameter(torch.randn(1, 10, 4))
        self.register_buffer("mask", torch.randn(1, 10, 4))

    def forward(self, x: Tensor) -> Any:
        return self.ask(self, self.linear(x))


def guards(gm: fx.GraphModule) -> list[str]:
    return [guard.text for guard in state(gm).guards]


def unpacked(_: Any, x: Tensor) -> Tensor:
    first, *rest = x.shape
    return x.reshape(first, math.prod(rest))


def asserted(_: Any, x: Tensor) -> Tensor:
    assert x.size(1) < 100, f"{x.size(1):d} are too many"
    return x


def folded(_: Any, x: Tensor) -> Tensor:
    for index, part in enumerate(x.split(2, 1)):
        x = x + part.sum() * index
    return x


EXPRESSIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "view": lambda _, x: x.view(x.size(0), -1),
    "a shape passed on": lambda _, x: x.view(*x.shape[:1], -1) + torch.zeros(x.shape[:1] + (1,)),  # noqa: RUF005 - a Size and a tuple
    "a starred rest": unpacked,
    "zeros": lambda _, x: torch.zeros(x.shape[0], 3) + x.sum(),
    "factories": lambda _, x: x.sum() + torch.full((x.size(1), 2), 1.0) + torch.eye(x.size(1), 2),
    "new_zeros": lambda _, x: torch.cat([x, x.new_zeros(x.shape[0], 1, 4)], 1),
    "arange": lambda _, x: x + torch.arange(x.size(1), device=x.device)[None, :, None],
    "a slice of a parameter": lambda m, x: x + m.table[:, : x.shape[1]],
    "a slice of a buffer": lambda m, x: x + m.mask[:, : x.shape[1]],
    "an expanded buffer": lambda m, x: m.mask.expand(x.shape[0], -1, -1) * x.mean(),
    "a repeated buffer": lambda m, x: m.mask.repeat(x.size(0), 1, 1) * x.mean(),
    "pad": lambda _, x: F.pad(x, (0, 0, 0, (8 - x.size(1) % 8) % 8)),
    "ceil": lambda _, x: x.repeat(1, 1, math.ceil(x.size(1) / 2)),
    "round": lambda _, x: x * round(x.size(1) / 2),
    "roll": lambda _, x: torch.roll(x, x.size(1) // 2, 1),
    "resized": lambda _, x: F.interpolate(x[None], size=(x.size(1) * 2, 6)),
    "tensor": lambda _, x: x * torch.tensor([x.size(1), 1, 2, 3]),
    "the least of a type": lambda _, x: x.masked_fill(x > 0, torch.finfo(x.dtype).min),
}
PLAIN: dict[str, Callable[[Any, Tensor], Any]] = {
    "dim": lambda _, x: x * 2 if x.dim() == 3 and x.ndim == 3 and len(x.shape) == 3 else x,
    "dtype": lambda _, x: x * 2 if x.dtype in (torch.float16, torch.float32) else x,
    "is_cuda": lambda _, x: x if x.is_cuda else x * 2,
    "isinstance": lambda _, x: x * 2 if isinstance(x, Tensor) and isinstance(x.size(0), int) else x,
    "a key": lambda _, x: x * {1: 2, 3: 3}[x.dim()] * {torch.float32: 2}[x.dtype],
    "an iterable": lambda _, x: x * 2 if not isinstance(x.size(1), Iterable) and isinstance(x.shape, tuple) else x,
    "is_tensor": lambda _, x: x * 2 if torch.is_tensor(x) else x,
    "a parameter's shape": lambda m, x: x * 2 if m.table.shape[1] == m.table.size(1) == len(m.table[0]) else x,
    "a constant width": lambda _, x: sum(x[..., i] for i in range(x.shape[2])),
    "scripting": lambda m, x: x if torch.jit.is_scripting() or m.training else x * 2,
}
DECISIONS: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "parity": (lambda _, x: x * 2 if x.size(1) % 2 else x, ["(x.shape[1] % 2) != 0"]),
    "the larger": (lambda _, x: x * max(x.size(1), 3), ["x.shape[1] >= 3"]),
    "int": (lambda _, x: x * int(x.size(1)), ["x.shape[1] == 5"]),
    "len": (lambda _, x: x * len(x), ["x.shape[0] == 3"]),
    "range": (lambda _, x: sum(x[:, i] for i in range(x.size(1))), ["x.shape[1] == 5"]),
    "rows": (lambda _, x: torch.stack([row * 2 for row in x]), ["x.shape[0] == 3"]),
    "a list's item": (lambda _, x: x * [1, 2, 3, 4, 5, 6][x.size(1)], ["x.shape[1] == 5"]),
    "a key": (lambda _, x: x * {5: 2, 6: 3}[x.size(1)], ["x.shape[1] == 5"]),
    "assert": (asserted, ["x.shape[1] < 100"]),
    "two shapes": (lambda m, x: x if x.shape[1:] == m.table.shape[1:] else x * 2, ["x.shape[1] != 10"]),
    "a tuple": (lambda _, x: x if x.shape[1:] == (5, 4) else x * 2, ["x.shape[1] == 5"]),
    "a batch of one": (lambda _, x: x.squeeze(0) if x.shape[0] == 1 else x, ["x.shape[0] != 1"]),
    "a rank": (lambda _, x: x * 2 if x.squeeze().dim() == 3 else x, ["x.shape[0] != 1", "x.shape[1] != 1"]),
    "parts": (folded, ["((1 + x.shape[1]) // 2) == 3", "(-4) + x.shape[1] >= 0"]),
    "a range and a size": (
        lambda _, x: x.reshape(x.size(0), len(range(x.size(1))), -1),
        ["x.shape[1] == 5"],
    ),
}


def agree(gm: fx.GraphModule, model: nn.Module, *args: Tensor) -> bool:
    """Whether the graph takes these inputs; what it gives is what the model gives, to the bit."""
    try:
        found = gm(*args)
    except GuardError:
        return False
    torch.testing.assert_close(found, model(*args), rtol=0, atol=0)
    return True


class TestExpressions:
    """Sizes that are only computed with stay expressions of the input."""

    @pytest.mark.parametrize("name", EXPRESSIONS)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_nothing_is_fixed(self, name: str, batch: int) -> None:
        model = seeded(lambda: Asks(EXPRESSIONS[name]))
        gm = traced(model, image(batch, 5, 4))
        assert guards(gm) == []
        sizes = (10,) if "buffer" in name and "slice" not in name else (5, 6, 10)
        if 10 in sizes and len(sizes) == 1:
            gm = traced(model, image(batch, 10, 4))
        for n in (1, 2, 4):
            assert all(agree(gm, model, image(n, size, 4)) for size in sizes)

    @pytest.mark.parametrize("name", PLAIN)
    def test_what_no_shape_changes_is_answered(self, name: str) -> None:
        model = seeded(lambda: Asks(PLAIN[name]))
        gm = traced(model, image(3, 5, 4))
        assert guards(gm) == []
        assert all(agree(gm, model, image(n, size, 4)) for n in (1, 3) for size in (5, 8))


class TestDecisions:
    """What is decided by a shape is a guard, and a graph is never used where it does not hold."""

    @pytest.mark.parametrize("name", DECISIONS)
    def test_guards(self, name: str) -> None:
        ask, expected = DECISIONS[name]
        model = seeded(lambda: Asks(ask))
        gm = traced(model, image(3, 5, 4))
        assert guards(gm) == expected
        assert agree(gm, model, image(3, 5, 4))
        taken = [agree(gm, model, image(n, size, 4)) for n in (1, 2, 4) for size in (4, 5, 6)]
        holds = [all(g.holds({"x": (n, s, 4)}) for g in state(gm).guards) for n in (1, 2, 4) for s in (4, 5, 6)]
        assert taken == holds

    def test_a_batch_of_one_that_is_treated_apart(self) -> None:
        model = seeded(lambda: Asks(DECISIONS["a batch of one"][0]))
        gm = traced(model, image(1, 5, 4))
        assert guards(gm) == ["x.shape[0] == 1"]
        assert agree(gm, model, image(1, 6, 4))
        assert not agree(gm, model, image(2, 5, 4))

    def test_the_error(self) -> None:
        model = seeded(lambda: Asks(DECISIONS["rows"][0]))
        gm = traced(model, image(3, 5, 4))
        with pytest.raises(GuardError, match=r"the graph was traced for x.shape\[0\] == 3, and x is \[2, 5, 4\]") as e:
            gm(image(2, 5, 4))
        file, _, rest = (e.value.source or "").partition(".py:")
        assert Path(file).name == "test_shapes_traced"
        assert "row * 2 for row in x" in rest

    @pytest.mark.parametrize("given_by", ["position", "name"])
    def test_nested_inputs(self, given_by: str) -> None:
        class Nested(nn.Module):
            def forward(self, named: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
                return named["a"].sum() + (pair[1] * 2 if pair[1].shape[0] > 1 else pair[1])

        named, pair = nested_inputs()
        gm = traced(Nested(), named, pair)
        assert guards(gm) == ["pair_1.shape[0] > 1"]
        args, kwargs = ((named, pair), {}) if given_by == "position" else ((), {"named": named, "pair": pair})
        torch.testing.assert_close(gm(*args, **kwargs), Nested()(named, pair))
        with pytest.raises(GuardError):
            gm(named, (pair[0], pair[1][:1]))
        assert guards(traced(nested_model(), named, pair)) == []

    def test_copies_and_later_stages_keep_the_guards(self) -> None:
        model = nn.Sequential(seeded(lambda: Asks(DECISIONS["parity"][0])), nn.Linear(4, 2)).eval()
        x, other = image(2, 5, 4), image(2, 6, 4)
        prepared = fxq.prepare(model, x)
        fxq.calibrate(prepared, [x], progress=False)
        converted = fxq.convert(prepared)
        trained = fxq.prepare_qat(model, x)
        fxq.calibrate(trained, [x], progress=False)
        for gm in (prepared, copy.deepcopy(prepared), converted, copy.deepcopy(converted), trained):
            gm(x)
            with pytest.raises(GuardError, match=r"input.shape\[1\] % 2"):
                gm(other)

    def test_under_compile(self) -> None:
        model = seeded(lambda: Asks(DECISIONS["parity"][0]))
        compiled = torch.compile(traced(model, image(3, 5, 4)), backend="eager")
        for n in (3, 2):
            torch.testing.assert_close(compiled(image(n, 7, 4)), model(image(n, 7, 4)))
        with pytest.raises(GuardError):
            compiled(image(3, 6, 4))


class TestNetworks:
    """Whole networks that ask for their shapes."""

    @pytest.mark.parametrize("name", NETWORKS)
    @settings(max_examples=5, deadline=None)
    @given(data=st.data())
    def test_at_other_shapes(self, name: str, data: st.DataObject) -> None:
        model, shapes = network(name), NETWORKS[name][1]
        gm = _traced(name)
        batch = data.draw(st.integers(1, 4))
        size = data.draw(st.sampled_from([0, 1, 2, 8, 16]))
        others = [
            (batch, *[s + size if s != shape[1] or len(shape) == 2 else s for s in shape[1:]]) for shape in shapes
        ]
        if name == "windows":
            others = [(batch, shapes[0][1] + size, shapes[0][2] + 2 * size, shapes[0][3])]
        args = inputs(name, others)
        with torch.no_grad():
            try:
                expected = model(*args)
            except (AssertionError, ValueError, RuntimeError):  # the model itself does not take this shape
                with pytest.raises((GuardError, RuntimeError)):
                    gm(*args)
                return
            held = all(g.holds({n: a.shape for n, a in zip(_names(gm), args, strict=True)}) for g in state(gm).guards)
            assert held or size  # whatever the batch
            if held:
                torch.testing.assert_close(gm(*args), expected, rtol=0, atol=0)
            else:
                with pytest.raises(GuardError):
                    gm(*args)

    def test_quantized_and_exported(self, tmp_path: Path) -> None:
        import onnxruntime

        for name in ("encoder", "vit, interpolated", "unet"):
            model, args = network(name), inputs(name, NETWORKS[name][1])
            quantized = fxq.quantize(model, [args], progress=False)
            path = fxq.export(quantized, tmp_path / "model.onnx")
            session = onnxruntime.InferenceSession(path)
            for batch in (1, 3):
                more = tuple(a[:1].repeat(batch, *[1] * (a.ndim - 1)) for a in args)
                feed = {v.name: a.numpy() for v, a in zip(session.get_inputs(), more, strict=True)}
                with torch.no_grad():
                    torch.testing.assert_close(
                        torch.tensor(session.run(None, feed)[0]), quantized(*more), rtol=1e-3, atol=1e-4
                    )


_TRACED: dict[str, fx.GraphModule] = {}


def _traced(name: str) -> fx.GraphModule:
    if name not in _TRACED:
        _TRACED[name] = traced(network(name), *inputs(name, NETWORKS[name][1]))
    return _TRACED[name]


def _names(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]


class TestDeclared:
    """Dimensions that are declared fixed are plain numbers, held by a guard."""

    @pytest.mark.parametrize(
        ("shapes", "expected"),
        [
            ("any", []),
            ("batch", ["x.shape[1] == 5"]),
            (None, ["x.shape[0] == 3", "x.shape[1] == 5"]),
            ({"x": {1: "n"}}, ["x.shape[0] == 3"]),
            ({"x": {-2: (2, 8)}}, ["x.shape[0] == 3"]),
        ],
    )
    def test_declared(self, shapes: Any, expected: list[str]) -> None:
        model = seeded(lambda: Asks(lambda _, x: x.reshape(x.shape[0] * x.shape[1], -1)))
        gm = traced(model, image(3, 5, 4), options={"dynamic_shapes": shapes})
        assert guards(gm) == expected
        assert agree(gm, model, image(3, 5, 4))

    def test_numbers_where_the_model_wants_them(self) -> None:
        def ask(_: Any, x: Tensor) -> Tensor:
            return x.reshape(torch.Size([x.shape[0], x.shape[1] * x.shape[2]])) * float(x.shape[1] == 5)

        model = seeded(lambda: Asks(ask))
        gm = traced(model, image(3, 5, 4), options={"dynamic_shapes": None})
        assert agree(gm, model, image(3, 5, 4))

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            ("all", "dynamic_shapes='all' is not understood"),
            ({"x": "n"}, "is not understood"),
            ({"y": {0: "n"}}, "names 'y', which is no input"),
            ({"x": {3: "n"}}, "input 'x' has no dimension 3"),
        ],
    )
    def test_refused(self, shapes: Any, message: str) -> None:
        with pytest.raises(TraceError, match=message):
            traced(seeded(lambda: Asks(lambda _, x: x)), image(3, 5, 4), options={"dynamic_shapes": shapes})


class TestExport:
    """A file promises no shape for which the graph was not traced."""

    def _graph(self, name: str) -> fx.GraphModule:
        return fxq.trace(seeded(lambda: Asks(DECISIONS[name][0])), image(3, 5, 4))

    def test_a_fixed_batch(self, tmp_path: Path) -> None:
        gm = self._graph("rows")
        with pytest.raises(
            ExportError, match=r"batch cannot be dynamic: the graph was traced for x.shape\[0\] == 3"
        ) as e:
            fxq.export(gm, tmp_path / "model.onnx")
        assert "row * 2 for row in x" in (e.value.source or "")
        assert not list(tmp_path.iterdir())
        fxq.export(gm, tmp_path / "model.onnx", dynamic_shapes=None)

    def test_some_sizes(self, tmp_path: Path) -> None:
        gm = self._graph("a batch of one")
        with pytest.raises(ExportError, match="batch cannot be dynamic") as e:
            fxq.export(gm, tmp_path / "model.onnx")
        assert "dynamic_shapes={'x': {0: (2, 64)}}" in (e.value.hint or "")
        fxq.export(gm, tmp_path / "model.onnx", dynamic_shapes={"x": {0: (2, 64)}})

    def test_another_dimension(self, tmp_path: Path) -> None:
        gm = self._graph("parity")
        fxq.export(gm, tmp_path / "model.onnx")
        with pytest.raises(ExportError, match="n cannot be dynamic"):
            fxq.export(gm, tmp_path / "model.onnx", dynamic_shapes={"x": {1: "n"}})


class TestLeaves:
    """What decides by values is kept whole on request."""

    def test_the_smallest_module(self) -> None:
        model, x = seeded(Normalizing), image(2, 3, 8, 8)
        with pytest.raises(TraceError, match="control flow depends on a tensor's value"):
            fxq.prepare(model, x)
        prepared = fxq.prepare(model, x, on_untraceable="leaf")
        assert [str(n.target) for n in prepared.graph.nodes if str(n.target).startswith("inner")] == ["inner.1"]
        (note,) = [n for n in fxq.report(prepared).notes if n.kind == "opaque"]
        assert (note.node, note.module_path) == ("inner_1", "inner.1")
        assert note.text == "Rescaled is kept whole and float: control flow depends on a tensor's value"
        assert "shape_nets.py" in (note.source or "")
        assert fxq.report(prepared).totals.weighted_quantized == 2
        fxq.calibrate(prepared, [x], progress=False)
        converted = fxq.convert(prepared)
        for values in (x, torch.zeros_like(x)):
            torch.testing.assert_close(converted(values), model(values), rtol=0.1, atol=0.1)

    def test_export_says_so(self, tmp_path: Path) -> None:
        gm = fxq.trace(seeded(Normalizing), image(2, 3, 8, 8), on_untraceable="leaf")
        with pytest.raises(ExportError, match="a module decides by a tensor's value") as e:
            fxq.export(gm, tmp_path / "model.onnx")
        assert (e.value.node, e.value.module_path) == ("inner_1", "inner.1")

    def test_what_only_fx_cannot_trace_is_exported(self, tmp_path: Path) -> None:
        import onnxruntime

        class Tagged(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                x.parts = 2
                return x.reshape(x.shape[0], -1, x.parts).amax(2)

        model, x = seeded(lambda: nn.Sequential(nn.Linear(8, 8), Tagged(), nn.Linear(4, 4))), image(4, 8)
        with pytest.raises(TraceError, match="the attribute parts of a tensor is assigned"):
            fxq.prepare(model, x)
        prepared = fxq.prepare(model, x, on_untraceable="leaf")
        fxq.calibrate(prepared, [x], progress=False)
        converted = fxq.convert(prepared)
        session = onnxruntime.InferenceSession(fxq.export(converted, tmp_path / "model.onnx"))
        for batch in (1, 5):
            y = image(batch, 8)
            found = torch.tensor(session.run(None, {session.get_inputs()[0].name: y.numpy()})[0])
            with torch.no_grad():
                torch.testing.assert_close(found, converted(y), rtol=1e-3, atol=1e-4)

    def test_the_model_itself_is_no_leaf(self) -> None:
        model = seeded(lambda: Asks(lambda _, x: x if x.sum() > 0 else -x))
        with pytest.raises(TraceError, match="control flow depends on a tensor's value"):
            fxq.trace(model, image(2, 5, 4), on_untraceable="leaf")
        with pytest.raises(TraceError, match="on_untraceable is 'skip'"):
            fxq.trace(model, image(2, 5, 4), on_untraceable="skip")  # type: ignore[arg-type]


RESOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "deeplabv3_mobilenet_v3_large": ((2, 3, 64, 96), {"weights_backbone": None}, 0),
    "swin3d_t": ((1, 3, 8, 28, 28), {}, 5),  # whether windows are larger than what they slide over, per direction
}


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_torchvision_at_another_batch_and_resolution(name: str) -> None:
    shape, options, decisions = RESOLUTIONS[name]
    model = torchvision_model(name, **options)
    gm = traced(model, image(*shape))
    assert len(guards(gm)) == decisions
    x = image(shape[0] + 1, *shape[1:-1], shape[-1] // 2)
    with torch.no_grad():
        found, expected = pytree.tree_leaves(gm(x)), pytree.tree_leaves(model(x))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("stops", [True, False])
def test_nothing_stays_patched(*, stops: bool) -> None:
    def global_state() -> Any:
        return builtins.isinstance, nn.Module.__call__, nn.Module.__getattr__, dict(vars(torch.Tensor)), torch.zeros

    plain = global_state()
    model = seeded(lambda: Asks(lambda _, x: x if stops and x.sum() > 0 else x * len(x)))
    if stops:
        with pytest.raises(TraceError):
            traced(model, image(2, 5, 4))
    else:
        traced(model, image(2, 5, 4))
    assert global_state() == plain


def test_a_guard_reads_only_shapes() -> None:
    guard = Guard("x.shape[0] % y.shape[1] == 0", ("x", "y"))
    assert guard.holds({"x": (4,), "y": (1, 2)})
    assert not guard.holds({"x": (5,), "y": (1, 2)})
    assert not guard.holds({"x": (5,), "y": (2,)})  # another rank
    assert not guard.holds({"x": (5,), "y": (2, 0)})
    assert guard.holds({"x": (5,)})  # y was not given
