"""What a backend can run, as data.

A target is read from a YAML file, so that another version, another device or another backend is another
file and no code. ``backends/tensorrt.yaml`` is the one to read first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from .errors import RecipeError, TargetError
from .specs import DTYPES, QSpec, spec_from
from .target_files import extended, read_target

__all__ = [
    "ACTIONS",
    "JOINING",
    "POLICIES",
    "Biases",
    "Concat",
    "Heuristic",
    "OpPlacement",
    "Refusal",
    "Residual",
    "Target",
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


@dataclass(frozen=True)
class Concat:
    """Which concatenations are quantized although no quantizer follows at once.

    Attributes:
        kinds: Op kinds that concatenate; empty for none.
        through: Op kinds that may stand between their result and the quantizers behind it (R27, R39).
    """

    kinds: frozenset[str] = frozenset()
    through: frozenset[str] = frozenset()


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


@dataclass(frozen=True)
class Target:
    """A backend's abilities and preferences.

    Attributes:
        name: What users call it.
        activation: Default spec of activations, complete.
        weight: Default spec of weights, complete.
        ops: Op kind to placement.
        residual: How residual additions are treated.
        concat: Which concatenations are quantized for the sake of what lies behind their readers.
        ties: Op kinds whose inputs and output share one scale (R19, R27).
        absorbs: Op kinds that the quantized op before them computes on its way out, so that the output's quantizer
            belongs behind them (ORT3).
        heuristics: Shape rules.
        refuses: Specs that a recipe may not ask for.
        bias: Which biases are stored as integers; None leaves all of them float (R17).
        rules: The family of rules that files for this backend are checked by.

    Raises:
        TargetError: A default spec is incomplete.
    """

    name: str
    activation: QSpec
    weight: QSpec
    ops: Mapping[str, OpPlacement]
    residual: Residual = field(default_factory=Residual)
    concat: Concat = field(default_factory=Concat)
    ties: frozenset[str] = frozenset()
    absorbs: frozenset[str] = frozenset()
    heuristics: tuple[Heuristic, ...] = ()
    refuses: tuple[Refusal, ...] = ()
    bias: Biases | None = None
    rules: str = "R"

    def __post_init__(self) -> None:
        for name in ("activation", "weight"):
            if not getattr(self, name).complete:
                raise TargetError(
                    f"target {self.name}: its {name} spec leaves something open",
                    hint="give dtype, symmetric, granularity and method",
                )

    @property
    def kinds(self) -> frozenset[str]:
        """Every op kind that its data names."""
        bias = [self.bias.kinds] if self.bias is not None else []
        named = [self.residual.weighted, self.concat.kinds, self.concat.through, self.ties, self.absorbs, *bias]
        return frozenset(self.ops).union(*named, *(h.kinds for h in self.heuristics))

    @cached_property
    def weighted(self) -> frozenset[str]:
        """The op kinds that are quantized for their own sake: convolutions and matrix products."""
        return frozenset(kind for kind, placement in self.ops.items() if placement.joins is None)

    def at(self, version: str | None = None, compute_capability: str | None = None) -> Target:
        """This target with the heuristics that hold for one version and one GPU.

        Args:
            version: The backend's version, such as ``"11.4"``; None (default) if it is not known.
            compute_capability: The GPU's, such as ``"8.6"``; None (default) if it is not known.

        Returns:
            A target without the heuristics whose bounds exclude what is known.

        Raises:
            TargetError: That is no version.
        """
        known = _version(version, "version"), _version(compute_capability, "compute_capability")
        return replace(self, heuristics=tuple(h for h in self.heuristics if h.holds(*known)))

    @classmethod
    def load(
        cls, name: str | Path | Target, *, version: str | None = None, compute_capability: str | None = None
    ) -> Target:
        """A target by the name of one of fxq's own, or from a YAML file.

        Args:
            name: ``"tensorrt"``, ``"tensorrt-fast"``, a path that ends in ``.yaml``, or a Target.
            version: The backend's version, as for :meth:`at`.
            compute_capability: The GPU's compute capability, as for :meth:`at`.

        Raises:
            TargetError: There is no such target, its data is wrong, or target files extend each other.
        """
        if not isinstance(name, Target):
            name = cls.from_data(read_target(name), str(name))
        return name if version is None and compute_capability is None else name.at(version, compute_capability)

    @classmethod
    def from_data(cls, data: Any, where: str) -> Target:
        """A target from plain data.

        Args:
            data: The mapping that the YAML file holds; what it ``extends`` is read from there.
            where: What is being read, for messages.

        Raises:
            TargetError: The data is wrong.
        """
        try:
            data = extended(data, where)
            if not isinstance(data, Mapping):
                raise TargetError(f"{where}: it holds no mapping", hint="compare it with backends/tensorrt.yaml")
            _only(data, {f.name for f in fields(cls)}, where)
            activation, weight = spec_from(data["activation"], where), spec_from(data["weight"], where)
            if activation is None or weight is None:
                raise TargetError(f"{where}: activation and weight need a spec each")
            return cls(
                name=str(data["name"]),
                activation=activation,
                weight=weight,
                ops={kind: _placement(row, where) for row in data["ops"] for kind in _kinds(row["kinds"], where)},
                residual=_residual(data.get("residual", {}), where),
                concat=_concat(data.get("concat", {}), where),
                ties=frozenset(_kinds(data.get("ties", []), where)),
                absorbs=frozenset(_kinds(data.get("absorbs", []), where)),
                heuristics=tuple(_heuristic(row, where) for row in data.get("heuristics", ())),
                refuses=tuple(_refusal(row, where) for row in data.get("refuses", ())),
                bias=_biases(data["bias"], where) if data.get("bias") is not None else None,
                rules=str(data.get("rules", "R")),
            )
        except (KeyError, TypeError, AttributeError, RecipeError) as error:
            raise TargetError(
                f"{where}: not a target ({type(error).__name__}: {error})",
                hint="compare it with backends/tensorrt.yaml",
            ) from error


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise TargetError(f"{what} is {value!r}", hint=f"use one of {', '.join(known)}")


def _bound(text: str, what: str) -> None:
    try:
        SpecifierSet(text)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        raise TargetError(f"{what} is {text!r}", hint='write it as ">=10.12,<12"') from error


def _version(text: str | None, what: str) -> Version | None:
    try:
        return None if text is None else Version(text)
    except (InvalidVersion, TypeError, AttributeError) as error:
        raise TargetError(f"{what} is {text!r}, which is no version", hint='write it as "11.4" or "8.6"') from error


def _only(data: Any, known: set[str], where: str) -> None:
    """A key that nobody reads is a typing error, and would change nothing in silence."""
    extra = sorted(map(str, set(data) - known))
    if extra:
        raise TargetError(f"{where}: nothing is called {', '.join(extra)}", hint=f"known: {', '.join(sorted(known))}")


def _kinds(value: Any, where: str) -> tuple[str, ...]:
    """Names of op kinds, in the file's order; a lone name would be read letter by letter."""
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise TargetError(f"{where}: {value!r} is no list of op kinds", hint="write [conv2d, linear]")
    return tuple(value)


