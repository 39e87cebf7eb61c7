"""Pictures of graphs: what is shown, where, how it looks, and what may be opened and compared in them."""

from __future__ import annotations

from .graph_diff import diff
from .steps import Steps
from .viewer import View, view

__all__ = ["Steps", "View", "diff", "view"]
