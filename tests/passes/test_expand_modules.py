"""Expand modules: each torch.nn module that fxq knows becomes its functional call, with the same result to
the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from placing import Lambda, check_pass, node, of_kind
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils import _pytree as pytree
from toys import after, basic_net, image, seeded, traced

from fxq.graph import constant, tensor_info
from fxq.ops import KINDS, MODULES, kind_name
from fxq.passes import Canonicalize, ExpandModules, Functionalize

BEFORE = (Functionalize(),)


def expanded(model: nn.Module, *inputs: Tensor, golden: str | None = None) -> fx.GraphModule:
    """The graph after the pass: no known module is left, numbers are equal to the bit."""
    result = check_pass(ExpandModules(), after(BEFORE, model, *inputs), golden)
    gm = result.graph_module
    assert not any(type(gm.get_submodule(str(n.target))) in MODULES for n in gm.graph.nodes if n.op == "call_module")
    same(gm, model, *inputs)
    return gm


def same(gm: fx.GraphModule, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        expected, found = pytree.tree_leaves(model(*inputs)), pytree.tree_leaves(gm(*inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


SEQUENCES, IMAGES, VOLUMES, ROWS = image(2, 4, 9), image(2, 4, 6, 6), image(2, 4, 4, 4, 4), image(3, 4)
BY_RANK = {1: SEQUENCES, 2: IMAGES, 3: VOLUMES}
ODD_AVERAGE = {"stride": 1, "padding": 1, "ceil_mode": True, "count_include_pad": False}
Case = tuple[Tensor, tuple[Callable[[], nn.Module], ...]]


def by_rank(
    name: str, args: tuple[int, ...], *options: dict[str, Any], ranks: tuple[int, ...] = (1, 2, 3)
) -> dict[type[nn.Module], Case]:
    """Cases of ``<name>1d`` to ``<name>3d``, one for each of the options."""
    kinds = {n: getattr(nn, f"{name}{n}d") for n in ranks}
    return {
        kind: (BY_RANK[n], tuple(partial(kind, *args, **chosen) for chosen in options)) for n, kind in kinds.items()
    }


CASES: dict[type[nn.Module], Case] = {
    nn.Linear: (ROWS, (lambda: nn.Linear(4, 3), lambda: nn.Linear(4, 3, bias=False))),
    nn.Embedding: (
        torch.tensor([0, 2]),
        (lambda: nn.Embedding(3, 4), lambda: nn.Embedding(3, 4, padding_idx=1)),
    ),
    nn.LayerNorm: (
        IMAGES,
        (
            lambda: nn.LayerNorm((6, 6)),
            lambda: nn.LayerNorm(6, 0.1, elementwise_affine=False),
            lambda: nn.LayerNorm(6, bias=False),
        ),
    ),
    nn.GroupNorm: (IMAGES, (lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(4, 4, 0.1, affine=False))),
    nn.ReLU: (ROWS, (nn.ReLU, lambda: nn.ReLU(inplace=True))),
    nn.ReLU6: (ROWS * 9, (nn.ReLU6,)),
    nn.Hardtanh: (ROWS, (nn.Hardtanh, lambda: nn.Hardtanh(-0.2, 0.3, inplace=True))),
    nn.LeakyReLU: (ROWS, (nn.LeakyReLU, lambda: nn.LeakyReLU(0.3))),
    nn.PReLU: (ROWS, (nn.PReLU, lambda: nn.PReLU(4))),
    nn.ELU: (ROWS, (nn.ELU, lambda: nn.ELU(0.3))),
    nn.CELU: (ROWS, (lambda: nn.CELU(0.3),)),
    nn.SELU: (ROWS, (nn.SELU,)),
    nn.GELU: (ROWS, (nn.GELU, lambda: nn.GELU("tanh"))),
    nn.SiLU: (ROWS, (nn.SiLU,)),
    nn.Mish: (ROWS, (nn.Mish,)),
    nn.Softplus: (ROWS, (lambda: nn.Softplus(2, 1),)),
    nn.Hardswish: (ROWS, (nn.Hardswish,)),
    nn.Hardsigmoid: (ROWS, (nn.Hardsigmoid,)),
    nn.Sigmoid: (ROWS, (nn.Sigmoid,)),
    nn.Tanh: (ROWS, (nn.Tanh,)),
    nn.Softmax: (SEQUENCES, (lambda: nn.Softmax(1), lambda: nn.Softmax(None))),
    nn.LogSoftmax: (ROWS, (lambda: nn.LogSoftmax(-1), lambda: nn.LogSoftmax(None))),
    nn.Flatten: (IMAGES, (nn.Flatten, lambda: nn.Flatten(0, 2))),
    nn.Unflatten: (IMAGES, (lambda: nn.Unflatten(1, (2, -1)),)),
    nn.PixelShuffle: (IMAGES, (lambda: nn.PixelShuffle(2),)),
    nn.PixelUnshuffle: (IMAGES, (lambda: nn.PixelUnshuffle(3),)),
    nn.ChannelShuffle: (IMAGES, (lambda: nn.ChannelShuffle(2),)),
    nn.Upsample: (
        IMAGES,
        (
            lambda: nn.Upsample(9),
            lambda: nn.Upsample(scale_factor=(2, 1.5), mode="bilinear", align_corners=True),
        ),
    ),
    nn.UpsamplingNearest2d: (IMAGES, (lambda: nn.UpsamplingNearest2d(scale_factor=2),)),
    nn.UpsamplingBilinear2d: (IMAGES, (lambda: nn.UpsamplingBilinear2d((9, 8)),)),
    nn.Dropout: (ROWS, (lambda: nn.Dropout(0.3), lambda: nn.Dropout(inplace=True))),
    nn.AlphaDropout: (ROWS, (nn.AlphaDropout,)),
    **by_rank(
        "Conv",
        (4, 6, 3),
        {},
        {"bias": False, "groups": 2, "stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
        {"padding": "same", "padding_mode": "circular"},
    ),
    **by_rank(
        "ConvTranspose",
        (4, 6, 3),
        {},
        {"bias": False, "groups": 2, "stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2},
    ),
    **by_rank("BatchNorm", (4,), {}, {"affine": False, "eps": 0.1}, {"track_running_stats": False}, {"momentum": None}),
    **by_rank(
        "MaxPool",
        (3,),
        {},
        {"stride": 1, "padding": 1, "ceil_mode": True},
        {"dilation": 1, "return_indices": True},
    ),
    **by_rank("AvgPool", (2,), {}, ODD_AVERAGE, ranks=(1,)),
    **by_rank("AvgPool", (2,), {}, ODD_AVERAGE, {"divisor_override": 3}, ranks=(2, 3)),
    **by_rank("AdaptiveAvgPool", (2,), {}),
    **by_rank("AdaptiveMaxPool", (2,), {}, {"return_indices": True}),
    **by_rank("Dropout", (), {}),
}


def test_every_module_has_a_case() -> None:
    assert {m.__name__ for m in CASES} == {m.__name__ for m in MODULES}


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules(module: type[nn.Module]) -> None:
    x, builds = CASES[module]
    for build in builds:
        gm = expanded(seeded(lambda build=build: nn.Sequential(build())), x)  # type: ignore[misc]
        assert not Canonicalize()(gm).modified, "the expanded call is not canonical"
        (call,) = of_kind(gm, MODULES[module].kind)
        assert (call.name, call.target) == ("_0", KINDS[MODULES[module].kind].target)
        for n in gm.graph.nodes:
            info = tensor_info(n)
            assert n.op in ("output", "call_function") or info is not None, n.name
        for n in (call, *call.all_input_nodes):
            info, value = tensor_info(n), constant(n)
            if value is not None:
                assert info is not None
                assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype)


def test_golden_names_and_keys() -> None:
    model = basic_net()
    gm = expanded(model, image(1, 3, 16, 16), golden="passes/expand_basic")
    keys = {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}
    assert keys <= gm.state_dict().keys() <= model.state_dict().keys()
    assert all(torch.equal(gm.state_dict()[k], model.state_dict()[k]) for k in keys)


def test_padding_gets_its_own_shape() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="reflect")))
    gm = expanded(model, IMAGES, golden="passes/expand_padding_mode")
    info = tensor_info(node(gm, "_0_pad"))
    assert info is not None
    assert info.shape == (2, 4, 8, 10)


def test_identity_goes_and_unknown_modules_stay() -> None:
    model = nn.Sequential(nn.Identity(), nn.Tanhshrink(), nn.Identity())
    gm = expanded(model, ROWS)
    assert [kind_name(n) for n in gm.graph.nodes] == ["placeholder", "Tanhshrink", "output"]


def test_a_module_called_twice_is_two_nodes_on_one_weight() -> None:
    model = seeded(lambda: Lambda(lambda m, x: m.fc(torch.relu(m.fc(x))), fc=nn.Linear(4, 4)))
    gm = expanded(model, ROWS)
    first, second = of_kind(gm, "linear")
    assert first.args[1] is second.args[1]
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == ["fc.weight", "fc.bias"]


def test_input_by_name() -> None:
    expanded(
        seeded(lambda: Lambda(lambda m, x: m.same(input=m.fc(input=x)), fc=nn.Linear(4, 4), same=nn.Identity())),
        ROWS,
    )


def test_subclasses_are_not_taken_for_their_base() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) * 2

    expanded(seeded(lambda: nn.Sequential(Doubling(4, 4))), ROWS)
    gm = after(BEFORE, seeded(lambda: nn.Sequential(Doubling(4, 4))), ROWS)
    kept = traced(seeded(lambda: nn.Sequential(Doubling(4, 4))), ROWS, options={"leaf_modules": [Doubling]})
    assert [kind_name(n) for n in kept.graph.nodes] == ["placeholder", "Doubling", "output"]
    assert len(list(gm.graph.nodes)) > 3


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def old(wrap: Callable[..., nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def build(module: nn.Module) -> nn.Module:
        with pytest.warns(FutureWarning, match="deprecated"):
            return wrap(module)

    return build if wrap is weight_norm else wrap


def halved(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Halved())
    return module


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a parametrization of one's own": halved,
    "the old weight_norm": old(weight_norm),
    "the old spectral_norm": old(spectral_norm),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_taken_at_their_value(name: str) -> None:
    wrap = COMPUTED[name]
    model = seeded(lambda: nn.Sequential(wrap(nn.Conv2d(4, 4, 3)), wrap(nn.Linear(4, 4))))
    with torch.no_grad():
        model(IMAGES)  # the old forms compute their weight in a call
    held = {k: v.clone() for k, v in model.state_dict().items()}
    gm = after((Functionalize(), ExpandModules()), model, IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(gm(IMAGES), model(IMAGES), rtol=1e-6, atol=1e-7)
    assert [kind_name(n) for n in gm.graph.nodes if n.op == "call_function"] == ["conv2d", "linear"]
    assert {"0.weight", "1.weight"} <= gm.state_dict().keys()
    assert model.state_dict().keys() == held.keys()
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    assert not ExpandModules()(gm).modified


def double(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output * 2


def negate(_module: nn.Module, args: Any) -> Any:
    return (-args[0],)


def upsampled(m: Any, x: Tensor) -> Tensor:
    return m.up(x, output_size=(13, 14))  # type: ignore[no-any-return]


def test_declined() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Identity())
        model[0].register_forward_hook(double)
        model[1].register_forward_pre_hook(negate)
        model[2].register_forward_hook(double)
        return model

    model = seeded(build)
    result = check_pass(ExpandModules(), after(BEFORE, model, ROWS), "passes/expand_declined")
    assert not result.modified
    assert [(n.node, n.text.split(",")[0]) for n in result.notes] == [
        ("_0", "Linear has hooks"),
        ("_1", "ReLU has hooks"),
        ("_2", "Identity has hooks"),
    ]
    assert {(n.rule, n.kind) for n in result.notes} == {("expand-modules", "declined")}
    same(result.graph_module, model, ROWS)

    model = seeded(lambda: Lambda(upsampled, up=nn.ConvTranspose2d(4, 3, 3, stride=2)))
    result = check_pass(ExpandModules(), after(BEFORE, model, IMAGES))
    assert result.notes[0].text == "ConvTranspose2d is called with more than its input, so it stays whole"
    same(result.graph_module, model, IMAGES)


def test_half_of_the_running_statistics() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm2d(4)))
    gm = after(BEFORE, model, IMAGES)
    norm = gm.get_submodule("0")
    norm.running_var = None  # type: ignore[assignment]
    (note,) = check_pass(ExpandModules(), gm).notes
    assert note.text == "BatchNorm has one running statistic and lacks the other"


def test_a_leaf_that_the_user_asked_for_stays_whole() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    gm = traced(model, ROWS, options={"leaf_modules": ["2", nn.ReLU]})
    result = check_pass(ExpandModules(), Functionalize()(gm).graph_module)
    kinds = [kind_name(n) for n in result.graph_module.graph.nodes if n.op.startswith("call")]
    assert kinds == ["linear", "ReLU", "Linear"]
    same(result.graph_module, model, ROWS)
