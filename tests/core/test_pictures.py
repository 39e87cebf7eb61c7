"""Pictures: what stands in them, not how their pixels look."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from toys import basic_net, image

import fxq
from fxq.errors import FxqError, MissingDependencyError


@pytest.fixture(scope="module")
def graphs() -> tuple[torch.nn.Module, torch.fx.GraphModule, torch.fx.GraphModule]:
    model, x = basic_net(), image(4, 3, 16, 16)
    prepared = fxq.prepare(model, x)
    fxq.calibrate(prepared, [x], progress=False)
    return model, prepared, fxq.convert(prepared)


def words(figure: Figure) -> str:
    """All text of a figure that was drawn."""
    from matplotlib.text import Text

    figure.canvas.draw()
    return "\n".join(found.get_text() for found in figure.findobj(Text))


def test_comparison(graphs: tuple, tmp_path: Path) -> None:
    model, _, quantized = graphs
    found = fxq.compare(model, quantized, image(4, 3, 16, 16))
    figure = found.plot()
    text = words(figure)
    assert all(row.node in text for row in found.drops(5))
    (line,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(found.rows)]
    assert list(line.get_ydata()) == pytest.approx([min(row.sqnr, 80) for row in found.rows])
    figure.savefig(tmp_path / "comparison.png")


def test_sensitivity(graphs: tuple) -> None:
    _, prepared, _ = graphs
    found = fxq.sensitivity(prepared, image(4, 3, 16, 16), progress=False)
    figure = found.plot(6)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [row.tensor for row in found.worst(6)][::-1]
    hatched = [bar for bar in figure.axes[0].patches if bar.get_hatch()]
    assert len(hatched) == sum(row.weight for row in found.worst(6))


@pytest.mark.parametrize("form", [1, 2])
def test_weight_ranges_are_those_of_the_weight(graphs: tuple, form: int) -> None:
    figure = fxq.pictures.weight_ranges(graphs[form], "blocks.0.conv1")
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == sorted(heights, reverse=True)
    weight = graphs[1].get_parameter("blocks.0.conv1.weight")
    reach = weight.detach().abs().amax(dim=(1, 2, 3)).sort(descending=True).values
    assert heights == pytest.approx(reach.tolist(), rel=0.01)
    assert "scale reaches" in words(figure)


def test_weight_ranges_declined(graphs: tuple) -> None:
    with pytest.raises(FxqError, match=r"blocks\.0\.conv1"):
        fxq.pictures.weight_ranges(graphs[1], "nowhere")


def test_methods() -> None:
    scores = fxq.pictures.methods_picture({"max": 81.2, "mse": 81.4}, reference=81.5, ylabel="top-1 [%]")
    text = words(scores)
    assert all(word in text for word in ("max", "mse", "81.4", "float 81.5", "top-1 [%]"))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        fxq.pictures.new_figure(1, 1)


def test_a_picture_shows_itself_in_a_notebook() -> None:
    figure, axes = fxq.pictures.new_figure(2, 1)
    axes.plot([1, 2])
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
