"""Which calibration method suits a model best: each solves the same statistics, and the user's score decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import fx

from . import html
from .errors import CalibrationError
from .flow import convert
from .scales import solve
from .tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METHODS", "MethodScores", "score_methods"]

METHODS: Final = ("max", "percentile", "entropy", "mse", "auto")
"""What :func:`score_methods` tries unless told otherwise."""


@dataclass(frozen=True)
class MethodScores:
    """A score for each calibration method; prints as a table.

    Attributes:
        scores: Method to score, in the order they were tried; more is better.
        reference: The float model's score; None if it was not given.
    """

    scores: Mapping[str, float]
    reference: float | None = None

    @property
    def best(self) -> str:
        """The method with the highest score; of equals, the first that was tried."""
        return max(self.scores, key=lambda name: self.scores[name])

    def _cells(self) -> list[tuple[str, str, str]]:
        rows = [(name, f"{score:.6g}", "best" if name == self.best else "") for name, score in self.scores.items()]
        return rows if self.reference is None else [*rows, ("float", f"{self.reference:.6g}", "")]

    def __str__(self) -> str:
        return table({"method": False, "score": True, "": False}, self._cells())

    def _repr_html_(self) -> str:
        shown = html.table(("method", "score", ""), self._cells(), right=(1,))
        return html.card("the same statistics, solved by each method", [shown])

    def plot(self, ylabel: str = "score") -> Figure:
        """A point for each method, and a line for the float model.

        Args:
            ylabel: What the score is, with its unit.

        Returns:
            A matplotlib figure, made without pyplot.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from .pictures import methods_picture

        return methods_picture(self.scores, reference=self.reference, ylabel=ylabel)


def score_methods(
    prepared: fx.GraphModule,
    score: Callable[[fx.GraphModule], float],
    *,
    methods: Sequence[str] = METHODS,
    batches: Iterable[Any] | None = None,
    reference: float | None = None,
) -> MethodScores:
    """Solve the collected statistics by each method, convert, and score the result.

    Args:
        prepared: A calibrated graph that holds histograms; not changed.
        score: Takes a converted graph and says how good it is: top-1, SQNR. More is better. Score on data that
            the final figure is not taken from, or the choice flatters itself.
        methods: Names of methods, as :func:`fxq.solve` takes them.
        batches: A few hundred samples for bias correction; None (default) compares without it.
        reference: The float model's score, for the table and the picture.

    Raises:
        CalibrationError: There is no method to try, or the statistics cannot answer one.
    """
    if not methods:
        raise CalibrationError("there is no method to try", hint=f"name some of {', '.join(METHODS)}")
    kept = None if batches is None else list(batches)
    work = copy.deepcopy(prepared)
    found: dict[str, float] = {}
    for method in methods:
        solve(work, method, batches=kept)
        found[method] = float(score(convert(work)))
    return MethodScores(found, reference)
