"""What fxq's objects show at the end of a cell: the facts, escaped, and nothing about what is not fxq's."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from IPython.core.interactiveshell import InteractiveShell
from torch import fx, nn
from toys import basic_net, image

import fxq
from fxq import html
from fxq.calibration_report import CalibrationReport, CalibrationRow
from fxq.findings import Finding, Findings
from fxq.graph import Note, state, update_state
from fxq.notebook_display import graph_html

EVIL = "</td><script>alert(1)</script>&\"'"


class Reader(HTMLParser):
    """The texts of a page, and its tags, which have to be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def prepared() -> fx.GraphModule:
    gm = fxq.prepare(basic_net(), image(2, 3, 16, 16))
    fxq.calibrate(gm, [image(2, 3, 16, 16)], progress=False)
    return gm


def test_blocks_escape_everything_but_html() -> None:
    made = html.card(EVIL, [html.table([EVIL], [[EVIL]]), html.details(EVIL, EVIL), html.share(1, 2, EVIL)])
    read = Reader(made)
    assert "script" not in read.tags
    assert read.text.count(EVIL) == 6
    assert read.tags.count("style") == 1
    assert html.as_html(html.Html("<b>")) == "<b>"
    assert html.element("a", "x", title=EVIL).count('"') == 2


def test_data_cannot_end_its_element() -> None:
    made = html.json_script({"x": "</script>\u2028&"})
    assert made.count("</script>") == 1
    assert "\\u003c/script\\u003e\\u2028\\u0026" in made


def test_a_report(prepared: fx.GraphModule) -> None:
    report = fxq.report(prepared)
    read = Reader(report._repr_html_())
    for row in report.rows:
        assert row.node in read.texts
    assert f"{report.totals.weighted_quantized} of {report.totals.weighted} weighted operations quantized" in read.text
    assert "R24" in read.text


def test_a_graph_shows_a_summary_and_no_wall(prepared: fx.GraphModule) -> None:
    shown = graph_html(prepared)
    assert shown is not None
    read = Reader(shown)
    assert "ResidualNet: calibrated for tensorrt" in read.text
    assert "residual skips quantized" in read.text
    assert "conv1_weight_quantizer" not in shown


def test_names_from_users_code_stay_text() -> None:
    gm = fxq.trace(basic_net(), image(2, 3, 16, 16))
    update_state(gm, notes=(*state(gm).notes, Note("x", "R1", EVIL, EVIL, EVIL)))
    finding = Finding("R14", "error", EVIL, EVIL, EVIL, EVIL, EVIL, EVIL)
    row = CalibrationRow(EVIL, EVIL, "max", 0.0, 1.0, (0.5,), 3, marks=(EVIL,))
    for page in (
        graph_html(gm) or "",
        fxq.report(gm)._repr_html_(),
        Findings((finding,))._repr_html_(),
        CalibrationReport((row,), 3)._repr_html_(),
    ):
        read = Reader(page)
        assert EVIL in read.text
        assert "script" not in read.tags


def test_calibration_says_what_to_look_at() -> None:
    rows = tuple(CalibrationRow(f"t{i}", "m", "mse", -1.0, 2.0, (0.25,), 4) for i in range(30))
    odd = CalibrationRow("odd", "m", "mse", -1.0, 2.0, (0.25, 0.5), 4, marks=("outlier",))
    read = Reader(CalibrationReport((*rows, odd), 4)._repr_html_())
    assert "31 tensors calibrated on 4 batches" in read.texts
    assert "to look at: odd (outlier)" in read.texts
    assert "details" in read.tags  # many rows are shown when asked for
    assert "details" not in Reader(CalibrationReport(rows[:3], 4)._repr_html_()).tags


def test_findings() -> None:
    found = Findings((Finding("R14", "error", "conv", "an integer operator"), Finding("R37", "advice", None, "thin")))
    read = Reader(found._repr_html_())
    assert "2 findings: 1 error, 1 advice" in read.texts
    assert {"conv", "an integer operator", "the file", "thin"} <= set(read.texts)
    assert "no findings" in Reader(Findings()._repr_html_()).texts


def test_passes_and_their_times() -> None:
    gm = fxq.trace(basic_net(), image(2, 3, 16, 16))
    manager = fxq.PassManager()
    manager.run(fxq.passes.PREPARE, gm)
    read = Reader(manager._repr_html_())
    assert [run.name for run in manager.log] == [t for t in read.texts if t in {r.name for r in manager.log}]
    result = fxq.passes.Functionalize()(gm)
    assert "retargeted" in Reader(result._repr_html_()).text
    assert "nothing changed" in Reader(fxq.passes.Functionalize()(result.graph_module)._repr_html_()).text


def test_ipython_shows_graphs_from_fxq_and_lets_others_be(prepared: fx.GraphModule) -> None:
    shell = InteractiveShell.instance()
    try:
        other = fx.symbolic_trace(nn.Linear(2, 2))
        before, _ = shell.display_formatter.format(other)
        fxq.notebook_display.register()
        after, _ = shell.display_formatter.format(other)
        shown, _ = shell.display_formatter.format(prepared)
    finally:
        InteractiveShell.clear_instance()
    assert set(before) == set(after) == {"text/plain"}
    assert shown["text/html"] == graph_html(prepared)
    assert not hasattr(fx.GraphModule, "_repr_html_")
    assert not hasattr(prepared, "_repr_html_")
