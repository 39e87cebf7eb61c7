"""Residual additions: which edge reads which quantizer, and what a recipe changes."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
import torch.nn.functional as F
from placing import (
    Lambda,
    Lambda2,
    activation_quantizers,
    before,
    check_pass,
    decided,
    node,
    notes,
    of_kind,
    prepared,
    reads,
    same_numbers,
)
from residual_blocks import Forward, X, block, conv, the_addition, why_not
from torch import Tensor, fx, nn
from torchvision_models import torchvision_model
from toys import basic_net, bottleneck_net, image, preactivation_net, seeded

from fxq.errors import PassError
from fxq.graph import state
from fxq.passes import residual_add as room
from fxq.passes.residual_add import ResidualAdd, longest_ways, sources
from fxq.recipe import EdgeSpecs, QSpec, Recipe, Rule
from fxq.target import Target
from fxq.target_parts import Residual

# What a block may look like, with the same placement every time.


def test_a_pyramid_whose_skip_takes_its_size_from_the_other_branch() -> None:
    def pyramid(m: nn.Module, x: Tensor) -> Tensor:
        coarse, fine = m.down(F.max_pool2d(m.conv1(x), 2)), m.lateral(x)
        return m.conv2(fine + F.interpolate(coarse, size=fine.shape[-2:]))

    gm = prepared(block(pyramid, lateral=conv(kernel=1)), image(*X))
    assert reads(gm, "add") == ["lateral", "interpolate_quantizer"]
    assert decided(gm, "add") == {1: "int8 per-tensor mse R23"}


def test_basic_blocks() -> None:
    model = basic_net()
    gm = prepared(model, image(2, 3, 16, 16))
    # Identity skip: the very quantizer of the block's first convolution, and the convolution's edge float.
    assert reads(gm, "blocks_0_add") == ["blocks_0_bn2", "stem_2_quantizer"]
    assert reads(gm, "blocks_0_bn1")[0] == "stem_2_quantizer"
    assert decided(gm, "blocks_0_add") == {1: "int8 per-tensor mse R24"}
    # Downsample skip: a quantizer of its own, on the downsample convolution's output.
    assert reads(gm, "blocks_1_add") == ["blocks_1_bn2", "blocks_1_downsample_1_quantizer"]
    assert decided(gm, "blocks_1_add") == {1: "int8 per-tensor mse R23"}
    assert activation_quantizers(gm) == [
        "x",
        "stem_2",
        "blocks_0_relu",
        "blocks_0_relu_1",
        "blocks_1_downsample_1",
        "blocks_1_relu",
        "flatten",
    ]
    assert notes(gm) == []
    same_numbers(gm, model, image(2, 3, 16, 16))


def test_bottleneck_blocks() -> None:
    model = bottleneck_net()
    gm = prepared(model, image(2, 3, 16, 16))
    assert reads(gm, "blocks_0_add") == ["blocks_0_bn3", "blocks_0_downsample_1_quantizer"]
    assert reads(gm, "blocks_1_add") == ["blocks_1_bn3", "blocks_0_relu_2_quantizer"]
    assert reads(gm, "blocks_1_bn1")[0] == "blocks_0_relu_2_quantizer"
    assert notes(gm) == []
    same_numbers(gm, model, image(2, 3, 16, 16))


def test_golden_and_second_run() -> None:
    result = check_pass(
        ResidualAdd(), before("residual-add", basic_net(), image(2, 3, 16, 16)), "passes/residual_add_basic"
    )
    assert result.counts == {"annotated": 2}


def iadd(m: nn.Module, x: Tensor) -> Tensor:
    out = m.conv2(m.conv1(x).relu())
    out += x
    return out


def tensor_iadd(m: nn.Module, x: Tensor) -> Tensor:
    out = m.conv2(m.conv1(x).relu())
    out.add_(x)
    return out


SPELLINGS: dict[str, tuple[Forward, int]] = {
    "y + x": (lambda m, x: m.conv2(m.conv1(x).relu()) + x, 0),
    "x + y": (lambda m, x: x + m.conv2(m.conv1(x).relu()), 1),
    "y += x": (iadd, 0),
    "y.add_(x)": (tensor_iadd, 0),
    "torch.add(y, x)": (lambda m, x: torch.add(m.conv2(m.conv1(x).relu()), x), 0),
    "torch.add(x, y)": (lambda m, x: torch.add(x, m.conv2(m.conv1(x).relu())), 1),
    "torch.add(input=x, other=y)": (lambda m, x: torch.add(input=x, other=m.conv2(m.conv1(x).relu())), 1),
    "operator.add(y, x)": (lambda m, x: operator.add(m.conv2(m.conv1(x).relu()), x), 0),
    "operator.add(x, y)": (lambda m, x: operator.add(x, m.conv2(m.conv1(x).relu())), 1),
    "y.add(x)": (lambda m, x: m.conv2(m.conv1(x).relu()).add(x), 0),
    "x.add(y)": (lambda m, x: x.add(m.conv2(m.conv1(x).relu())), 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_block(spelling: str) -> None:
    function, edge = SPELLINGS[spelling]
    model = block(function)
    gm = prepared(model, image(*X))
    add = the_addition(gm)
    assert reads(gm, add.name)[edge] == "conv2"
    assert reads(gm, add.name)[1 - edge] == "x_quantizer"
    assert reads(gm, "conv1")[0] == "x_quantizer"
    assert decided(gm, add.name) == {1 - edge: "int8 per-tensor mse R24"}
    assert activation_quantizers(gm) == ["x", "relu"]
    same_numbers(gm, model, image(*X))


@pytest.mark.parametrize("swapped", [False, True])
def test_downsample_either_way_round(swapped: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        way, skip = m.conv2(m.conv1(x).relu()), m.down(x)
        return skip + way if swapped else way + skip

    gm = prepared(block(forward), image(*X))
    add = the_addition(gm)
    names = ["down_quantizer", "conv2"] if swapped else ["conv2", "down_quantizer"]
    assert reads(gm, add.name) == names
    assert decided(gm, add.name) == {1 - int(swapped): "int8 per-tensor mse R23"}


def test_more_weighted_operations_beat_more_operations() -> None:
    """The longer way is counted in weighted operations first (R25)."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        long = m.down(x.relu().sigmoid().tanh().neg().abs())
        return long + m.conv2(m.conv1(x))

    gm = prepared(block(forward), image(*X))
    assert reads(gm, the_addition(gm).name) == ["down_quantizer", "conv2"]


