"""Pictures of what quantization does: matplotlib figures, made without pyplot, so nothing global changes.

Colours are from Okabe and Ito's palette, which colour-blind people can tell apart; markers, line styles and
hatches say the same again, so that the pictures read in black and white.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, fx

from .errors import FxqError
from .graph import attribute, constant, edge_annotations, origin
from .optional import require
from .qdq import DEQUANTIZE
from .verify import is_dequantized, quantizer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "LINES",
    "ORANGE",
    "VERMILION",
    "Bar",
    "bars_picture",
    "curves_picture",
    "methods_picture",
    "new_figure",
    "weight_ranges",
]

BLUE: Final = "#0072B2"
VERMILION: Final = "#D55E00"
GREEN: Final = "#009E73"
ORANGE: Final = "#E69F00"
GREY: Final = "#999999"
LINES: Final = ((BLUE, "-"), (VERMILION, "--"), (GREEN, "-."), (ORANGE, ":"))
"""Colour and line style of the first, second … curve of a picture."""
_DPI: Final = 80
_CEILING: Final = 80.0  # dB; where nothing differs, a bar has to end somewhere


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, and its axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", purpose="drawing pictures")
    figure = _picture_class()(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


@cache
def _picture_class() -> type[Figure]:
    """matplotlib's figure, which shows itself at the end of a notebook's cell; pyplot's would do so alone."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png", dpi=_DPI)
            return data.getvalue()

    return Picture


def curves_picture(series: Mapping[str, Sequence[float]], named: Mapping[int, str], *, title: str) -> Figure:
    """SQNR along the graph.

    Args:
        series: Curve's label to its values in dB, one per tensor in graph order.
        named: Places that get a name under the first curve.
        title: What stands above.
    """
    figure, axes = new_figure(10, 4)
    curves = {label: [min(value, _CEILING) for value in values] for label, values in series.items()}
    for (label, values), (colour, line) in zip(curves.items(), LINES, strict=False):
        marker = "." if line == "-" else "x"
        axes.plot(values, color=colour, linestyle=line, linewidth=1, marker=marker, label=label)
    first = next(iter(curves.values()))
    for level, (place, name) in enumerate(sorted(named.items())):
        axes.annotate(
            name, (place, first[place]), xytext=(place, 0.02 + 0.06 * level), textcoords=axes.get_xaxis_transform(),
            ha="center", fontsize=8, arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8},
        )  # fmt: skip
    axes.set_xlabel("tensor, in graph order")
    axes.set_ylabel("SQNR [dB]")
    axes.set_title(title)
    axes.margins(y=0.45)
    axes.legend(loc="upper right")
    return figure


class Bar(NamedTuple):
    """One quantizer in :func:`bars_picture`: its tensor, whether that is a weight, and two SQNR in dB."""

    name: str
    weight: bool
    alone: float
    cumulative: float


def bars_picture(bars: Sequence[Bar], *, title: str) -> Figure:
    """Quantizers, the first on top: a bar for what each does alone, a diamond for it and all before it."""
    rows = bars[::-1]
    figure, axes = new_figure(8, 1.5 + 0.24 * len(rows))
    for weight, colour, hatch in ((False, BLUE, ""), (True, ORANGE, "//")):
        places = [i for i, row in enumerate(rows) if row.weight is weight]
        values = [min(rows[i].alone, _CEILING) for i in places]
        label = "a weight alone" if weight else "an activation alone"
        axes.barh(places, values, color=colour, hatch=hatch, edgecolor="white", label=label)
    together = [min(row.cumulative, _CEILING) for row in rows]
    axes.plot(together, range(len(rows)), "D", color="black", markersize=4, label="with all before it")
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.set_xlabel("SQNR of the model's output [dB]: the shorter, the worse")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def methods_picture(scores: Mapping[str, float], *, reference: float | None, ylabel: str) -> Figure:
    """A point for each calibration method, and a line for the float model."""
    figure, axes = new_figure(1.6 + 1.0 * len(scores), 4)
    best = max(scores.values(), default=0.0)
    for place, value in enumerate(scores.values()):
        top = value == best
        axes.plot(place, value, "D" if top else "o", color=GREEN if top else BLUE, markersize=9 if top else 7)
        axes.annotate(f"{value:.5g}", (place, value), xytext=(0, 9), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(scores)), list(scores), rotation=20)
    if reference is not None:
        axes.axhline(reference, color="black", linestyle="--", label=f"float {reference:.5g}")
        axes.legend(loc="best")
    axes.margins(x=0.12, y=0.25)
    axes.grid(axis="y", color="0.9")
    axes.set_ylabel(ylabel)
    axes.set_title("the same statistics, solved by each method")
    return figure


