"""Packed projections in front of an attention: a layer for each part, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda, check_pass, of_kind, prepared, same_numbers
from torch import Tensor, nn
from toys import after, image, seeded

import fxq
from fxq.backends.onnxrt import Session
from fxq.graph import origin
from fxq.passes import Canonicalize, DropIdentities, ExpandModules, Functionalize, SeparateProjections
from fxq.recipe import Recipe, Rule

X = (2, 10, 32)
READY = (Functionalize(), ExpandModules(), Canonicalize(), DropIdentities())


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v


def by_index(m: Any, x: Tensor) -> Tensor:
    qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4)
    return attended(qkv[0], qkv[1], qkv[-1])


def by_unbind(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(x.shape[0], -1, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    return attended(q * 0.5, F.normalize(k, dim=-1), v)


def by_transpose(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
    return attended(q, k, v)


def by_slice(m: Any, x: Tensor) -> Tensor:
    qkv = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 16)
    return attended(*(qkv[:, :, i].transpose(1, 2) for i in range(3)))


def by_chunk(m: Any, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in m.qkv(x).chunk(3, dim=-1))
    return attended(q, k, v)


def by_split(m: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*m.qkv(x).split(32, 2))


def keys_and_values(m: Any, x: Tensor) -> Tensor:
    k, v = m.kv(x).reshape(x.shape[0], -1, 2, 2, 16).permute(2, 0, 3, 1, 4)
    return attended(m.q(x).unflatten(-1, (2, 16)).transpose(1, 2), k, v)


FORMS: dict[str, tuple[Callable[..., Any], int]] = {
    "index": (by_index, 3),
    "unbind": (by_unbind, 3),
    "transpose": (by_transpose, 3),
    "slice": (by_slice, 3),
    "chunk": (by_chunk, 3),
    "split": (by_split, 3),
    "keys and values": (keys_and_values, 3),
}


def model(function: Callable[..., Any], **options: Any) -> nn.Module:
    """A function of x [2, 10, 32] and of layers that make 32, 64 and 96 channels of it."""
    widths = {"q": 32, "kv": 64, "qkv": 96, "four": 128}
    return seeded(lambda: Lambda(function, **{name: nn.Linear(32, n, **options) for name, n in widths.items()}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_a_layer_for_each_part(name: str, bias: bool) -> None:
    function, layers = FORMS[name]
    net = model(function, bias=bias)
    before = after(READY, net, image(*X))
    result = check_pass(SeparateProjections(), before)
    gm = result.graph_module
    assert len(of_kind(gm, "linear")) == layers
    assert all(n.kwargs.get("out_features", 0) == 0 and gm.get_parameter(str(n.args[1].target)).shape == (32, 32)
               for n in of_kind(gm, "linear"))  # fmt: skip
    assert {origin(n).module_path for n in of_kind(gm, "linear")} <= {"q", "kv", "qkv"}
    for shape in (X, (3, 7, 32)):
        same_numbers(gm, net, image(*shape))
    totals = fxq.report(prepared(net, image(*X))).totals
    assert totals.weighted == totals.weighted_quantized == layers + 2


def to_more(m: Any, x: Tensor) -> Any:
    q, k, v = m.qkv(x).chunk(3, -1)
    return attended(q, k, v), v


def gated(m: Any, x: Tensor) -> Tensor:
    a, b = m.kv(x).chunk(2, -1)
    return a * torch.sigmoid(b)


def unequal(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.four(x).split([32, 32, 64], -1)
    return attended(q, k, v)


def across(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 32, 3).permute(3, 0, 1, 2)
    return attended(q, k, v)


def computed(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, m.qkv.weight * 2, m.qkv.bias).chunk(3, -1)
    return attended(q, k, v)


def read_twice(m: Any, x: Tensor) -> Any:
    packed = m.qkv(x)
    return attended(*packed.chunk(3, -1)), packed


@pytest.mark.parametrize("function", [to_more, gated, unequal, across, computed, read_twice])
def test_other_layers_stay_as_they_are(function: Callable[..., Any]) -> None:
    gm = after(READY, model(function), image(*X))
    assert not check_pass(SeparateProjections(), gm).modified


def test_a_target_that_does_not_ask_for_it_keeps_one_layer() -> None:
    net = model(by_index)
    assert len(of_kind(fxq.prepare(net, image(*X), target="onnxruntime"), "linear")) == 1


def test_a_recipe_speaks_of_the_layer_by_its_name() -> None:
    gm = prepared(model(by_unbind), image(*X), recipe=Recipe([Rule("qkv", None, reason="measured")]))
    assert [row.precision for row in fxq.report(gm).weighted if row.kind == "linear"] == ["float"] * 3


def test_layers_that_share_a_weight_share_its_parts() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        first = by_chunk(m, x)
        return by_chunk(m, first.transpose(1, 2).flatten(2))

    net = model(twice)
    gm = prepared(net, image(*X))
    assert len(of_kind(gm, "linear")) == 6
    assert sum("qkv.weight_" in name for name, _ in gm.named_parameters()) == 3
    same_numbers(gm, net, image(*X))


@pytest.mark.usefixtures("trt")
def test_tensorrt_runs_the_layers_in_int8(tmp_path: Any) -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        return x + m.q(by_index(m, x).transpose(1, 2).flatten(2))

    net = model(block)
    quantized = fxq.quantize(net, [image(*X, seed=s) for s in range(4)], progress=False)
    path = fxq.export(quantized, tmp_path / "m.onnx", dynamic_shapes=None)
    x = image(*X, seed=9)
    with torch.inference_mode():
        torch.testing.assert_close(Session(path).run(x)[0], quantized(x), rtol=1e-2, atol=2e-2)
    engine = fxq.build(path, tmp_path / "m.engine")
    assert len(engine.int8_kernels) == len(engine.weighted_kernels)
