"""What a target's data say, part by part: placements, refusals, residual additions, concatenations, heuristics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from .errors import TargetError
from .specs import DTYPES, QSpec

__all__ = [
    "ACTIONS",
    "JOINING",
    "POLICIES",
    "Biases",
    "Concat",
    "Heuristic",
    "Norms",
    "OpPlacement",
    "Refusal",
    "Remainder",
    "Residual",
    "kinds_in",
    "only",
]

POLICIES: Final = ("skip", "none")
ACTIONS: Final = ("advise", "exclude", "ignore")
JOINING: Final = ("all", "any")


@dataclass(frozen=True)
class OpPlacement:
    """Which edges of an op kind get quantizers by default.

    Attributes:
        inputs: Indices of activation arguments.
        weight: Index of the weight argument; None if the op has none.
        weight_axis: Per-channel axis of the weight in PyTorch's layout; None means per-tensor.
        grouped_per_tensor: Whether a grouped weight is quantized per tensor.
        output: Whether the op's own result is quantized.
        joins: Of an op that is quantized only among others that are: whether ``all`` or ``any`` of its inputs have
            to be quantized anyway. None (default) for a weighted op, which is quantized for its own sake.
        rule: Rule id to cite.
        reason: One sentence to give.

    Raises:
        TargetError: An argument is no index, there is no such way to join, or an op with a weight joins.
    """

    inputs: tuple[int, ...] = ()
    weight: int | None = None
    weight_axis: int | None = None
    grouped_per_tensor: bool = False
    output: bool = False
    joins: str | None = None
    rule: str = "R20"
    reason: str = ""

    def __post_init__(self) -> None:
        for index in self.arguments:
            if type(index) is not int or index < 0:
                raise TargetError(
                    f"an operation's edge is {index!r}", hint="count arguments from 0: inputs: [0], weight: 1"
                )
        if self.joins is None:
            return
        _one_of(f"joins of a placement ({self.rule})", self.joins, JOINING)
        if self.weight is not None:
            raise TargetError(
                f"a placement ({self.rule}) has a weight, and joins",
                hint="an op with a weight is quantized for its own sake: leave joins out",
            )

    @property
    def arguments(self) -> tuple[int, ...]:
        """Indices of all arguments that get quantizers."""
        return (*self.inputs, *(() if self.weight is None else (self.weight,)))

    @classmethod
    def read(cls, row: Mapping[str, Any], where: str) -> OpPlacement:
        """From plain data; `where` is what is being read, for messages."""
        given = {k: v for k, v in row.items() if k != "kinds"}
        only(given, {f.name for f in fields(cls)}, where)
        return cls(**{**given, "inputs": tuple(given.get("inputs", ())), "rule": row["rule"], "reason": row["reason"]})


@dataclass(frozen=True)
class Refusal:
    """Specs that the backend refuses in a file: those that agree with every field given here.

    Attributes:
        rule: Rule id.
        reason: One sentence to give.
        fix: What to write instead.
        dtype: Name of a data type; None for any.
        symmetric: Whether the zero point is 0; None for either.

    Raises:
        TargetError: It would refuse everything, or names an unknown data type.
    """

    rule: str
    reason: str
    fix: str
    dtype: str | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype is None and not isinstance(self.symmetric, bool):
            raise TargetError(f"refusal {self.rule} names no spec", hint="give dtype or symmetric: true or false")
        if self.dtype is not None:
            _one_of(f"dtype of refusal {self.rule}", self.dtype, tuple(DTYPES))

    def meets(self, spec: QSpec) -> bool:
        """Whether a complete spec is refused."""
        same_type = self.dtype is None or spec.qdtype.name == self.dtype
        return same_type and self.symmetric in (None, spec.symmetric)

    @classmethod
    def read(cls, row: Mapping[str, Any], where: str) -> Refusal:
        """From plain data; `where` is what is being read, for messages."""
        only(row, {f.name for f in fields(cls)}, where)
        return cls(**row)


@dataclass(frozen=True)
class Remainder:
    """Why operations stay float that the target's data do not name.

    Attributes:
        rule: Rule id to cite.
        reason: One sentence to give.
    """

    rule: str
    reason: str

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> Remainder:
        """From plain data."""
        only(data, {f.name for f in fields(cls)}, where)
        return cls(**data)


@dataclass(frozen=True)
class Residual:
    """How residual additions are quantized.

    Attributes:
        policy: One of :data:`POLICIES`: ``skip`` (only the skip edge is quantized, R23) or ``none``.
        weighted: Op kinds that the backend fuses with an addition of their result.

    Raises:
        TargetError: There is no such policy.
    """

    policy: str = "none"
    weighted: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _one_of("residual policy", self.policy, POLICIES)

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> Residual:
        """From plain data; `where` is what is being read, for messages."""
        only(data, {f.name for f in fields(cls)}, where)
        return cls(data.get("policy", "none"), frozenset(kinds_in(data.get("weighted", []), where)))


@dataclass(frozen=True)
class Biases:
    """Biases that the backend's kernels take as integers, in steps of input scale times weight scale.

    Attributes:
        kinds: Op kinds whose kernels do.
        rule: Rule id to cite.
        reason: One sentence to give.
        ranks: For some of the kinds, how many dimensions the input must have.
    """

    kinds: frozenset[str]
    rule: str
    reason: str
    ranks: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> Biases:
        """From plain data; `where` is what is being read, for messages."""
        only(data, {f.name for f in fields(cls)}, where)
        return cls(**{**data, "kinds": frozenset(kinds_in(data["kinds"], where))})


@dataclass(frozen=True)
class Concat:
    """Which concatenations are quantized although no quantizer follows at once.

    Attributes:
        kinds: Op kinds that concatenate; empty for none.
        through: Op kinds that may stand between their result and the quantizers behind it (R27, R39).
    """

    kinds: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> Concat:
        """From plain data; `where` is what is being read, for messages."""
        only(data, {f.name for f in fields(cls)}, where)
        return cls(**{key: frozenset(kinds_in(kinds, where)) for key, kinds in data.items()})


@dataclass(frozen=True)
class Norms:
    """Normalizations that are no part of the kernel before them.

    Attributes:
        kinds: Op kinds that normalize; empty for none.
        behind: Op kinds whose result is quantized on its way into one (R38).
    """

    kinds: frozenset[str] = frozenset()
    behind: frozenset[str] = frozenset()

    @classmethod
    def read(cls, data: Mapping[str, Any], where: str) -> Norms:
        """From plain data; `where` is what is being read, for messages."""
        only(data, {f.name for f in fields(cls)}, where)
        return cls(**{key: frozenset(kinds_in(kinds, where)) for key, kinds in data.items()})


@dataclass(frozen=True)
class Heuristic:
    """A kernel heuristic: a rule about shapes that the backend runs badly in low precision.

    Attributes:
        rule: Rule id.
        check: Name of the check in :mod:`fxq.passes.advise`.
        kinds: Op kinds that it looks at.
        action: One of :data:`ACTIONS`: ``advise`` (quantize, and say so), ``exclude`` (leave float) or ``ignore``.
        reason: One sentence to give.
        parameters: The check's numbers.
        versions: Versions of the backend that it holds for, as ``">=10.12,<12"``; empty (default) for all.
        compute_capability: Compute capabilities of the GPU that it holds for, likewise.

    Raises:
        TargetError: There is no such action, or a bound is none.
    """

    rule: str
    check: str
    kinds: frozenset[str]
    action: str
    reason: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    versions: str = ""
    compute_capability: str = ""

    def __post_init__(self) -> None:
        _one_of(f"action of heuristic {self.rule}", self.action, ACTIONS)
        for name in ("versions", "compute_capability"):
            _bound(getattr(self, name), f"{name} of heuristic {self.rule}")

    def holds(self, version: Version | None, compute_capability: Version | None) -> bool:
        """Whether its bounds admit these; what is not known (None) is admitted."""
        bounds = ((self.versions, version), (self.compute_capability, compute_capability))
        return all(SpecifierSet(bound).contains(given, prereleases=True) for bound, given in bounds if given)

    @classmethod
    def read(cls, row: Mapping[str, Any], where: str) -> Heuristic:
        """From plain data; `where` is what is being read, for messages."""
        only(row, {f.name for f in fields(cls)}, where)
        return cls(**{**row, "kinds": frozenset(kinds_in(row["kinds"], where))})


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise TargetError(f"{what} is {value!r}", hint=f"use one of {', '.join(known)}")


def _bound(text: str, what: str) -> None:
    try:
        SpecifierSet(text)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        raise TargetError(f"{what} is {text!r}", hint='write it as ">=10.12,<12"') from error


def only(data: Any, known: set[str], where: str) -> None:
    """A key that nobody reads is a typing error, and would change nothing in silence."""
    extra = sorted(map(str, set(data) - known))
    if extra:
        raise TargetError(f"{where}: nothing is called {', '.join(extra)}", hint=f"known: {', '.join(sorted(known))}")


def kinds_in(value: Any, where: str) -> tuple[str, ...]:
    """Names of op kinds, in the file's order; a lone name would be read letter by letter."""
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise TargetError(f"{where}: {value!r} is no list of op kinds", hint="write [conv2d, linear]")
    return tuple(value)
