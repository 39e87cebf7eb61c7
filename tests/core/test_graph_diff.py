"""What changed between two graphs: in words, as text, as a picture, and pass by pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from toys import BasicBlock, image, seeded

import fxq
from fxq.bias_correction import CORRECTIONS
from fxq.drawing import diff
from fxq.errors import FxqError, PassError


class Net(nn.Module):
    """A block whose input has three readers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicBlock(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(torch.relu(x)).mean((2, 3))


@dataclass(frozen=True)
class SwapAdd(fxq.Pass):
    """Swap the addition's inputs, which changes nothing but who reads what."""

    name = "swap-add"

    def call(self, editor: fxq.Editor) -> None:
        for node in editor.graph.nodes:
            if node.name == "block_add":
                editor.retarget(node, node.target, tuple(reversed(node.args)))


@pytest.fixture(scope="module")
def steps() -> fxq.Steps:
    kept = fxq.Steps()
    fxq.PassManager(instruments=[kept]).run(fxq.passes.PREPARE, fxq.trace(seeded(Net), image(2, 8, 8, 8)))
    return kept


def by_name(steps: fxq.Steps, name: str) -> int:
    return next(i for i, step in enumerate(steps) if step.title.startswith(f"{name}:"))


def test_nothing_changed() -> None:
    gm = fxq.trace(seeded(Net), image(2, 8, 8, 8))
    found = fxq.diff(gm, gm)
    assert not found
    assert str(found) == found.summary() == "nothing changed"


def test_inserted_quantizers_are_added_and_their_readers_rewired(steps: fxq.Steps) -> None:
    found = steps.diff(by_name(steps, "insert-quantizers"))
    activations = [name for name in found.of("added") if "weight" not in name]
    assert activations == ["relu_quantizer", "block_relu_quantizer"]
    assert {"block_bn1", "block_bn2", "block_add"} == set(found.of("rewired"))
    assert found.of("removed") == found.of("changed") == ()
    items = {item.key: item for item in found.view().sketch.items}
    assert items["relu_quantizer"].change == "added"
    assert items["block_add"].change == "rewired"
    assert items["block_add"].inputs == ("block_bn2", "relu_quantizer")
    assert items["block_add"].old_inputs == ("relu",)
    assert "+%relu_quantizer = " in str(found)


def test_a_fused_layer_is_changed_and_what_it_took_in_is_drawn_where_it_was(steps: fxq.Steps) -> None:
    found = steps.diff(by_name(steps, "fuse-batch-norm"))
    assert {"block_conv1", "block_conv2"} <= set(found.of("removed"))
    assert {"block_bn1", "block_bn2"} == set(found.of("changed")) - {n for n in found.of("changed") if "weight" in n}
    keys = [item.key for item in found.view().sketch.items]
    assert keys.index("relu") < keys.index("block_conv1") < keys.index("block_bn1")
    ghost = found.view().sketch.items[keys.index("block_conv1")]
    assert (ghost.change, ghost.inputs, ghost.old_inputs, ghost.path) == ("removed", (), ("relu",), ("block",))
    svg = found.view(depth=2).to_svg()
    assert svg.count("stroke-dasharray") >= 4


def test_annotations_are_changes_that_the_panel_tells(steps: fxq.Steps) -> None:
    found = steps.diff(by_name(steps, "annotate"))
    assert set(found.of("changed")) == {"block_bn1", "block_bn2"}
    facts = next(item.facts for item in found.view().sketch.items if item.key == "block_bn1")
    assert "R20" in dict(facts)["changed, after"]
    assert dict(facts)["input relu"].startswith("to be int8 per-tensor")


def test_swapped_inputs_are_a_rewiring() -> None:
    before = fxq.trace(seeded(Net), image(2, 8, 8, 8))
    found = fxq.diff(before, SwapAdd()(before).graph_module)
    assert found.summary() == "1 rewired"
    (change,) = found.changes
    assert change.before != change.after


def test_other_values_are_a_change() -> None:
    """A bias that calibration corrects has the same line and other numbers."""
    prepared = fxq.prepare(seeded(Net), image(2, 8, 8, 8))
    fxq.calibrate(prepared, [image(2, 8, 8, 8)], progress=False)
    assert hasattr(prepared, CORRECTIONS)
    kept = fxq.Steps()
    fxq.PassManager(instruments=[kept]).run(fxq.passes.CONVERT, prepared)
    found = kept.diff(by_name(kept, "correct-biases"))
    assert set(found.of("changed")) == {"block_conv1_bias", "block_conv2_bias"}
    assert "other values: " in str(found)
    changed = {item.key for item in found.view().sketch.items if item.change == "changed"}
    assert changed == {"block_bn1", "block_bn2"}


def test_steps_keep_what_changed_and_share_their_tensors(steps: fxq.Steps) -> None:
    titles = [step.title.partition(":")[0] for step in steps]
    assert titles[0] == "before the first pass"
    assert "fuse-batch-norm" in titles
    assert "drop-identities" not in titles  # it had nothing to do
    annotated, inserted = steps[by_name(steps, "annotate")], steps[len(steps) - 1]
    a = annotated.graph_module.get_parameter("block.conv1.weight")
    assert a.data_ptr() == inserted.graph_module.get_parameter("block.conv1.weight").data_ptr()
    assert "quantizer" not in fxq.format_graph(annotated.graph_module)
    assert len(steps[1:3]) == 2
    with pytest.raises(PassError, match="no step 0"):
        steps.diff(0)


def test_a_new_run_begins_anew() -> None:
    kept = fxq.Steps()
    manager = fxq.PassManager(instruments=[kept])
    assert "has not run" in repr(kept)
    for _ in range(2):
        manager.run(fxq.Pipeline("swap", (SwapAdd(),)), fxq.trace(seeded(Net), image(2, 8, 8, 8)))
    assert [step.title for step in kept] == ["before the first pass", "swap-add: retargeted 1"]


def test_the_slider_is_a_page_with_a_picture_for_each_step(steps: fxq.Steps, tmp_path: Path) -> None:
    page = steps.to_html(tmp_path / "steps.html")
    assert (tmp_path / "steps.html").read_text(encoding="utf-8") == page
    assert page.count('class="fxq-still"') == len(steps)
    assert page.count("<script>") == 1
    assert steps._repr_mimebundle_()["text/plain"] == repr(steps)


def test_the_notebook_gets_html_svg_and_text(steps: fxq.Steps) -> None:
    found = steps.diff(1)
    bundle = found._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/svg+xml", "text/plain"}
    assert bundle["text/plain"] == str(found)
    assert re.search(r"<strong>.*(added|changed).*</strong>", bundle["text/html"])


def test_only_graphs_can_be_compared() -> None:
    with pytest.raises(FxqError, match="cannot compare a Linear"):
        diff(nn.Linear(1, 1), fx.symbolic_trace(nn.Linear(1, 1)))  # type: ignore[arg-type]