def weight_ranges(gm: fx.GraphModule, layer: str) -> Figure:
    """The largest magnitude of each output channel of a layer's weight, and what its scale can hold.

    A picture to see why weights are quantized per channel (R32): one scale for all channels would have the steps
    of the widest one, which the dashed line shows.

    Args:
        gm: A prepared or converted graph.
        layer: The weighted node's name (``layer1_0_conv1``) or its module path (``layer1.0.conv1``).

    Returns:
        A matplotlib figure.

    Raises:
        FxqError: There is no such layer with a quantized weight; the message names those that there are.
        MissingDependencyError: matplotlib is not installed.
    """
    found = {node: read for node in gm.graph.nodes if (read := _quantized_weight(node)) is not None}
    node = next((n for n in found if layer in (n.name, origin(n).module_path)), None)
    if node is None:
        names = ", ".join(origin(n).module_path or n.name for n in found)
        raise FxqError(f"no layer with a quantized weight is called {layer!r}", hint=f"there are {names or 'none'}")
    reach, scale = _channel_reach(gm, found[node])
    figure, axes = new_figure(8, 4)
    order = torch.argsort(reach, descending=True)
    axes.bar(range(len(reach)), reach[order].tolist(), color=BLUE, width=1.0, edgecolor="white", linewidth=0.3)
    if scale is not None and scale.numel():
        held = (scale.reshape(-1) * _levels(found[node])).expand(len(reach))[order]
        axes.step(range(len(reach)), held.tolist(), where="mid", color="black", label="the scale reaches")
    axes.axhline(float(reach.max()), color=VERMILION, linestyle="--", label="one scale for all would reach")
    used = float((reach.clamp(min=0) / reach.max().clamp(min=1e-30)).median())
    axes.set_title(
        f"{origin(node).module_path or node.name}: the median channel uses {used:.0%} of the widest one's range"
    )
    axes.set_xlabel("output channel, widest first")
    axes.set_ylabel("largest magnitude")
    axes.legend()
    return figure


def _quantized_weight(node: fx.Node) -> fx.Node | None:
    """What `node` reads its quantized weight from; None if it has none."""
    for edge, annotation in edge_annotations(node).items():
        if not isinstance(edge, int) or annotation.spec is None or edge >= len(node.args):
            continue
        read = node.args[edge]
        if isinstance(read, fx.Node) and _stored(read) is not None:
            return read
    return None


def _stored(read: fx.Node) -> fx.Node | None:
    """The ``get_attr`` behind a quantizer or a dequantize; None if a computed tensor is there."""
    if quantizer_of(read) is None and not is_dequantized(read):
        return None
    real: Any = read if quantizer_of(read) is not None or read.target is DEQUANTIZE else read.args[0]
    source = real.args[0]
    return source if isinstance(source, fx.Node) and constant(source) is not None else None


def _channel_reach(gm: fx.GraphModule, read: fx.Node) -> tuple[Tensor, Tensor | None]:
    """The largest magnitude of each channel, float32 [C], and the scale, [] or [C]; None while unknown."""
    source = _stored(read)
    assert source is not None
    weight = constant(source)
    assert weight is not None
    quantizer = quantizer_of(read)
    if quantizer is not None:
        axis, scale = quantizer.axis, quantizer.scale if quantizer.solved else None
        values = weight.detach().float()
    else:
        real: Any = read if read.target is DEQUANTIZE else read.args[0]
        scale, axis = attribute(gm, str(real.args[1].target)), real.args[3]
        values = DEQUANTIZE(weight, scale, attribute(gm, str(real.args[2].target)), axis).float()
    rows = values.movedim(axis or 0, 0).flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    return rows.abs().amax(dim=1).cpu(), None if scale is None else scale.detach().float().cpu()


def _levels(read: fx.Node) -> float:
    """The largest quantized value that the reader's spec allows."""
    for user in read.users:
        for edge, annotation in edge_annotations(user).items():
            if isinstance(edge, int) and annotation.spec is not None and user.args[edge] is read:
                return float(annotation.spec.qdtype.qmax)
    return 1.0
