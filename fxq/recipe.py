"""What to quantize, and how: specs, rules and recipes.

A :class:`QSpec` says how one tensor is quantized. A :class:`Rule` says which operations it holds for. A
:class:`Recipe` is a list of rules; the last one that matches an operation wins, edge by edge. What no rule
speaks of follows the target's own placement.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
import yaml

from .errors import RecipeError
from .specs import (
    DTYPES,
    METHODS,
    Granularity,
    Method,
    PerChannel,
    PerTensor,
    QDType,
    QSpec,
    spec_from,
    spec_to,
)

__all__ = [
    "DTYPES",
    "METHODS",
    "EdgeSpecs",
    "Granularity",
    "Method",
    "PerChannel",
    "PerTensor",
    "QDType",
    "QSpec",
    "Recipe",
    "Rule",
]

KEEP: Final = "keep"
"""In :class:`EdgeSpecs`: leave this edge to earlier rules and the target."""

ROLES: Final = ("input", "weight", "output")
"""What an edge of an operation can be, as :class:`EdgeSpecs` names it."""


@dataclass(frozen=True)
class EdgeSpecs:
    """A spec for each kind of edge of an operation.

    Attributes:
        input: For activations that come in; None leaves them float, ``"keep"`` (default) leaves them as
            they were.
        weight: For weights, likewise.
        output: For the tensor that goes out, likewise. Everyone of whom no rule says float then reads it
            quantized.

    Raises:
        RecipeError: A field is none of these.
    """

    input: QSpec | Literal["keep"] | None = KEEP
    weight: QSpec | Literal["keep"] | None = KEEP
    output: QSpec | Literal["keep"] | None = KEEP

    def __post_init__(self) -> None:
        for name in ROLES:
            value = getattr(self, name)
            if not (value is None or isinstance(value, QSpec) or value == KEEP):
                raise RecipeError(f"{name}={value!r} is no spec", hint='use QSpec(...), None for float, or "keep"')


NodePredicate: TypeAlias = Callable[[torch.fx.Node], bool]
Match: TypeAlias = str | type[torch.nn.Module] | NodePredicate


@dataclass(frozen=True)
class Rule:
    """Which operations, and how their edges are quantized.

    Attributes:
        match: One of: a glob over module paths (``"layer1.*"``), which holds for what is inside a matching
            module too (``"*"`` for the whole model); ``"re:layer[12]"``, a regular expression over the whole of
            such a path; ``"op:add"``, a glob over op kinds; a module type (``nn.Linear``), which holds for what is
            inside such a module too; a predicate over FX nodes.
        spec: One of: a :class:`QSpec`, for the inputs, weights and outputs that the target quantizes (what it
            leaves open comes from the target); None, which leaves inputs, weights and output float;
            :class:`EdgeSpecs`, which speaks of the edges it names whether the target quantizes them or not.
        reason: Why, for reports.

    Raises:
        RecipeError: The match or the spec is none of these.
    """

    match: Match
    spec: QSpec | EdgeSpecs | None
    reason: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.match, str | type) or callable(self.match)):
            raise RecipeError(
                f"cannot match by {self.match!r}",
                hint='use a module-path glob, "re:expression", "op:kind", a module type or a predicate over nodes',
            )
        if isinstance(self.match, type) and not issubclass(self.match, torch.nn.Module):
            raise RecipeError(f"{self.match.__name__} is no module type", hint="match by a subclass of nn.Module")
        if self.match in ("", "op:", "re:"):
            raise RecipeError("a rule with an empty match", hint='use "*" for the whole model')
        if isinstance(self.match, str) and self.match.startswith("re:"):
            try:
                re.compile(self.match.removeprefix("re:"))
            except re.error as error:
                raise RecipeError(f"{self.match!r} is no regular expression: {error}") from error
        if self.spec is not None and not isinstance(self.spec, QSpec | EdgeSpecs):
            raise RecipeError(f"{self.spec!r} is no spec", hint="use QSpec(...), EdgeSpecs(...) or None")

    @property
    def explicit(self) -> bool:
        """Whether it names edges itself, and so quantizes what the target leaves float."""
        return isinstance(self.spec, EdgeSpecs)

    @property
    def edges(self) -> EdgeSpecs:
        """The rule's spec spelled out per edge; a bare one holds for those that the target quantizes, None for all."""
        if isinstance(self.spec, EdgeSpecs):
            return self.spec
        return EdgeSpecs(input=self.spec, weight=self.spec, output=self.spec)

    @property
    def text(self) -> str:
        """The rule's match as the user would write it."""
        if isinstance(self.match, str):
            return repr(self.match)
        return getattr(self.match, "__qualname__", None) or repr(self.match)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the last one that matches wins, edge by edge.

    Example:
        >>> recipe = Recipe([Rule("classifier", None), Rule("op:conv2d", QSpec(method="entropy"))])
        >>> [rule.text for rule in recipe.rules]
        ["'classifier'", "'op:conv2d'"]

    Raises:
        RecipeError: That is no list of rules.
    """

    rules: Sequence[Rule] = field(default=())

    def __post_init__(self) -> None:
        given: object = self.rules
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise RecipeError(f"a {type(given).__name__} is no list of rules", hint="write Recipe([Rule(...)])")
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise RecipeError(f"{rule!r} is no Rule", hint="write Recipe([Rule(match=..., spec=...), ...])")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe written by :meth:`to_yaml` or by hand.

        Args:
            path: A YAML file: ``rules:`` with a list of ``{match, spec, reason}``; ``spec`` is null, the
                fields of a QSpec, or ``{input, weight, output}`` of such.

        Raises:
            RecipeError: There is no such file, or it does not have that form.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
        if not isinstance(data, Mapping) or set(data) != {"rules"} or not isinstance(data["rules"], list):
            raise RecipeError(f"{path} is no recipe", hint="it needs a list under the key 'rules', and nothing else")
        return cls([_rule_from(row, f"{path}, rule {index}") for index, row in enumerate(data["rules"])])

    def to_yaml(self) -> str:
        """The recipe as YAML text.

        Raises:
            RecipeError: A rule matches by module type or predicate, which text cannot hold.
        """
        rows = []
        for rule in self.rules:
            if not isinstance(rule.match, str):
                raise RecipeError(
                    f"rule {rule.text} matches by a Python object, which YAML cannot hold",
                    hint="match by a module-path glob or an op kind",
                )
            spec = _edges_to(rule.spec) if isinstance(rule.spec, EdgeSpecs) else spec_to(rule.spec)
            rows.append({"match": rule.match, "spec": spec} | ({"reason": rule.reason} if rule.reason else {}))
        return yaml.safe_dump({"rules": rows}, sort_keys=False)


def _edges_to(edges: EdgeSpecs) -> dict[str, Any]:
    values = {name: getattr(edges, name) for name in ROLES}
    return {k: spec_to(v) for k, v in values.items() if v != KEEP} or {"input": KEEP}


def _rule_from(row: Any, where: str) -> Rule:
    if not isinstance(row, Mapping) or not {"match", "spec"} <= set(row) <= {"match", "spec", "reason"}:
        raise RecipeError(f"{where}: {row!r} is no rule", hint="a rule has the keys match, spec and, if wanted, reason")
    match, spec, reason = row["match"], row["spec"], row.get("reason", "")
    if not isinstance(match, str) or not isinstance(reason, str):
        raise RecipeError(f"{where}: match and reason are text", hint="put quotes around them")
    parsed: QSpec | EdgeSpecs | None
    if isinstance(spec, Mapping) and set(spec) & set(ROLES):
        extra = set(spec) - set(ROLES)
        if extra:
            raise RecipeError(f"{where}: {sorted(extra)} beside input, weight, output in {spec!r}")
        parsed = EdgeSpecs(**{k: KEEP if v == KEEP else spec_from(v, where) for k, v in spec.items()})
    else:
        parsed = spec_from(spec, where)
    return Rule(match, parsed, reason)