def _placement(row: Mapping[str, Any], where: str) -> OpPlacement:
    given = {k: v for k, v in row.items() if k != "kinds"}
    _only(given, {f.name for f in fields(OpPlacement)}, where)
    return OpPlacement(
        **{**given, "inputs": tuple(given.get("inputs", ())), "rule": row["rule"], "reason": row["reason"]}
    )


def _residual(data: Mapping[str, Any], where: str) -> Residual:
    _only(data, {f.name for f in fields(Residual)}, where)
    return Residual(data.get("policy", "none"), frozenset(_kinds(data.get("weighted", []), where)))


def _concat(data: Mapping[str, Any], where: str) -> Concat:
    _only(data, {f.name for f in fields(Concat)}, where)
    return Concat(**{key: frozenset(_kinds(kinds, where)) for key, kinds in data.items()})


def _heuristic(row: Mapping[str, Any], where: str) -> Heuristic:
    _only(row, {f.name for f in fields(Heuristic)}, where)
    return Heuristic(**{**row, "kinds": frozenset(_kinds(row["kinds"], where))})


def _biases(data: Mapping[str, Any], where: str) -> Biases:
    _only(data, {f.name for f in fields(Biases)}, where)
    return Biases(**{**data, "kinds": frozenset(_kinds(data["kinds"], where))})


def _refusal(row: Mapping[str, Any], where: str) -> Refusal:
    _only(row, {f.name for f in fields(Refusal)}, where)
    return Refusal(**row)