def test_equally_long_ways_leave_the_convolution_that_runs_last() -> None:
    first = prepared(block(lambda m, x: m.conv1(x) + m.conv2(x)), image(*X))
    assert reads(first, the_addition(first).name) == ["conv1_quantizer", "conv2"]

    def swapped(m: nn.Module, x: Tensor) -> Tensor:
        one = m.conv1(x)
        return m.conv2(x) + one

    second = prepared(block(swapped), image(*X))
    assert reads(second, the_addition(second).name) == ["conv2", "conv1_quantizer"]


def test_preactivation_with_inplace_relu_on_the_skip() -> None:
    """The in-place ReLU changes the skip too: the skip is its result, which the first convolution reads."""
    model = preactivation_net()
    gm = prepared(model, image(2, 3, 16, 16))
    assert reads(gm, "_1_add") == ["_1_conv2", "_1_relu_quantizer"]
    assert reads(gm, "_1_conv1")[0] == "_1_relu_quantizer"
    assert reads(gm, "_2_add") == ["_2_conv2", "_2_relu_quantizer"]
    same_numbers(gm, model, image(2, 3, 16, 16))


def test_preactivation_sums_get_quantizers_of_their_own() -> None:
    """With BatchNorm and ReLU between, nobody else quantizes the sum that the next block's skip is."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.conv2(torch.relu(m.conv1(torch.relu(m.norm1(x)))))
        return x + m.conv4(torch.relu(m.conv3(torch.relu(m.norm2(x)))))

    parts = {
        "stem": conv(),
        "conv3": conv(),
        "conv4": conv(),
        "norm1": nn.BatchNorm2d(16),
        "norm2": nn.BatchNorm2d(16),
    }
    model = block(forward, **parts)
    gm = prepared(model, image(*X))
    assert reads(gm, "add") == ["stem_quantizer", "conv2"]
    assert reads(gm, "add_1") == ["add_quantizer", "conv4"]
    assert reads(gm, "norm1")[0] == "stem"  # reads the float sum: BatchNorm is not quantized
    assert decided(gm, "add_1") == {0: "int8 per-tensor mse R23"}
    same_numbers(gm, model, image(*X))


def test_a_skip_that_a_convolution_reads_is_shared() -> None:
    """Here the block's first convolution reads the sum itself."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        skip = torch.relu(x) * 2
        return skip + m.conv2(torch.relu(m.conv1(skip)))

    model = block(forward)
    gm = prepared(model, image(*X))
    assert reads(gm, the_addition(gm).name) == ["mul_quantizer", "conv2"]
    assert decided(gm, the_addition(gm).name) == {0: "int8 per-tensor mse R24"}


def test_two_additions_with_one_skip_share_its_quantizer() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        skip = x * 2
        return (m.conv1(skip.sigmoid()) + skip) * (m.conv2(skip.tanh()) + skip)

    gm = prepared(block(forward), image(*X))
    first, second = of_kind(gm, "add")
    assert reads(gm, first.name) == ["conv1", "mul_quantizer"]
    assert reads(gm, second.name) == ["conv2", "mul_quantizer"]
    assert decided(gm, first.name) == {1: "int8 per-tensor mse R23"}
    assert decided(gm, second.name) == {1: "int8 per-tensor mse R24"}
    check_pass(ResidualAdd(), before("residual-add", block(forward), image(*X)))


