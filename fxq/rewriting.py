"""A pass made of a picture: what to look for, when it will do, and what to put in its place."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from .editor import Editor
from .errors import PassError
from .graph import error_at
from .match import Match, NoMatch, Pattern, explain, find
from .passbase import Pass

__all__ = ["RewritePass"]


@dataclass(frozen=True)
class RewritePass(Pass):
    """Base of passes that replace what a pattern finds.

    Its author writes :meth:`pattern` and :meth:`rewrite`, and :meth:`check` if not every match will do. All
    matches of a round are rewritten, those that come last in the graph first, so that a match may read what
    an earlier one gives; then the graph is searched again, until nothing is left to rewrite. What was found
    and declined becomes a note.

    Class attributes:
        rounds: After how many rounds that all found something the pass gives up.

    Example:
        >>> import torch
        >>> from fxq.match import Match, Op, Pattern, Var
        >>> @dataclass(frozen=True)
        ... class DropDoubleReLU(RewritePass):
        ...     name = "drop-double-relu"
        ...     requires = ("canonical",)
        ...
        ...     def pattern(self) -> Pattern:
        ...         return Pattern(Op("relu", Op("relu", name="first", shared=True)))
        ...
        ...     def rewrite(self, editor: Editor, match: Match) -> None:
        ...         editor.replace(match.output, match["first"])
        ...         editor.erase(match.output)
    """

    rounds: ClassVar[int] = 100

    @abstractmethod
    def pattern(self) -> Pattern:
        """What to look for."""

    def check(self, match: Match) -> str | None:
        """Why a match will not do, one sentence; None where it will (default)."""
        return None

    @abstractmethod
    def rewrite(self, editor: Editor, match: Match) -> None:
        """Put something in the place of a match, such that the pattern does not find it again."""

    def call(self, editor: Editor) -> None:
        pattern = self.pattern()
        for _ in range(self.rounds):
            found = find(editor.graph, pattern, self.check)
            if not found.matches:
                self._note(editor, found.misses)
                return
            for match in reversed(found.matches):
                if not any(node._erased for node in (*match.nodes, *_nodes(match))):
                    self._one(editor, match)
        raise error_at(
            PassError,
            f"pass {self.name} still finds its pattern after {self.rounds} rounds",
            found.matches[0].output,
            "its rewrite leaves what its pattern looks for; make check() decline it",
        )

    def _one(self, editor: Editor, match: Match) -> None:
        done = editor.counts.total()
        self.rewrite(editor, match)
        if editor.counts.total() == done:
            raise error_at(
                PassError,
                f"pass {self.name} found its pattern and changed nothing",
                match.output,
                "change the graph through the editor, or decline the match in check()",
            )

    def _note(self, editor: Editor, misses: tuple[NoMatch, ...]) -> None:
        for miss in misses:
            if miss.complete:
                editor.note(miss.node, self.name, f"left alone: {miss.reason}")

    def explain(self, gm: fx.GraphModule) -> str:
        """Where the pattern fits in a graph, and the nearest miss with its reason, for people."""
        return explain(gm.graph, self.pattern(), self.check)


def _nodes(match: Match) -> list[fx.Node]:
    return [value for value in match.values.values() if isinstance(value, fx.Node)]
