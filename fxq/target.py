"""What a backend can run, as data.

A target is read from a YAML file, so that another version, another device or another backend is another
file and no code. ``backends/tensorrt.yaml`` is the one to read first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from .errors import RecipeError, TargetError
from .specs import QSpec, spec_from
from .target_files import extended, read_target
from .target_parts import (
    Biases,
    Concat,
    Heuristic,
    Norms,
    OpPlacement,
    Refusal,
    Remainder,
    Residual,
    kinds_in,
    only,
)

__all__ = ["Target"]


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
        separates: Op kinds of packed projections that are written as one for each part (queries, keys, values).
        norms: Normalizations that read INT8 from a convolution before them.
        ties: Op kinds whose inputs and output share one scale (R19, R27).
        absorbs: Op kinds that the quantized op before them computes on its way out, so that the output's quantizer
            belongs behind them (ORT3).
        adds: Op kinds that are a clamped sum, and that integer kernels add up (ORT8).
        decomposes: Op kinds that are written as the simpler ones that the backend has integer kernels for (ORT8).
        rest: Why operations stay float that nothing here names; None takes TensorRT's reasons (R19, R26, R38, R39).
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
    separates: frozenset[str] = frozenset()
    norms: Norms = field(default_factory=Norms)
    ties: frozenset[str] = frozenset()
    absorbs: frozenset[str] = frozenset()
    adds: frozenset[str] = frozenset()
    decomposes: frozenset[str] = frozenset()
    rest: Remainder | None = None
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
        named = [self.residual.weighted, self.concat.kinds, self.concat.through, self.ties, *bias]
        named += [self.absorbs, self.adds, self.decomposes, self.separates, self.norms.kinds]
        named += [self.norms.behind]
        return frozenset(self.ops).union(*named, *(h.kinds for h in self.heuristics))

    @cached_property
    def weighted(self) -> frozenset[str]:
        """The op kinds that are quantized for their own sake: convolutions and matrix products."""
        return frozenset(kind for kind, placement in self.ops.items() if placement.joins is None)

    def require_known(self, key: str, known: Collection[str], form: str) -> None:
        """Refuse what the data want written out and no pass can write.

        Args:
            key: ``"decomposes"`` or ``"adds"``.
            known: The op kinds that can be.
            form: What they are written as.

        Raises:
            TargetError: There is a kind under `key` that is not `known`.
        """
        strange = sorted(getattr(self, key).difference(known))
        if strange:
            raise TargetError(
                f"target {self.name} {key} {', '.join(strange)}, for which fxq knows no {form}",
                hint=f"it knows those of {', '.join(known)}",
            )

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
            name: ``"tensorrt"``, ``"tensorrt-fast"``, ``"onnxruntime"``, ``"onnxruntime-avx2"``, a path that ends in
                ``.yaml``, or a Target.
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
            only(data, {f.name for f in fields(cls)}, where)
            activation, weight = spec_from(data["activation"], where), spec_from(data["weight"], where)
            if activation is None or weight is None:
                raise TargetError(f"{where}: activation and weight need a spec each")
            return cls(
                name=str(data["name"]),
                activation=activation,
                weight=weight,
                ops={
                    kind: OpPlacement.read(row, where) for row in data["ops"] for kind in kinds_in(row["kinds"], where)
                },
                residual=Residual.read(data.get("residual", {}), where),
                concat=Concat.read(data.get("concat", {}), where),
                separates=frozenset(kinds_in(data.get("separates", []), where)),
                norms=Norms.read(data.get("norms", {}), where),
                ties=frozenset(kinds_in(data.get("ties", []), where)),
                absorbs=frozenset(kinds_in(data.get("absorbs", []), where)),
                adds=frozenset(kinds_in(data.get("adds", []), where)),
                decomposes=frozenset(kinds_in(data.get("decomposes", []), where)),
                heuristics=tuple(Heuristic.read(row, where) for row in data.get("heuristics", ())),
                refuses=tuple(Refusal.read(row, where) for row in data.get("refuses", ())),
                bias=Biases.read(data["bias"], where) if data.get("bias") is not None else None,
                rest=Remainder.read(data["rest"], where) if data.get("rest") is not None else None,
                rules=str(data.get("rules", "R")),
            )
        except (KeyError, TypeError, AttributeError, RecipeError) as error:
            raise TargetError(
                f"{where}: not a target ({type(error).__name__}: {error})",
                hint="compare it with backends/tensorrt.yaml",
            ) from error


def _version(text: str | None, what: str) -> Version | None:
    try:
        return None if text is None else Version(text)
    except (InvalidVersion, TypeError, AttributeError) as error:
        raise TargetError(f"{what} is {text!r}, which is no version", hint='write it as "11.4" or "8.6"') from error
