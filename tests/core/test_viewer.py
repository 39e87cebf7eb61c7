"""Pictures of graphs: what is in them, that they do not vary, and that users' names stay text."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from golden import check_golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from toys import basic_net, image, seeded

import fxq
from fxq.drawing import View
from fxq.drawing.depiction import depict
from fxq.drawing.layout import Placed, place
from fxq.drawing.plans import opened_by_default, opened_to, plan
from fxq.drawing.sketch import Item, Sketch, nest
from fxq.errors import FxqError

ROOT = Path(__file__).resolve().parent.parent.parent


class Net(nn.Module):
    """One residual block behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)


def quantized(model: nn.Module, *shape: int) -> fx.GraphModule:
    return fxq.quantize(model.eval(), [image(*shape)], progress=False)


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    return quantized(seeded(Net), 2, 3, 8, 8)


def items(gm: fx.GraphModule) -> dict[str, Item]:
    return {item.key: item for item in depict(gm).items}


def payload(html: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" class="fxq-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, object] = json.loads(found[1])
    return data


def still(html: str) -> str:
    found = re.search(r"base64,([^\"]+)", html)
    assert found is not None
    return base64.b64decode(found[1]).decode()


def seen(svg: str) -> str:
    """The texts of an SVG that are not inside something hidden."""
    texts: list[str] = []

    def walk(element: ET.Element) -> None:
        if element.get("display") != "none":
            texts.extend([element.text] if element.tag.endswith("text") and element.text else [])
            for child in element:
                walk(child)

    walk(ET.fromstring(svg))
    return " | ".join(texts)


def test_golden_svg(net: fx.GraphModule) -> None:
    svg = re.sub(r"source: \S*?(\w+\.py):\d+", r"source: \1", fxq.view(net).to_svg())
    check_golden("core/view_residual_block", svg.replace("><", ">\n<"))


def test_the_picture_is_the_same_every_time(net: fx.GraphModule) -> None:
    first, second = fxq.view(net), fxq.view(net)
    assert first._repr_mimebundle_() == second._repr_mimebundle_()
    assert first.to_html() == second.to_html()


def test_an_operation_tells_what_placement_knows(net: fx.GraphModule) -> None:
    shown = items(net)
    conv, add = shown["block_conv1"], shown["block_add"]
    facts = dict(conv.facts)
    assert (conv.style, conv.label, conv.path) == ("int8", "conv2d 3\u00d73", ("block",))
    assert facts["shape"] == "[2, 8, 8, 8]"
    assert facts["module"] == "block.conv1 (Conv2d)"
    assert facts["source"].startswith("tests/core/test_viewer.py:") or "test_viewer.py:" in facts["source"]
    assert "self.conv1" in facts["code"]
    scale = float(net.get_buffer("quantizers.relu.scale"))
    assert f"scale {scale:.4g}" in facts["input relu"]
    assert "R20" in facts["input relu"]
    assert "8 scales up to" in facts["weight block_conv1_weight"]
    assert add.label == "residual add"
    assert add.related == ("relu_quantize",)


def test_quantizers_are_marks_behind_their_tensor_and_weights_have_none(net: fx.GraphModule) -> None:
    shown = items(net)
    marks = {key: item for key, item in shown.items() if item.style == "quantizer"}
    assert list(marks) == ["x_quantize", "relu_quantize", "relu_1_quantize", "mean_quantize"]
    assert shown["block_conv1"].inputs == ("relu_quantize",)
    assert shown["block_add"].inputs == ("block_conv2", "relu_quantize")
    facts = dict(marks["relu_quantize"].facts)
    assert facts["scale"] == f"{float(net.get_buffer('quantizers.relu.scale')):.4g}"
    assert facts["read by block_add"].startswith("skip: R24")
    assert not any("weight" in key for key in shown)


def test_an_observer_says_that_it_has_no_scale() -> None:
    shown = items(fxq.prepare(seeded(Net), image(2, 3, 8, 8)))
    assert shown["relu_quantizer"].style == "unsolved"
    assert "fxq.calibrate" in dict(shown["relu_quantizer"].facts)["observes"]


def test_tied_quantizers_bear_one_letter_and_know_each_other() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.relu(x), torch.sigmoid(x) * 5
            return self.a(left) * self.b(right) + self.c(torch.cat([left, right], 1))

    for gm, suffix in (
        (fxq.prepare(seeded(Tied), image(2, 8, 8, 8)), "quantizer"),
        (quantized(seeded(Tied), 2, 8, 8, 8), "quantize"),
    ):
        shown = items(gm)
        group = [f"{name}_{suffix}" for name in ("relu", "mul", "cat")]
        assert [shown[key].label for key in group] == ["int8 A"] * 3
        assert set(shown[group[0]].related) == set(group[1:])
        assert group[1] in dict(shown[group[0]].facts)["tie"]


def test_half_precision_and_what_is_no_tensor_look_unlike_float() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x.half()).float().reshape(x.shape[0], -1)

    styles = {item.label: item.style for item in depict(fxq.trace(Half(), image(2, 3, 4, 4))).items}
    assert styles["relu" if "relu" in styles else "ReLU"] == "half"
    assert "plain" in styles.values()
    assert styles["output"] == "io"


def test_closed_boxes_hide_what_they_hold_and_open_ones_show_it(net: fx.GraphModule) -> None:
    closed, opened = fxq.view(net, depth=0), fxq.view(net, depth=1)
    assert "residual add" not in seen(closed.to_svg())
    assert "+ block | Block \u00b7 5 nodes" in seen(closed.to_svg())
    assert "residual add" in seen(opened.to_svg())
    assert "\u2212 block | Block" in seen(opened.to_svg())
    # The page holds both, and shows what the SVG shows.
    for one in (closed, opened):
        assert "residual add" in still(one.to_html())
        assert seen(still(one.to_html())) == seen(one.to_svg())