def test_nested_additions() -> None:
    """A residual addition inside the branch of another one."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        inner = torch.relu(x)
        inner = inner + m.conv1(torch.relu(m.down(inner)))
        return x + m.conv2(torch.relu(inner))

    gm = prepared(block(forward), image(*X))
    assert reads(gm, "add") == ["relu_quantizer", "conv1"]
    assert reads(gm, "add_1") == ["x_quantizer", "conv2"]
    assert decided(gm, "add") == {0: "int8 per-tensor mse R24"}
    assert decided(gm, "add_1") == {0: "int8 per-tensor mse R23"}


def test_chained_additions() -> None:
    """conv1(x) + conv2(x) + x: no convolution takes the second addition along, which reads x as it is stored."""
    gm = prepared(block(lambda m, x: m.conv1(x) + m.conv2(x) + x), image(*X))
    assert reads(gm, "add") == ["conv1_quantizer", "conv2"]
    assert reads(gm, "add_1") == ["add", "x_quantizer"]
    assert decided(gm, "add_1") == {1: "int8 per-tensor mse R29"}
    assert notes(gm) == []
    # The other way round both fuse: the inner sum is the skip of the outer addition.
    gm = prepared(block(lambda m, x: m.conv1(x) + (m.conv2(x) + x)), image(*X))
    assert reads(gm, "add") == ["conv2", "x_quantizer"]
    assert reads(gm, "add_1") == ["conv1", "add_quantizer"]
    assert notes(gm) == []


def test_a_skip_read_by_a_squeeze_and_excite_branch() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv1(x)
        gate = torch.sigmoid(m.down(y.mean((2, 3), keepdim=True)))
        return x + m.conv2(y * gate)

    gm = prepared(block(forward), image(*X))
    assert reads(gm, the_addition(gm).name) == ["x_quantizer", "conv2"]


def test_stochastic_depth_in_eval_is_no_obstacle() -> None:
    torchvision_model("resnet18")  # declares torchvision's operators where they are not compiled
    from torchvision.ops import StochasticDepth

    model = block(lambda m, x: m.drop(m.conv2(torch.relu(m.conv1(x)))) + x, drop=StochasticDepth(0.5, "row"))
    gm = prepared(model, image(*X))
    assert reads(gm, the_addition(gm).name) == ["conv2", "x_quantizer"]
    same_numbers(gm, model, image(*X))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_ranks_and_transposed_convolutions(dims: int) -> None:
    plain = getattr(nn, f"Conv{dims}d")(16, 16, 3, padding=1)
    transposed = getattr(nn, f"ConvTranspose{dims}d")(16, 16, 3, padding=1)
    shape = (2, 16, *[8] * dims)
    model = seeded(lambda: Lambda(lambda m, x: m.b(torch.relu(m.a(x))) + x, a=plain, b=transposed))
    gm = prepared(model, image(*shape))
    assert reads(gm, the_addition(gm).name) == ["b", "x_quantizer"]


# What a recipe says.


def residual() -> nn.Module:
    return block(lambda m, x: m.conv2(torch.relu(m.conv1(x))) + x)


def test_the_convolution_excluded_by_recipe() -> None:
    rule, text = why_not(residual(), image(*X), recipe=Recipe([Rule("conv2", None)]))
    assert (rule, text) == ("R23", "its convolution conv2 stays float")
    half = Recipe([Rule("conv2", EdgeSpecs(weight=None))])
    assert why_not(residual(), image(*X), recipe=half)[1] == "its convolution conv2 stays float"


def test_the_first_convolution_excluded_leaves_the_skip_quantized() -> None:
    gm = prepared(residual(), image(*X), recipe=Recipe([Rule("conv1", None)]))
    assert reads(gm, the_addition(gm).name) == ["conv2", "x_quantizer"]
    assert reads(gm, "conv1")[0] == "x"
    assert decided(gm, the_addition(gm).name) == {1: "int8 per-tensor mse R23"}


def test_the_downsample_convolution_excluded() -> None:
    model = block(lambda m, x: m.conv2(torch.relu(m.conv1(x))) + m.down(x))
    gm = prepared(model, image(*X), recipe=Recipe([Rule("down", None)]))
    assert reads(gm, the_addition(gm).name) == ["conv2", "down_quantizer"]
    assert reads(gm, "down")[0] == "x"


def test_a_convolution_whose_output_a_recipe_quantizes() -> None:
    """Then the convolution and the addition are apart already."""
    gm = prepared(residual(), image(*X), recipe=Recipe([Rule("conv2", EdgeSpecs(output=QSpec()))]))
    assert reads(gm, the_addition(gm).name) == ["conv2_quantizer", "x"]
    (note,) = notes(gm)
    assert (note.rule, note.text) == (
        "R23",
        "this addition stays float: the output of its convolution conv2 has a quantizer of its own",
    )


def test_the_addition_excluded_by_recipe() -> None:
    recipe = Recipe([Rule("op:add", None, "sums hurt here")])
    assert why_not(residual(), image(*X), recipe=recipe) == ("R23", "sums hurt here")


def test_the_skip_calibrated_by_recipe() -> None:
    """A bare spec changes how the skip is quantized, and not which edge."""
    model = block(lambda m, x: m.conv2(torch.relu(m.conv1(x))) + m.down(x))
    gm = prepared(model, image(*X), recipe=Recipe([Rule("op:add", QSpec(method="entropy"))]))
    assert reads(gm, the_addition(gm).name) == ["conv2", "down_quantizer"]
    assert decided(gm, the_addition(gm).name) == {1: "int8 per-tensor entropy R23"}


def test_both_edges_by_recipe() -> None:
    """Edges that a recipe names are quantized even where the rule is against it; a note says so."""
    gm = prepared(residual(), image(*X), recipe=Recipe([Rule("op:add", EdgeSpecs(input=QSpec()))]))
    assert reads(gm, the_addition(gm).name) == ["conv2_quantizer", "x_quantizer"]
    assert [(n.rule, n.node) for n in notes(gm, "advice")] == [("R23", "add")]
    assert notes(gm, "advice")[0].text.startswith("both its inputs are quantized")


def test_a_target_without_residuals() -> None:
    target = dataclasses.replace(Target.load("tensorrt"), residual=Residual("none"))
    gm = prepared(residual(), image(*X), target=target)
    assert reads(gm, the_addition(gm).name) == ["conv2", "x"]
    assert notes(gm) == []


# The search.


def chain(length: int) -> nn.Module:
    """Residual blocks in a row, a long skip from the input at each."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = x
        for _ in range(length):
            y = m.conv1(torch.relu(y)) + y
            y = torch.relu(y) + x
        return y

    return seeded(lambda: Lambda(forward, conv1=conv(4, 4, 1)))


