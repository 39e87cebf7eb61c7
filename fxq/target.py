"""What a backend can run, as data.

A target is read from a YAML file, so that another version, another device or another backend is another
file and no code. ``backends/tensorrt.yaml`` is the one to read first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from .errors import RecipeError, TargetError
from .specs import QSpec, spec_from

__all__ = ["ACTIONS", "POLICIES", "Heuristic", "OpPlacement", "Residual", "Target"]

POLICIES: Final = ("skip", "none")
ACTIONS: Final = ("advise", "exclude")


@dataclass(frozen=True)
class OpPlacement:
    """Which edges of an op kind get quantizers by default.

    Attributes:
        inputs: Indices of activation arguments.
        weight: Index of the weight argument; None if the op has none.
        weight_axis: Per-channel axis of the weight in PyTorch's layout; None means per-tensor.
        grouped_per_tensor: Whether a grouped weight is quantized per tensor.
        output: Whether the op's own result is quantized.
        rule: Rule id to cite.
        reason: One sentence to give.
    """

    inputs: tuple[int, ...] = ()
    weight: int | None = None
    weight_axis: int | None = None
    grouped_per_tensor: bool = False
    output: bool = False
    rule: str = "R20"
    reason: str = ""


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
class Heuristic:
    """A kernel heuristic: a rule about shapes that the backend runs badly in low precision.

    Attributes:
        rule: Rule id.
        check: Name of the check in :mod:`fxq.passes.advise`.
        kinds: Op kinds that it looks at.
        action: One of :data:`ACTIONS`: ``advise`` (quantize, and say so) or ``exclude``.
        reason: One sentence to give.
        parameters: The check's numbers.

    Raises:
        TargetError: There is no such action.
    """

    rule: str
    check: str
    kinds: frozenset[str]
    action: str
    reason: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of(f"action of heuristic {self.rule}", self.action, ACTIONS)


@dataclass(frozen=True)
class Target:
    """A backend's abilities and preferences.

    Attributes:
        name: What users call it.
        activation: Default spec of activations, complete.
        weight: Default spec of weights, complete.
        ops: Op kind to placement.
        residual: How residual additions are treated.
        ties: Op kinds whose inputs and output share one scale (R19, R27).
        heuristics: Shape rules.

    Raises:
        TargetError: A default spec is incomplete.
    """

    name: str
    activation: QSpec
    weight: QSpec
    ops: Mapping[str, OpPlacement]
    residual: Residual = field(default_factory=Residual)
    ties: frozenset[str] = frozenset()
    heuristics: tuple[Heuristic, ...] = ()

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
        named = [self.residual.weighted, self.ties, *(h.kinds for h in self.heuristics)]
        return frozenset(self.ops).union(*named)

    @classmethod
    def load(cls, name: str | Path | Target) -> Target:
        """A target by the name of one of fxq's own, or from a YAML file.

        Args:
            name: ``"tensorrt"``, a path that ends in ``.yaml``, or a Target, which is returned.

        Raises:
            TargetError: There is no such target or its data is wrong.
        """
        if isinstance(name, Target):
            return name
        if str(name).endswith((".yaml", ".yml")):
            return cls.from_data(_read(Path(name)), str(name))
        folder = resources.files("fxq.backends")
        known = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
        if str(name) not in known:
            raise TargetError(f"unknown target {str(name)!r}", hint=f"use one of {', '.join(known)} or a .yaml file")
        return cls.from_data(yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")), str(name))

    @classmethod
    def from_data(cls, data: Any, where: str) -> Target:
        """A target from plain data.

        Args:
            data: The mapping that the YAML file holds.
            where: What is being read, for messages.

        Raises:
            TargetError: The data is wrong.
        """
        try:
            _only(data, {f.name for f in fields(cls)}, where)
            activation, weight = spec_from(data["activation"], where), spec_from(data["weight"], where)
            if activation is None or weight is None:
                raise TargetError(f"{where}: activation and weight need a spec each")
            return cls(
                name=str(data["name"]),
                activation=activation,
                weight=weight,
                ops={kind: _placement(row, where) for row in data["ops"] for kind in row["kinds"]},
                residual=_residual(data.get("residual", {}), where),
                ties=frozenset(data.get("ties", ())),
                heuristics=tuple(_heuristic(row, where) for row in data.get("heuristics", ())),
            )
        except (KeyError, TypeError, AttributeError, RecipeError) as error:
            raise TargetError(
                f"{where}: not a target ({type(error).__name__}: {error})",
                hint="compare it with backends/tensorrt.yaml",
            ) from error


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TargetError(f"cannot read the target file {path}: {error}") from error


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise TargetError(f"{what} is {value!r}", hint=f"use one of {', '.join(known)}")


def _only(data: Any, known: set[str], where: str) -> None:
    """A key that nobody reads is a typing error, and would change nothing in silence."""
    extra = sorted(map(str, set(data) - known))
    if extra:
        raise TargetError(f"{where}: nothing is called {', '.join(extra)}", hint=f"known: {', '.join(sorted(known))}")


def _placement(row: Mapping[str, Any], where: str) -> OpPlacement:
    given = {k: v for k, v in row.items() if k != "kinds"}
    _only(given, {f.name for f in fields(OpPlacement)}, where)
    return OpPlacement(
        **{**given, "inputs": tuple(given.get("inputs", ())), "rule": row["rule"], "reason": row["reason"]}
    )


def _residual(data: Mapping[str, Any], where: str) -> Residual:
    _only(data, {f.name for f in fields(Residual)}, where)
    return Residual(data.get("policy", "none"), frozenset(data.get("weighted", ())))


def _heuristic(row: Mapping[str, Any], where: str) -> Heuristic:
    _only(row, {f.name for f in fields(Heuristic)}, where)
    return Heuristic(**{**row, "kinds": frozenset(row["kinds"])})
