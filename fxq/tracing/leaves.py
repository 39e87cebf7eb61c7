"""What stays whole while a model is traced: modules, and functions marked with ``torch.fx.wrap``.

Such a mark says that plain fx cannot follow the function, as a rule for its decisions on shapes. These have an answer
here, so the function is traced through unless it is named as a leaf.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx._symbolic_trace import _wrapped_fns_to_patch  # fx tells nobody else what was marked

from ..errors import TraceError
from .proxies import LIBRARIES

__all__ = ["Function", "Leaf", "Leaves", "wrapped", "wrapped_functions"]

Function = Callable[..., Any]
Leaf = type[nn.Module] | Function | str
"""A type of modules, a function marked with torch.fx.wrap, or the path or name of either."""


@dataclass(frozen=True)
class Leaves:
    """What stays whole.

    Attributes:
        modules: Types and dotted paths of modules.
        functions: Functions marked with torch.fx.wrap.
    """

    modules: tuple[type[nn.Module] | str, ...]
    functions: frozenset[Function]

    @classmethod
    def of(cls, root: nn.Module, leaves: Sequence[Leaf]) -> Leaves:
        """What a user's list names.

        Raises:
            TraceError: One names nothing.
        """
        known = dict(root.named_modules())
        marked = [function for _, _, function in wrapped()]
        modules: list[type[nn.Module] | str] = []
        functions: set[Function] = set()
        for leaf in leaves:
            names = [f for f in marked if leaf in (f, f.__name__, f"{f.__module__}.{f.__qualname__}")]
            if names and leaf not in known:
                functions.update(names)
            elif isinstance(leaf, str | type):
                _check_leaf(leaf, known)
                modules.append(leaf)
            else:
                hint = "name module types, dotted paths, or functions marked with torch.fx.wrap in a list"
                raise TraceError(f"leaf_modules holds {leaf!r}", hint=hint)
        return cls(tuple(modules), frozenset(functions))

    def and_also(self, more: Iterable[str | Function]) -> Leaves:
        """These, and paths of modules and functions more."""
        more = list(more)
        paths = tuple(place for place in more if isinstance(place, str))
        return Leaves(self.modules + paths, self.functions | {p for p in more if not isinstance(p, str)})


def _check_leaf(path: type[nn.Module] | str, known: Mapping[str, nn.Module]) -> None:
    """A path names a module, and a type is there."""
    if isinstance(path, type) and not any(isinstance(m, path) for m in known.values()):
        raise TraceError(f"leaf_modules names {path.__name__}, and the model has no such module")
    if isinstance(path, str) and path not in known:
        near = difflib.get_close_matches(path, known, 3, 0.3)
        raise TraceError(
            f"leaf_modules names {path!r}, and the model has no such module",
            hint=f"near it are {', '.join(near)}"
            if near
            else "paths are those of named_modules(), functions are those marked with torch.fx.wrap",
        )


def wrapped() -> list[tuple[dict[str, Any], str, Function]]:
    """The Python functions that ``torch.fx.wrap`` was called for, outside of tracing.

    Functions of torch itself and builtins are left out: they are operations, with nothing to be seen inside.

    Returns:
        For each the globals of its module, its name in them, and the function.
    """
    found = []
    for (_, name), names in _wrapped_fns_to_patch.items():
        code = getattr(inspect.unwrap(names[name]), "__code__", None) if name in names else None
        if code is not None and not code.co_filename.startswith(LIBRARIES):
            found.append((names, name, names[name]))
    return found


@contextmanager
def wrapped_functions(tracer: Any) -> Iterator[None]:
    """Trace through functions that ``torch.fx.wrap`` keeps whole, but for those that the tracer wants whole.

    The mark says that plain fx cannot follow the function, as a rule for its decisions on shapes. These have an
    answer here.

    Args:
        tracer: Knows the functions (``wrapped``) and which of them stay whole (``whole``), and is told which of them
            it is in (``inside``, outermost first) and where tracing stops (``stopped_in``).
    """
    patched = [(names, name, names[name]) for names, name, _ in tracer.wrapped]
    try:
        for names, name, function in tracer.wrapped:
            names[name] = _traced_through(tracer, function, names[name])
        yield
    finally:
        for names, name, own in patched:
            names[name] = own


def _traced_through(tracer: Any, function: Function, recorded: Function) -> Function:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if function in tracer.whole:
            return recorded(*args, **kwargs)
        tracer.inside.append(function)
        try:
            return function(*args, **kwargs)
        except Exception:
            tracer.stopped_in = tracer.stopped_in or function
            raise
        finally:
            tracer.inside.pop()

    return call
