"""What can be watched while a pipeline runs: hooks around each pass, given to :class:`fxq.PassManager`.

::

    manager = PassManager(instruments=[Dump(diff=True), NumericCheck()])
    gm = manager.run(fxq.passes.PREPARE, fxq.trace(model, images))
    print(manager.table())

:class:`Dump` prints graphs, :class:`NumericCheck` runs the example inputs before and after each pass, and
:class:`fxq.reproducer.Reproducer` saves what makes a pass fail. Time and counts are kept without any.
"""

from __future__ import annotations

import copy
import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .arguments import forward_values
from .errors import FxqError, PassError
from .graph import error_at, state
from .passbase import Pass, PassResult
from .printer import format_graph
from .quantizer import Mode, Quantizer
from .shapes import Interpreter

__all__ = ["Dump", "Instrument", "NumericCheck", "NumericError", "format_diff", "node_values"]

TOLERANCE: Final = 1e-4
"""What float32 sums in another order may change of an output, as a part of its largest magnitude."""
RESULT: Final = "return"
"""Key of what a graph gives, among what its nodes give: a word that can name no node."""


class Instrument:
    """Hooks around a pass; a subclass overrides those it needs. It must not change the graph."""

    def start(self, gm: fx.GraphModule) -> None:
        """A pipeline is about to run on `gm`."""

    def before(self, p: Pass, gm: fx.GraphModule) -> None:
        """Pass `p` is about to run on `gm`."""

    def after(self, p: Pass, result: PassResult) -> None:
        """Pass `p` has run, and the graph that it left was verified.

        Raises:
            PassError: The instrument found something wrong with it.
        """

    def failed(self, p: Pass, gm: fx.GraphModule, error: FxqError) -> None:
        """Pass `p`, the verifier or an instrument raised `error`; `gm` is as that left it."""


class Dump(Instrument):
    """Writes the graph around passes, as :func:`fxq.format_graph` prints it.

    Args:
        write: Takes the text; stdout by default.
        only: Names of the passes to show; None shows all.
        every: Show passes that changed nothing too.
        diff: Show what changed, instead of the whole graph before and after.
    """

    def __init__(
        self,
        write: Callable[[str], object] | None = None,
        *,
        only: Collection[str] | None = None,
        every: bool = False,
        diff: bool = False,
    ) -> None:
        self.write, self.only, self.every, self.diff = write, only, every, diff
        self._before = ""

    def before(self, p: Pass, gm: fx.GraphModule) -> None:
        self._before = format_graph(gm) if self._wanted(p) else ""

    def after(self, p: Pass, result: PassResult) -> None:
        if not self._wanted(p) or not (result.modified or self.every):
            return
        if not result.modified:
            self._say(f"== {p}: nothing changed")
            return
        counts = ", ".join(f"{kind} {n}" for kind, n in sorted(result.counts.items()))
        now = format_graph(result.graph_module)
        if self.diff:
            self._say(f"== {p}: {counts}", format_diff(self._before, now))
        else:
            self._say(f"== before {p}", self._before, f"== after {p}: {counts}", now)

    def failed(self, p: Pass, gm: fx.GraphModule, error: FxqError) -> None:
        if self._wanted(p):
            self._say(f"== before {p}", self._before, f"== {p} failed: {error.message}", format_graph(gm))

    def _wanted(self, p: Pass) -> bool:
        return self.only is None or p.name in self.only

    def _say(self, *texts: str) -> None:
        (self.write or sys.stdout.write)("\n".join(texts) + "\n")


def format_diff(before: str, after: str) -> str:
    """What differs between two printed graphs: lines marked ``-`` and ``+`` with one line around them.

    Args:
        before: What :func:`fxq.format_graph` printed.
        after: What it printed later.

    Returns:
        The lines; ``…`` stands between places. Empty if the texts are equal.
    """
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm=""))[2:]
    return "\n".join("…" if line.startswith("@@") else line for line in lines)


class NumericError(PassError):
    """A pass changed values that it declares not to change.

    Attributes:
        settings: What it was checked on: positional inputs, inputs by name (None for the graph's example
            inputs), tolerance.
    """

    settings: tuple[tuple[Any, ...] | None, Mapping[str, Any] | None, float] = (None, None, TOLERANCE)


