"""Pipelines, and the manager that runs them.

A :class:`Pipeline` is data: a name and a tuple of passes. It can be edited by pass name and printed. The
:class:`PassManager` runs it: checks the order of requirements before anything runs, verifies after every
pass that changed something, and keeps what each pass did and how long it took. Instruments
(:mod:`fxq.instruments`) watch it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from . import html
from .errors import FxqError, PassError, VerifyError
from .graph import state
from .instruments import Instrument
from .pass_text import parse_passes
from .passbase import Pass, PassResult, providers
from .verify import PROPERTIES, unknown, verify

__all__ = ["PassManager", "PassRun", "Pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """A named sequence of passes.

    Attributes:
        name: What logs call it.
        passes: The passes in order.

    Raises:
        PassError: Something among the passes is none.
    """

    name: str
    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        given: tuple[object, ...] = self.passes
        for p in given:
            if not isinstance(p, Pass):
                hint = f"write {p.__name__}()" if isinstance(p, type) else "derive it from fxq.Pass"
                raise PassError(f"pipeline {self.name}: {p!r} is no pass", hint=hint)

    @classmethod
    def parse(cls, text: str, passes: Iterable[type[Pass]] = ()) -> Pipeline:
        """The pipeline that ``str(pipeline)`` wrote: ``prepare(functionalize, cap{limit=6.0})``.

        Args:
            text: The text; it is never executed.
            passes: Classes to take before those that are loaded, for names that several have.

        Raises:
            PassError: The text has another form, or names a pass or an option that does not exist.
        """
        return cls(*parse_passes(text, passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.passes))})"

    def after(self, name: str, *new: Pass) -> Pipeline:
        """This pipeline with `new` passes after the pass called `name`."""
        at = self._index(name) + 1
        return replace(self, passes=(*self.passes[:at], *new, *self.passes[at:]))

    def before(self, name: str, *new: Pass) -> Pipeline:
        """This pipeline with `new` passes before the pass called `name`."""
        at = self._index(name)
        return replace(self, passes=(*self.passes[:at], *new, *self.passes[at:]))

    def replace(self, name: str, *new: Pass) -> Pipeline:
        """This pipeline with `new` passes in place of the pass called `name`."""
        at = self._index(name)
        return replace(self, passes=(*self.passes[:at], *new, *self.passes[at + 1 :]))

    def without(self, name: str) -> Pipeline:
        """This pipeline without the pass called `name`."""
        return self.replace(name)

    def _index(self, name: str) -> int:
        names = [p.name for p in self.passes]
        if name not in names:
            raise PassError(f"pipeline {self.name} has no pass {name!r}", hint=f"it has {', '.join(names)}")
        return names.index(name)

    def check_order(self, held: frozenset[str]) -> None:
        """Check that each pass finds what it requires.

        Args:
            held: Properties that hold before the first pass.

        Raises:
            PassError: A pass requires a property that nothing before it provides; the message says which
                pass would.
        """
        have = set(held)
        for index, p in enumerate(self.passes):
            strange = unknown((*p.requires, *p.provides))
            if strange:
                raise PassError(
                    f"pass {p.name} speaks of {', '.join(strange)}, which is no property of a graph",
                    hint=f"there are {', '.join(PROPERTIES)}",
                )
            for need in p.requires:
                if need not in have:
                    later = [q.name for q in self.passes[index + 1 :] if need in q.provides]
                    hint = f"move {later[0]} before it" if later else f"add {providers(need)} before it"
                    raise PassError(f"in pipeline {self.name}, {p.name} needs a graph that is {need}", hint=hint)
            have.update(p.provides)


@dataclass(frozen=True)
class PassRun:
    """What one pass of a run did.

    Attributes:
        name: The pass.
        modified: Whether it changed anything.
        counts: How often, by kind of change.
        seconds: How long it took, verification and instruments left out.
        verify_seconds: How long verification took; 0 if there was none.
        nodes: How many nodes the graph has after it.
    """

    name: str
    modified: bool
    counts: Mapping[str, int]
    seconds: float
    verify_seconds: float = 0.0
    nodes: int = 0


class PassManager:
    """Runs pipelines.

    Args:
        verify_each: Verify the graph after every pass that changed it (default). Turn it off to save time
            on very large graphs.
        instruments: What watches the passes; see :mod:`fxq.instruments`.

    Attributes:
        log: What each pass of the latest run did.
    """

    def __init__(self, *, verify_each: bool = True, instruments: Sequence[Instrument] = ()) -> None:
        self.verify_each = verify_each
        self.instruments = tuple(instruments)
        self.log: list[PassRun] = []

    def run(self, pipeline: Pipeline, gm: fx.GraphModule, *, inplace: bool = False) -> fx.GraphModule:
        """Run `pipeline` on a copy of `gm`, or on `gm` itself.

        Raises:
            PassError: That is no pipeline, its order is wrong, or a pass failed; the message says after which passes.
            VerifyError: A pass left an illegal graph.
        """
        given: object = pipeline
        if not isinstance(given, Pipeline):
            hint = (
                "read it by fxq.Pipeline.parse" if isinstance(given, str) else 'write fxq.Pipeline("mine", (A(), B()))'
            )
            raise PassError(f"a {type(given).__name__} is no pipeline", hint=hint)
        pipeline.check_order(state(gm).properties)
        work = gm if inplace else copy.deepcopy(gm)
        self.log = []
        for instrument in self.instruments:
            instrument.start(work)
        for p in pipeline:
            try:
                self._run_one(p, work)
            except FxqError as error:
                if isinstance(error, PassError):
                    done = ", ".join(run.name for run in self.log) or "nothing"
                    error.add_note(f"in pass {p.name} of pipeline {pipeline.name}, after {done}")
                for instrument in self.instruments:
                    instrument.failed(p, work, error)
                raise
        return work

    def _run_one(self, p: Pass, work: fx.GraphModule) -> None:
        for instrument in self.instruments:
            instrument.before(p, work)
        start = time.perf_counter()
        result = p(work, inplace=True)
        done = time.perf_counter()
        verified = done
        if self.verify_each and result.modified:
            _verify_after(p, result.graph_module)
            verified = time.perf_counter()
        for instrument in self.instruments:
            instrument.after(p, result)
        self.log.append(_run_of(p, result, done - start, verified - done))

    def table(self) -> str:
        """The latest run as a table: changes, nodes and milliseconds for each pass."""
        rows = [("pass", "changes", "nodes", "ms", "verify ms")]
        for run in self.log:
            counts = ", ".join(f"{kind} {n}" for kind, n in sorted(run.counts.items())) or "-"
            rows.append(
                (
                    run.name,
                    counts,
                    str(run.nodes),
                    f"{run.seconds * 1e3:.1f}",
                    f"{run.verify_seconds * 1e3:.1f}",
                )
            )
        total = [sum(getattr(run, key) for run in self.log) * 1e3 for key in ("seconds", "verify_seconds")]
        rows.append(("total", "", "", *(f"{t:.1f}" for t in total)))  # type: ignore[arg-type]
        left, right = (0, 1), (2, 3, 4)
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join([row[i].ljust(widths[i]) for i in left] + [row[i].rjust(widths[i]) for i in right])
            for row in rows
        )

    def _repr_html_(self) -> str:
        total = sum(run.seconds + run.verify_seconds for run in self.log)
        rows = []
        for run in self.log:
            counts = ", ".join(f"{kind} {n}" for kind, n in sorted(run.counts.items())) or "-"
            spent = run.seconds + run.verify_seconds
            bar = html.share(round(spent * 1e6), round(total * 1e6), "")
            rows.append((run.name, counts, str(run.nodes), *_milliseconds(run), bar))
        columns = ("pass", "changes", "nodes", "ms", "verify ms", "")
        return html.card(f"{len(rows)} passes in {total * 1e3:.1f} ms", [html.table(columns, rows, right=(2, 3, 4))])


def _milliseconds(run: PassRun) -> tuple[str, str]:
    return f"{run.seconds * 1e3:.1f}", f"{run.verify_seconds * 1e3:.1f}"


def _run_of(p: Pass, result: PassResult, seconds: float, verify_seconds: float) -> PassRun:
    nodes = len(result.graph_module.graph.nodes)
    return PassRun(p.name, result.modified, result.counts, seconds, verify_seconds, nodes)


def _verify_after(done: Pass, gm: fx.GraphModule) -> None:
    try:
        verify(gm)
    except VerifyError as error:
        raise VerifyError(
            f"pass {done.name} left an illegal graph: {error.message}",
            node=error.node,
            module_path=error.module_path,
            source=error.source,
            hint=error.hint,
        ) from error
