"""The code of a traced forward: inputs that nest tensors are taken apart, and guards are checked first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .guards import Guard, GuardCheck

__all__ = ["ForwardCode"]


class ForwardCode(fx.graph.CodeGen):
    """Code for a forward with nested inputs, with guards, or with both.

    Args:
        names: Parameters of forward, in order; None if there is one for each placeholder.
        parts: For each placeholder, the expression over the parameters that it stands for (``pair[0]``).
        guards: What has to hold of the placeholders' shapes.
    """

    def __init__(
        self, names: Sequence[str] | None = None, parts: Sequence[str] = (), guards: Sequence[Guard] = ()
    ) -> None:
        super().__init__()
        self.names = None if names is None else tuple(names)
        self.parts, self.guards = tuple(parts), tuple(guards)
        self.check = GuardCheck(dict.fromkeys(name for guard in guards for name in guard.inputs), guards)

    def process_inputs(self, *args: Any) -> Any:
        if self.names is None:
            return args
        return [leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, torch.Tensor)]

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        variables = [v.split(":")[0].split("=")[0].strip() for v in free_vars]
        given = free_vars if self.names is None else list(self.names)
        definition = super().gen_fn_def(given, maybe_return_annotation, **options)
        if self.names is not None:
            taken = zip(variables, self.parts, strict=True)
            definition += "".join(f"\n    {v} = {part}" for v, part in taken if v != part)
        if self.guards:
            self.check.bind(variables)
            definition += f"\n    check_guards({', '.join(variables)})"
        return definition

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [("check_guards", self.check)] if self.guards else []