class NumericCheck(Instrument):
    """Runs inputs before and after each pass and compares the outputs, as the pass declares it.

    ``exact`` passes must not change a bit, ``rounding`` ones no more than `tolerance` times the output's
    largest magnitude; what ``changes-values`` passes change is only measured. It runs a copy in eval mode
    whose observers collect nothing, with one seed for whatever is random.

    Args:
        args: Positional inputs; the graph's example inputs by default.
        kwargs: Inputs by name.
        tolerance: For ``rounding``.

    Attributes:
        differences: For each pass that changed the graph, by name, the largest difference of an output as a
            part of that output's largest magnitude.
    """

    def __init__(
        self,
        args: tuple[Any, ...] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.args, self.kwargs, self.tolerance = args, kwargs, tolerance
        self.differences: dict[str, float] = {}
        self._values: dict[str, Any] | None = None

    def start(self, gm: fx.GraphModule) -> None:
        self.differences, self._values = {}, None

    def before(self, p: Pass, gm: fx.GraphModule) -> None:
        if self._values is None:
            self._values = node_values(gm, self.args, self.kwargs)

    def after(self, p: Pass, result: PassResult) -> None:
        if not result.modified or self._values is None:
            return
        gm, old = result.graph_module, self._values
        try:
            new = self._values = node_values(gm, self.args, self.kwargs)
        except Exception as why:
            raise PassError(
                f"pass {p.name} left a graph that does not run: {type(why).__name__}: {why}",
                hint="correct the arguments of what the pass calls",
            ) from why
        measured = _difference(old[RESULT], new[RESULT])
        self.differences[p.name] = measured
        allowed = {"exact": 0.0, "rounding": self.tolerance}.get(p.numeric, float("inf"))
        if measured > allowed:
            error = self._error(p, gm, old, new, allowed)
            error.settings = (self.args, self.kwargs, self.tolerance)
            raise error

    @staticmethod
    def _error(
        p: Pass, gm: fx.GraphModule, old: Mapping[str, Any], new: Mapping[str, Any], allowed: float
    ) -> NumericError:
        first = next(n for n in gm.graph.nodes if _key(n) in old and _difference(old[_key(n)], new[_key(n)]) > allowed)
        seen = _difference(old[_key(first)], new[_key(first)])
        total = _difference(old[RESULT], new[RESULT])
        return error_at(
            NumericError,
            f"pass {p.name} declares itself {p.numeric} and changes the output by {total:.2g} of its "
            f"magnitude; the first node that differs is {first.name}, by {seen:.2g}",
            first,
            "correct the pass, or declare what it does: numeric = 'rounding' or 'changes-values'",
        )


def node_values(
    gm: fx.GraphModule, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What each node of a graph gives, by name; under :data:`RESULT` what the graph itself gives.

    Args:
        gm: A graph from fxq. A copy of it runs, in eval mode; quantizers that would observe, or have no
            scale yet, do nothing.
        args: Positional inputs; the graph's example inputs by default.
        kwargs: Inputs by name.
    """
    held = state(gm)
    given = (held.example_args, held.example_kwargs) if args is None and kwargs is None else (args or (), kwargs or {})
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
    work = copy.deepcopy(gm).eval()
    for module in work.modules():
        if isinstance(module, Quantizer) and (module.mode is Mode.OBSERVE or not module.solved):
            module.mode = Mode.OFF
    recorder = _Recorder(work)
    devices = {t.device for t in (*work.parameters(), *work.buffers()) if t.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        recorder.run(*forward_values(work, args, kwargs))
    return recorder.values


class _Recorder(Interpreter):
    """Keeps a copy of what each node gives, for later nodes may change it in place."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        kept = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
        self.values[_key(n)] = kept
        return result


def _key(node: fx.Node) -> str:
    return RESULT if node.op == "output" else node.name


def _difference(old: Any, new: Any) -> float:
    """The largest difference as a part of the old magnitude; inf if shape, dtype or structure differ."""
    old_leaves, new_leaves = pytree.tree_leaves(old), pytree.tree_leaves(new)
    if len(old_leaves) != len(new_leaves):
        return float("inf")
    return max(map(_leaf_difference, old_leaves, new_leaves), default=0.0)


def _leaf_difference(old: Any, new: Any) -> float:
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return 0.0 if type(old) is type(new) and old == new else float("inf")
    if old.shape != new.shape or old.dtype != new.dtype:
        return float("inf")
    a, b = old.double(), new.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    worst = (a - b).abs()[~same].max().item()
    magnitude = a[a.isfinite()].abs().max().item() if bool(a.isfinite().any()) else 0.0
    return worst / magnitude if magnitude and worst == worst else float("inf")  # noqa: PLR0124  NaN differs from itself
