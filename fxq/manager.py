"""Pipelines, and the manager that runs them.

A :class:`Pipeline` is data: a name and a tuple of passes. It can be edited by pass name and printed. The
:class:`PassManager` runs it: checks the order of requirements before anything runs, verifies after every
pass that changed something, and keeps what each pass did and how long it took.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from .errors import PassError, VerifyError
from .graph import state
from .passbase import Pass, providers
from .verify import unknown, verify

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
                    f"pass {p.name} speaks of {', '.join(strange)}, which is no property of a graph"
                )
            for need in p.requires:
                if need not in have:
                    later = [q.name for q in self.passes[index + 1 :] if need in q.provides]
                    hint = f"move {later[0]} before it" if later else f"add {providers(need)} before it"
                    raise PassError(
                        f"in pipeline {self.name}, {p.name} needs a graph that is {need}", hint=hint
                    )
            have.update(p.provides)


@dataclass(frozen=True)
class PassRun:
    """What one pass of a run did.

    Attributes:
        name: The pass.
        modified: Whether it changed anything.
        counts: How often, by kind of change.
        seconds: How long it took, verification left out.
    """

    name: str
    modified: bool
    counts: Mapping[str, int]
    seconds: float


class PassManager:
    """Runs pipelines.

    Args:
        verify_each: Verify the graph after every pass that changed it (default). Turn it off to save time
            on very large graphs.

    Attributes:
        log: What each pass of the latest run did.
    """

    def __init__(self, *, verify_each: bool = True) -> None:
        self.verify_each = verify_each
        self.log: list[PassRun] = []

    def run(self, pipeline: Pipeline, gm: fx.GraphModule, *, inplace: bool = False) -> fx.GraphModule:
        """Run `pipeline` on a copy of `gm`, or on `gm` itself.

        Raises:
            PassError: The order is wrong, or a pass failed; the message says after which passes.
            VerifyError: A pass left an illegal graph.
        """
        pipeline.check_order(state(gm).properties)
        work = gm if inplace else copy.deepcopy(gm)
        self.log = []
        for p in pipeline:
            start = time.perf_counter()
            try:
                result = p(work, inplace=True)
                seconds = time.perf_counter() - start
                if self.verify_each and result.modified:
                    _verify_after(p, result.graph_module)
            except PassError as error:
                done = ", ".join(run.name for run in self.log) or "nothing"
                error.add_note(f"in pass {p.name} of pipeline {pipeline.name}, after {done}")
                raise
            self.log.append(PassRun(p.name, result.modified, result.counts, seconds))
        return work


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