def test_the_same_place_for_a_box_whether_its_neighbours_are_open_or_not() -> None:
    """Opening pushes aside and down, and changes no order; the trunk stays straight."""
    root = nest(depict(fxq.trace(basic_net(), image(2, 3, 16, 16))))
    plans = plan(root)
    levels = [place(plans, opened_to(root, depth)) for depth in range(3)]
    assert levels[0].height < levels[1].height < levels[2].height
    for placed in levels:
        ys = [spot.y for spot, cell in zip(placed.spots, placed.plan.cells, strict=True) if cell.kind != "bend"]
        assert ys == sorted(ys)
        assert {spot.x for spot in placed.spots} == {0.0}


def test_opened_by_default_keeps_to_what_can_be_taken_in() -> None:
    root = nest(depict(fxq.trace(basic_net(), image(2, 3, 16, 16))))
    everything = sum(1 for _ in root.items)
    assert opened_by_default(root, everything) == {box.key for box in root.boxes if box.key}
    assert opened_by_default(root, len(root.children)) == frozenset()


def test_a_module_called_twice_has_two_boxes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.part(torch.sigmoid(self.part(x)))

    root = nest(depict(fxq.trace(Twice(), image(2, 4))))
    assert [box.title for box in root.boxes] == ["Twice", "part", "part"]
    assert fxq.view(fxq.trace(Twice(), image(2, 4))).to_svg()


def hostile() -> Sketch:
    evil = "</script><img src=x onerror=alert(1)>&\"'"
    return Sketch(
        evil, (Item("a", evil, evil, facts=((evil, evil),), path=(evil, evil)), Item("b", "b", inputs=("a",)))
    )


def test_what_comes_from_users_code_is_escaped() -> None:
    shown = View(hostile(), depth=9)
    for html in (shown.to_html(), shown._repr_mimebundle_()["text/html"]):
        assert "<img src=x" not in html
        assert html.count("</script>") == 2  # of the data and of the script
    for svg in (shown.to_svg(), still(shown.to_html())):
        assert "<img" not in svg
        ET.fromstring(svg)
    assert hostile().title in payload(shown.to_html())["words"]  # type: ignore[operator]


def test_a_graph_of_two_thousand_nodes_without_modules() -> None:
    graph = fx.Graph()
    last = skip = graph.placeholder("x")
    for index in range(2000):
        last = graph.call_function(torch.relu, (last,))
        if index % 7 == 6:
            last = skip = graph.call_function(torch.add, (last, skip))
    graph.output(last)
    gm = fx.GraphModule(nn.Module(), graph)
    shown = fxq.view(gm)
    assert len(shown.sketch.items) == 2287
    root = nest(shown.sketch)
    assert all(len(box.children) <= 90 for box in root.boxes)
    everything = shown.to_html()
    assert everything.count("fxq-data") >= 1
    assert ET.fromstring(fxq.view(gm, depth=99).to_svg()).tag.endswith("svg")


def test_a_graph_module_that_is_not_from_fxq() -> None:
    shown = fxq.view(fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU())))
    assert "Linear" in seen(shown.to_svg())


def test_what_cannot_be_drawn(net: fx.GraphModule) -> None:
    with pytest.raises(FxqError, match="cannot draw a Linear"):
        fxq.view(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(FxqError, match="depth is -1"):
        fxq.view(net, depth=-1)


def test_html_is_written_whole_and_needs_nothing_from_anywhere(net: fx.GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "new" / "graph.html"
    assert fxq.view(net).to_html(path) == path.read_text(encoding="utf-8")
    page = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|src=\"(?!data:)|@import|url\(", page)


def test_the_notebook_gets_html_svg_and_text(net: fx.GraphModule) -> None:
    bundle = fxq.view(net)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/svg+xml", "text/plain"}
    assert bundle["text/plain"] == "<View of Net: 15 nodes in 1 modules>"
    assert bundle["image/svg+xml"] == fxq.view(net).to_svg()


def test_the_script_is_valid() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; it checks the script's syntax")
    script = ROOT / "fxq" / "drawing" / "view.js"
    done = subprocess.run([node, "--check", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Fork(nn.Module):
    """Branches of unlike lengths inside branches, and a tensor that passes all of them."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.left = Fork(depth - 1) if depth else nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(torch.sigmoid(x)), self.right(x)
        return torch.cat([a + x, b, x], 1)[:, :8] * torch.tanh(a)


FORK = nest(depict(fxq.trace(Fork(2), image(2, 8))))
FORK_PLANS = plan(FORK)


@given(st.sets(st.sampled_from([box.key for box in FORK.boxes if box.key])))
def test_nothing_overlaps_whatever_is_open(opened: set[str]) -> None:
    def check(placed: Placed) -> None:
        spots = [
            (s.x - s.left, s.x + s.right, s.y, s.y + s.height)
            for s, cell in zip(placed.spots, placed.plan.cells, strict=True)
            if cell.kind in ("item", "box")
        ]
        for index, (left, right, top, bottom) in enumerate(spots):
            assert left >= -placed.left
            assert right <= placed.right
            assert top >= 0
            assert bottom <= placed.height
            for other in spots[:index]:
                assert right < other[0] or other[1] < left or bottom < other[2] or other[3] < top
        for spot in placed.spots:
            if spot.inside is not None:
                check(spot.inside)

    check(place(FORK_PLANS, opened))
