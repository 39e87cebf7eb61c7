"""Checks for passes that people write: on a graph of theirs, and on random ones.

One graph is for :func:`check_pass`, many are for :func:`check_pass_on_random_graphs`, which of a failure
prints the smallest graph that still fails. Both raise :class:`fxq.errors.PassError`, and need no test
framework.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import FxqError, PassError
from .flow import trace
from .graph import state
from .instruments import NumericCheck, format_diff
from .manager import PassManager, Pipeline
from .passbase import Pass, PassResult
from .passes import PREPARE
from .printer import format_graph
from .random_models import SHAPE, Layer, Maker, RandomModel, kinds_with, random_model, random_plan, without
from .verify import verify

__all__ = ["RandomReport", "check_pass", "check_pass_on_random_graphs", "graph_for", "random_model"]


def graph_for(p: Pass, model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    """The graph of a model as a pass wants it: traced, and behind the passes that give what it requires.

    These are the passes of :data:`fxq.passes.PREPARE` up to the last that gives something of it; for a pass
    that is one of them itself, those before it.

    Args:
        p: The pass; it is not run.
        model: Any model that :func:`fxq.trace` takes.
        example_inputs: As for :func:`fxq.trace`.

    Raises:
        PassError: The passes of :data:`fxq.passes.PREPARE` do not give what the pass requires.
    """
    gm = trace(model, example_inputs)
    return _until(gm, p)


def _until(gm: fx.GraphModule, p: Pass) -> fx.GraphModule:
    needed = set(p.requires)
    passes = list(PREPARE)
    names = [one.name for one in passes]
    if type(p) in map(type, passes):
        passes = passes[: names.index(p.name)]
    else:
        while passes and not needed & set(passes[-1].provides):
            passes.pop()
    gm = PassManager().run(Pipeline("before", tuple(passes)), gm, inplace=True)
    missing = needed - state(gm).properties
    if missing:
        raise PassError(
            f"no pass of fxq.passes.PREPARE gives a graph that is {', '.join(sorted(missing))}",
            hint="run what gives it, and hand the graph to check_pass",
        )
    return gm


def check_pass(
    p: Pass,
    graph: fx.GraphModule | nn.Module,
    example_inputs: Any = None,
    *,
    must_change: bool = True,
    idempotent: bool = True,
) -> PassResult:
    """Run a pass on a copy of a graph and check all that a pass has to keep.

    Checked are: the graph given is left alone; the result is legal and has the properties that it claims; the
    output changes no more than the pass declares (``exact``, ``rounding`` or ``changes-values``);
    ``modified`` is true if and only if something changed; the code that runs is the graph's; and a second run
    changes nothing.

    Args:
        p: The pass.
        graph: A graph from fxq, or a model, which is traced and brought to what the pass requires.
        example_inputs: For a model: as for :func:`fxq.trace`.
        must_change: It is an error if the pass changes nothing.
        idempotent: Check the second run.

    Returns:
        What the pass gave.

    Raises:
        PassError: One of these does not hold; the message says which.
    """
    gm = graph if isinstance(graph, fx.GraphModule) else graph_for(p, graph, example_inputs)
    before = _Look(gm)
    check = NumericCheck()
    check.before(p, gm)
    result = p(gm)
    after = _Look(result.graph_module)
    if _Look(gm) != before:
        raise _broken(p, "changed the graph that it was to copy", before.text, _Look(gm).text)
    if result.modified != (after != before):
        said = "that it changed the graph, and it did not" if result.modified else "nothing of what it changed"
        raise _broken(p, f"says {said}", before.text, after.text, "change the graph through the editor alone")
    if must_change and not result.modified:
        raise PassError(
            f"pass {p.name} changed nothing, so there is nothing to check",
            hint="give it a graph that has what it looks for, or pass must_change=False",
        )
    verify(result.graph_module)
    _check_code(p, result.graph_module)
    check.after(p, result)
    if idempotent:
        again = p(result.graph_module)
        if again.modified:
            raise _broken(p, "changes its own result on a second run", after.text, _Look(again.graph_module).text)
        if again.notes:
            raise PassError(f"pass {p.name} says more on a second run: {again.notes[0].text}")
    return result


@dataclass(frozen=True)
class _Look:
    """What of a graph a pass can change, comparable: its text, its calls and what it stores."""

    text: str
    calls: tuple[str, ...]
    stored: tuple[tuple[str, str], ...]

    def __init__(self, gm: fx.GraphModule) -> None:
        object.__setattr__(self, "text", format_graph(gm))
        object.__setattr__(self, "calls", tuple(f"{n.op} {n.target} {n.format_node()}" for n in gm.graph.nodes))
        tensors = itertools.chain(gm.named_parameters(remove_duplicate=False), gm.named_buffers(remove_duplicate=False))
        stored = [(path, f"{tuple(t.shape)} {t.dtype} {_fingerprint(t)}") for path, t in tensors]
        modules = [(path, f"{m} {m.training}") for path, m in gm.named_modules() if path]
        object.__setattr__(self, "stored", (*stored, *modules))


def _fingerprint(tensor: Tensor) -> int:
    return hash(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _broken(p: Pass, what: str, before: str, after: str, hint: str | None = None) -> PassError:
    error = PassError(f"pass {p.name} {what}", hint=hint)
    error.add_note(format_diff(before, after) or "the printed graphs are equal: what differs is stored")
    return error


def _check_code(p: Pass, gm: fx.GraphModule) -> None:
    """The compiled forward is the graph's."""
    code = gm.code
    gm.recompile()
    if gm.code != code:
        raise PassError(
            f"pass {p.name} left code that is not the graph's",
            hint="change the graph in call(), through the editor",
        )


