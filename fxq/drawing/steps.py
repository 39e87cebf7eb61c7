"""A pipeline pass by pass: an instrument that keeps the graph after each pass, and shows it with a slider."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from torch import fx

from ..errors import PassError
from ..html import SCRIPT, STYLE, Html, element, sheet
from ..instruments import Instrument
from ..passbase import Pass, PassResult
from .graph_diff import Diff, diff, steps_html
from .viewer import page, view

__all__ = ["Step", "Steps"]


@dataclass(frozen=True)
class Step:
    """The graph at one time.

    Attributes:
        title: The pass that has just run with what it counted, or ``before the first pass``.
        graph_module: The graph as that left it. It shares its tensors with the graph that the pipeline goes on with.
    """

    title: str
    graph_module: fx.GraphModule


class Steps(Instrument, Sequence[Step]):
    """Keeps the graph before the first pass and after each pass that changed something.

    ::

        steps = fxq.Steps()
        gm = fxq.PassManager(instruments=[steps]).run(fxq.passes.PREPARE, fxq.trace(model, images))
        steps            # at the end of a cell: a slider through the pipeline
        steps.diff(1)    # what the first of the passes changed

    The copies share parameters and buffers with the graph, so keeping them costs little.
    """

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def start(self, gm: fx.GraphModule) -> None:
        self._steps = [Step("before the first pass", _shared_copy(gm))]

    def after(self, p: Pass, result: PassResult) -> None:
        if result.modified:
            counts = ", ".join(f"{kind} {n}" for kind, n in sorted(result.counts.items()))
            self._steps.append(Step(f"{p.name}: {counts}", _shared_copy(result.graph_module)))

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | Sequence[Step]:
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def diff(self, index: int) -> Diff:
        """What step `index` changed, from 1 on.

        Raises:
            PassError: There is no such step.
        """
        if not 1 <= index < len(self):
            raise PassError(f"there is no step {index}", hint=f"the pipeline that ran has 1 to {len(self) - 1}")
        return diff(self[index - 1].graph_module, self[index].graph_module)

    def to_html(self, path: str | Path | None = None) -> str:
        """The slider as one HTML page that needs no other file and no network.

        Args:
            path: Where to write it, whole or not at all; None (default) writes nothing.

        Returns:
            The page.
        """
        return page("pass by pass", [self._fragment(), sheet(SCRIPT)], path)

    def _fragment(self) -> Html:
        return steps_html(list(self._parts()))

    def _parts(self) -> Iterator[tuple[str, Html]]:
        for step in self[:1]:
            yield step.title, view(step.graph_module).fragment()
        for old, new in itertools.pairwise(self):
            yield new.title, diff(old.graph_module, new.graph_module).fragment()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Mapping[str, str]:
        shown = element("div", [sheet(STYLE), self._fragment(), sheet(SCRIPT)])
        return {"text/html": shown, "text/plain": repr(self)}

    def __repr__(self) -> str:
        return "\n".join(step.title for step in self) or "<Steps of a pipeline that has not run>"


def _shared_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph whose tensors are those of `gm`."""
    tensors = itertools.chain(gm.parameters(), gm.buffers())
    return copy.deepcopy(gm, {id(tensor): tensor for tensor in tensors})
