"""What a notebook shows of a graph that is left at the end of a cell.

A graph is torch's GraphModule, so it cannot bring a ``_repr_html_`` of its own without a change to torch's class.
Instead IPython, where fxq is imported under it, is told how to show a GraphModule from fxq; for any other the answer is
None, by which IPython goes on as if nobody had asked.
"""

from __future__ import annotations

import sys

from torch import fx

from . import html
from .graph import has_state, origin
from .reports import report

__all__ = ["graph_html", "register"]


def graph_html(gm: fx.GraphModule) -> str | None:
    """A summary of a graph from fxq; None for any other GraphModule.

    Args:
        gm: What is to be shown.
    """
    if not has_state(gm):
        return None
    found = report(gm)
    model = next((o.module_types[0].__name__ for o in map(origin, gm.graph.nodes) if o.module_types), "graph")
    nodes = f"{len(gm.graph.nodes)} nodes. fxq.view(gm) draws them, fxq.report(gm) says what is quantized and why."
    title = f"{model}: {found.stage} for {found.target}"
    return html.card(title, [*found.summary_html(), html.element("p", nodes), *found.notes_html()])


def register() -> None:
    """Tell a running IPython; without one, do nothing."""
    if "IPython" not in sys.modules:
        return
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None and shell.display_formatter is not None:
        shell.display_formatter.formatters["text/html"].for_type(fx.GraphModule, graph_html)
