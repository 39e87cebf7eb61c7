"""Guards: what a traced graph takes for granted about the shapes of its inputs.

A model that asks ``if h % 2`` takes one way while it is traced, and the graph holds that way alone. The question
and its answer are kept as a :class:`Guard`, an expression over the inputs' shapes; a call with shapes for which it
does not hold is an error, and so is an export that promises such shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, SimpleNamespace
from typing import Any, Final

import torch

from .errors import GuardError

__all__ = ["Guard", "GuardCheck", "Shapes"]

Shapes = Mapping[str, Sequence[int]]
"""Shapes by input name."""

_LONG: Final = 160
"""Letters of a guard that a message shows whole."""
_FUNCTIONS: Final = {"math": math, "torch": torch, "max": max, "min": min, "abs": abs, "round": round}
"""What torch's printer of symbolic expressions calls."""


@dataclass(frozen=True)
class Guard:
    """One thing that the traced model decided by the shapes of its inputs.

    Attributes:
        text: What holds, as Python over the inputs' shapes: ``x.shape[2] % 2 == 0``.
        inputs: The inputs that it reads.
        source: The user's ``file:line`` that asked.
        code: That line's text.
        module_path: The module whose forward asked.
    """

    text: str
    inputs: tuple[str, ...]
    source: str | None = None
    code: str = ""
    module_path: str = ""

    @cached_property
    def _compiled(self) -> CodeType:
        return compile(self.text, "<guard>", "eval")

    def holds(self, shapes: Shapes) -> bool:
        """Whether it holds for these shapes; one that reads an input without a shape is not judged."""
        if any(name not in shapes for name in self.inputs):
            return True
        names = {name: SimpleNamespace(shape=shapes[name]) for name in self.inputs}
        try:
            found = eval(self._compiled, {"__builtins__": {}, **_FUNCTIONS}, names)  # noqa: S307, the tracer wrote it
            return bool(found)
        except (IndexError, ZeroDivisionError):  # another rank; a division that this shape does not allow
            return False

    @property
    def shown(self) -> str:
        """What holds, for people: a long text (sizes of windows in windows) in its beginning and its end."""
        if len(self.text) <= _LONG:
            return self.text
        return f"{self.text[: _LONG // 2]} … {self.text[-_LONG // 4 :]}"

    def where(self) -> str | None:
        """The user's line with its text."""
        return f"{self.source}: {self.code}" if self.source and self.code else self.source

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}


class GuardCheck:
    """What the generated forward calls with its inputs before it computes.

    It costs a comparison of shapes while they stay what they were. torch.compile takes the guards over as its own.

    Args:
        names: The inputs' names, in the order in which they are handed over.
        guards: What has to hold.
    """

    def __init__(self, names: Iterable[str], guards: Iterable[Guard]) -> None:
        self.guards = tuple(guards)
        self.bind(names)

    def bind(self, names: Iterable[str]) -> None:
        """The inputs are called so from now on.

        Raises:
            GuardError: A guard reads an input that is not among them.
        """
        self.names = tuple(names)
        for guard in self.guards:
            gone = set(guard.inputs) - set(self.names)
            if gone:
                raise GuardError(f"the guard {guard.shown} reads {', '.join(sorted(gone))}, which is no input any more")
        self.known: tuple[Any, ...] = ()
        self.test = self._compiled()

    def __call__(self, *inputs: Any) -> None:
        """Raise if a guard does not hold.

        Raises:
            GuardError: It names the guard, the shapes and the line that asked.
        """
        if torch.compiler.is_compiling():
            if not self.test(*inputs):
                self.explain(inputs)
            return
        shapes = tuple([x.shape if isinstance(x, torch.Tensor) else None for x in inputs])
        if shapes != self.known:
            self.explain(inputs)
            self.known = shapes

    def explain(self, inputs: Sequence[Any]) -> None:
        """Raise for the first guard that does not hold."""
        shapes = {n: tuple(x.shape) for n, x in zip(self.names, inputs, strict=True) if isinstance(x, torch.Tensor)}
        for guard in self.guards:
            if not guard.holds(shapes):
                found = ", ".join(f"{name} is {list(shapes[name])}" for name in guard.inputs)
                raise GuardError(
                    f"the graph was traced for {guard.shown}, and {found}: the model would take another way",
                    module_path=guard.module_path or None,
                    source=guard.where(),
                    hint="trace the model with inputs of this shape, or rewrite that line without a decision",
                )

    def _compiled(self) -> Callable[..., bool]:
        """All guards as one function of the inputs."""
        text = " and ".join(f"({guard.text})" for guard in self.guards) or "True"
        found: Callable[..., bool] = eval(f"lambda {', '.join(self.names)}: {text}", dict(_FUNCTIONS))  # noqa: S307
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardCheck:
        return GuardCheck(self.names, self.guards)

    def __reduce__(self) -> tuple[Any, ...]:
        return GuardCheck, (self.names, self.guards)