@dataclass(frozen=True)
class RandomReport:
    """What a check on random graphs covered.

    Attributes:
        graphs: How many graphs the pass ran on.
        changed: How many of them it changed.
    """

    graphs: int
    changed: int


def check_pass_on_random_graphs(
    p: Pass,
    *,
    count: int = 50,
    seed: int = 0,
    layers: int = 8,
    extra: Mapping[str, Maker] | None = None,
    must_change: bool = True,
    idempotent: bool = True,
) -> RandomReport:
    """:func:`check_pass` on random models.

    Args:
        p: The pass.
        count: How many models.
        seed: The first model's seed; the others follow it.
        layers: How many layers a model has.
        extra: Kinds of layers that the pass looks for; see :func:`random_model`.
        must_change: It is an error if the pass changes none of the graphs.
        idempotent: Check the second run.

    Raises:
        PassError: The pass fails on a model; the message holds the failure, the smallest model found that
            fails in the same way, and its graph. Or it changed none of the graphs.
    """
    kinds = kinds_with(extra)
    changed = 0
    for number in range(seed, seed + count):
        plan = random_plan(number, layers, list(extra or ()))
        error, modified = _try(p, plan, kinds, idempotent=idempotent)
        changed += modified
        if error is not None:
            raise _smallest(p, plan, kinds, number, idempotent=idempotent)
    if must_change and not changed:
        raise PassError(
            f"pass {p.name} changed none of {count} random graphs, so there is nothing to check",
            hint="let extra={name: module maker} bring what it looks for",
        )
    return RandomReport(count, changed)


def _try(
    p: Pass, plan: Sequence[Layer], kinds: Mapping[str, Maker], *, idempotent: bool
) -> tuple[FxqError | None, bool]:
    """How a pass fails on a model, if it does, and whether it changed something."""
    gm = graph_for(p, RandomModel(plan, kinds).eval(), _example())
    try:
        return None, check_pass(p, gm, must_change=False, idempotent=idempotent).modified
    except FxqError as error:
        return error, True


def _example() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def _smallest(
    p: Pass,
    plan: Sequence[Layer],
    kinds: Mapping[str, Maker],
    seed: int,
    *,
    idempotent: bool,
) -> PassError:
    """The failure on the smallest model that taking layers away one by one leads to."""
    error, _ = _try(p, plan, kinds, idempotent=idempotent)
    assert error is not None
    shrunk = True
    while shrunk:
        shrunk = False
        for index in reversed(range(len(plan))):
            fewer = without(plan, index)
            found, _ = _try(p, fewer, kinds, idempotent=idempotent) if fewer else (None, False)
            if found is not None and _alike(found, error):
                plan, error, shrunk = fewer, found, True
    model = RandomModel(plan, kinds).eval()
    graph = format_graph(graph_for(p, model, _example()))
    made = PassError(
        f"{error.message}\nthe smallest model that shows it (of seed {seed}):\n{model.program()}\n"
        f"and its graph:\n{graph}",
        node=error.node,
        hint=error.hint,
    )
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    made.__cause__ = error
    return made


def _alike(a: FxqError, b: FxqError) -> bool:
    """Whether two failures are of one kind: their messages are equal up to numbers and names of nodes."""
    return type(a) is type(b) and a.message.split()[:5] == b.message.split()[:5]
