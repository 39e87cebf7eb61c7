"""Fuse BatchNorm: every layer that can take it, every reason not to, and outputs within rounding."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from placing import Lambda, check_pass, node, of_kind
from torch import Tensor, fx, nn
from toys import after, basic_net, bottleneck_net, image, lenet, randomize_norm, seeded

from fxq.folding import fold
from fxq.graph import constant, origin, state
from fxq.passes import Canonicalize, DropIdentities, ExpandModules, Functionalize, FuseBatchNorm

BEFORE = (Functionalize(), ExpandModules(), Canonicalize(), DropIdentities())
SIZES = {1: (7,), 2: (6, 5), 3: (4, 5, 3)}


def before(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return after(BEFORE, model, *inputs)


def close(gm: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    """Equal within float32 rounding of sums of a few dozen products."""
    with torch.no_grad():
        expected = model(*inputs)
        torch.testing.assert_close(gm(*inputs), expected, rtol=1e-5, atol=float(expected.abs().max()) * 2e-6)


def fused(model: nn.Module, *inputs: Tensor, golden: str | None = None) -> fx.GraphModule:
    """The graph after the pass, in which no BatchNorm is left and nothing was declined."""
    result = check_pass(FuseBatchNorm(), before(model, *inputs), golden)
    assert of_kind(result.graph_module, "batch_norm") == []
    assert result.notes == ()
    close(result.graph_module, model, *inputs)
    return result.graph_module


def convolution(n: int, *, transposed: bool, groups: int, bias: bool) -> nn.Module:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{n}d")
    extra = {"output_padding": 1} if transposed else {"dilation": 2}
    return kind(4, 6, 2, stride=2, padding=1, groups=groups, bias=bias, **extra)  # type: ignore[no-any-return]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("groups", "bias", "affine", "eps"),
    [
        *itertools.product((1, 2), (False, True), (False, True), (1e-5,)),
        (2, True, True, 0.3),
        (1, False, True, 0.0),
    ],
)
def test_convolutions(n: int, groups: int, eps: float, *, transposed: bool, bias: bool, affine: bool) -> None:
    norm = getattr(nn, f"BatchNorm{n}d")
    model = seeded(
        lambda: nn.Sequential(
            convolution(n, transposed=transposed, groups=groups, bias=bias), norm(6, affine=affine, eps=eps)
        )
    )
    fused(model, image(2, 4, *SIZES[n]))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(*, bias: bool) -> None:
    fused(seeded(lambda: nn.Sequential(nn.Linear(5, 3, bias=bias), nn.BatchNorm1d(3))), image(4, 5))


def test_depthwise_and_functional() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)))
    fused(model, image(2, 4, 6, 6))

    def call(m: nn.Module, x: Tensor) -> Tensor:
        y = F.conv2d(x, m.weight, None, 1, "same")
        return F.batch_norm(y, m.mean, m.var, training=False)

    parts = {"weight": nn.Parameter(image(6, 4, 3, 3)), "mean": image(6), "var": image(6).abs() + 0.1}
    gm = fused(Lambda(call, **parts), image(2, 4, 6, 6))
    assert sorted(gm.state_dict()) == ["weight", "weight_bias"]


def test_golden_names_and_paths() -> None:
    model = basic_net()
    graph = before(model, image(2, 3, 16, 16))
    gm = fused(model, image(2, 3, 16, 16), golden="passes/fuse_batch_norm_basic")
    conv = node(gm, "blocks_0_bn1")
    assert origin(conv).module_path == "blocks.0.conv1"
    assert [str(a.target) for a in conv.args[1:] if isinstance(a, fx.Node)] == [
        "blocks.0.conv1.weight",
        "blocks.0.conv1.bias",
    ]
    assert "fused" in state(gm).properties
    kept = graph.state_dict().keys()
    assert {k for k in gm.state_dict() if not k.endswith("bias") and "fc" not in k} <= kept
    assert not [k for k in gm.state_dict() if "running" in k or "bn" in k]
    fused(bottleneck_net(), image(2, 3, 16, 16))


def test_each_call_of_a_shared_layer_has_its_own_fold() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([m.first(m.conv(x)), m.second(m.conv(x + 1)), m.conv(x - 1)])

    model = seeded(lambda: Lambda(call, conv=nn.Conv2d(3, 4, 3), first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)))
    gm = fused(model, image(2, 3, 5, 5), golden="passes/fuse_batch_norm_shared")
    weights = {n.name: constant(n.args[1]) for n in of_kind(gm, "conv2d")}
    plain = gm.get_parameter("conv.weight")
    assert torch.equal(plain, model.conv.weight)
    assert weights["conv_2"] is plain
    assert weights["first"] is not plain
    assert not torch.equal(weights["first"], weights["second"])  # type: ignore[arg-type]
    parallel = [weights[k] / plain for k in ("first", "second")]  # type: ignore[operator]
    assert all((ratio.amax((1, 2, 3)) - ratio.amin((1, 2, 3))).max() < 1e-5 for ratio in parallel)


def test_a_shared_norm() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m.norm(m.a(x)) + m.norm(m.b(x))

    conv = lambda: nn.Conv2d(3, 4, 3)  # noqa: E731
    fused(seeded(lambda: Lambda(call, a=conv(), b=conv(), norm=nn.BatchNorm2d(4))), image(2, 3, 5, 5))


def test_two_norms_in_a_row() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    gm = fused(model, image(2, 3, 5, 5))
    assert [n.name for n in of_kind(gm, "conv2d")] == ["_2"]


def test_a_tied_weight_keeps_its_value_elsewhere() -> None:
    def call(m: nn.Module, x: Tensor) -> Tensor:
        return m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight)

    model = seeded(lambda: Lambda(call, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    fused(model, image(2, 3, 5, 5))


def test_half_precision() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).half()
    gm = check_pass(FuseBatchNorm(), before(model, image(2, 3, 5, 5).half())).graph_module
    assert {t.dtype for t in gm.state_dict().values()} == {torch.float16}
    with torch.no_grad():
        x = image(2, 3, 5, 5).half()
        torch.testing.assert_close(gm(x), model(x), rtol=4e-3, atol=4e-3)


def test_the_model_and_the_given_graph_stay() -> None:
    model = basic_net()
    held = copy.deepcopy(model.state_dict())
    graph = before(model, image(1, 3, 16, 16))
    old = copy.deepcopy(graph.state_dict())
    FuseBatchNorm()(graph)
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, old[k]) for k, v in graph.state_dict().items())


def parts() -> dict[str, nn.Module]:
    return {
        "conv": nn.Conv2d(4, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
        "fc": nn.Linear(6, 6),
        "fcn": nn.BatchNorm1d(4),
    }


def read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return m.norm(y) + y  # type: ignore[no-any-return]


def given_out(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.conv(x)
    return m.norm(y), y


Call = Callable[[Any, Tensor], Any]
DECLINED: dict[str, tuple[Call, str]] = {
    "another reader": (read_twice, "conv is read by add too"),
    "the output reads it": (given_out, "conv is read by output too"),
    "no running statistics": (
        lambda m, x: F.batch_norm(m.conv(x), None, None, training=True),
        "it has no running statistics",
    ),
    "a computed weight": (
        lambda m, x: m.norm(F.conv2d(x, m.conv.weight * x.mean())),
        "the weight of conv2d is computed, not stored",
    ),
    "a computed bias": (
        lambda m, x: m.norm(F.conv2d(x, m.conv.weight, x.mean((0, 2, 3)))),
        "the weight of conv2d is computed, not stored",
    ),
    "computed statistics": (
        lambda m, x: F.batch_norm(m.conv(x), x.mean((0, 2, 3)), x.var((0, 2, 3))),
        "its statistics are computed, not stored",
    ),
    "features last": (
        lambda m, x: m.fcn(m.fc(x[:, :, 0])),
        "a Linear layer of more than two dimensions has its features last",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    call, why = DECLINED[name]
    model = seeded(lambda: Lambda(call, **parts()))
    result = check_pass(FuseBatchNorm(), before(model, image(2, 4, 6, 6)))
    assert not result.modified
    (note,) = result.notes
    assert note.text.startswith("BatchNorm is not folded into ")
    assert why in note.text
    assert (note.rule, note.kind) == ("fuse-batch-norm", "declined")
    assert note.source is not None
    assert note.source.startswith(__file__)
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(image(2, 4, 6, 6)), model(image(2, 4, 6, 6)))


def test_an_untracked_norm_is_declined() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    (note,) = check_pass(FuseBatchNorm(), before(model, image(2, 3, 5, 5))).notes
    assert note.text == "BatchNorm is not folded into _0: it has no running statistics"


def test_nothing_to_fuse() -> None:
    assert not check_pass(FuseBatchNorm(), before(lenet(), image(1, 1, 28, 28))).modified
    alone = seeded(lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    result = check_pass(FuseBatchNorm(), before(alone, image(2, 3, 4, 4)))
    assert (result.modified, result.notes) == (False, ())


def test_fold_is_exact_in_float64() -> None:
    """The fold in float64 against BatchNorm in float64, for a grouped transposed convolution."""
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2).double()
    norm = nn.BatchNorm2d(4).double().eval()
    randomize_norm(norm)
    args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    weight, bias = fold(layer.weight, layer.bias, *args, groups=2, transposed=True)  # type: ignore[arg-type]
    x = image(2, 6, 5, 5).double()
    expected = norm(layer(x))
    torch.testing.assert_close(F.conv_transpose2d(x, weight, bias, groups=2), expected, rtol=1e-12, atol=1e-12)