def test_sources_are_input_sets() -> None:
    model = seeded(
        lambda: Lambda2(lambda m, x, y: (m.c(x) + y, m.c(x), m.w * 2), c=conv(), w=nn.Parameter(torch.ones(1)))
    )
    gm = before("residual-add", model, image(*X), image(*X))
    bits = sources(gm.graph)
    assert bits[the_addition(gm)] == 3
    assert bits[node(gm, "c")] == 1
    assert bits[node(gm, "mul")] == 0


def test_longest_ways() -> None:
    gm = before("residual-add", basic_net(), image(2, 3, 16, 16))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    target = state(gm).target

    def find(a: str, b: str) -> object:
        return longest_ways(node(gm, a), node(gm, b), target, order)

    assert find("blocks_1_bn2", "blocks_1_downsample_1") == ((2, 3), (1, 1))
    assert find("blocks_1_downsample_1", "blocks_1_bn2") == ((1, 1), (2, 3))
    assert find("blocks_0_bn2", "stem_2") == ((2, 3), (0, 0))
    assert find("stem_0_weight", "stem_2") is None


def test_work_grows_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long skips from one input to everywhere: the common ancestor is known without walking back to it."""
    visits = 0

    def counted(tensor: fx.Node) -> int:
        nonlocal visits
        visits += 1
        return real(tensor)

    real = room.kind_name
    monkeypatch.setattr(room, "kind_name", counted)
    counts = []
    for length in (20, 40):
        gm = before("residual-add", chain(length), image(1, 4, 2, 2))
        visits = 0
        ResidualAdd()(gm, inplace=True)
        counts.append(visits / len(gm.graph.nodes))
    assert counts[1] < 1.2 * counts[0]


def test_the_pass_needs_annotations() -> None:
    gm = before("annotate", residual(), image(*X))
    with pytest.raises(PassError, match="needs a graph that is annotated"):
        ResidualAdd()(gm)


def test_blocks_in_torchvision() -> None:
    gm = prepared(torchvision_model("resnet50"), image(1, 3, 64, 64))
    adds = of_kind(gm, "add")
    assert len(adds) == 16
    own = [a.name for a in adds if "R23" in str(decided(gm, a.name))]
    assert own == [f"layer{k}_0_add" for k in (1, 2, 3, 4)]
    for add in adds:
        (edge,) = decided(gm, add.name)
        assert [name.endswith("_quantizer") for name in reads(gm, add.name)] == [i == edge for i in (0, 1)]
