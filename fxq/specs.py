"""How one tensor is quantized: data types, granularities, calibration methods, and the spec of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from .errors import RecipeError

__all__ = [
    "DTYPES",
    "METHODS",
    "Granularity",
    "Method",
    "PerChannel",
    "PerTensor",
    "QDType",
    "QSpec",
    "spec_from",
    "spec_to",
]


@dataclass(frozen=True)
class QDType:
    """A quantized data type.

    Attributes:
        name: ONNX-style name (``int8``, ``uint8``, ``int4``, ``float8_e4m3fn``).
        qmin: Smallest value that quantization gives (rule R10: INT8 clamps to [-128, 127]).
        qmax: Largest value; a symmetric scale is ``amax / qmax``.
        storage: The torch dtype that holds it.
    """

    name: str
    qmin: float
    qmax: float
    storage: torch.dtype

    @property
    def floating(self) -> bool:
        """Whether values are floating point, so that there is nothing to round to integers."""
        return self.storage.is_floating_point


DTYPES: Final[Mapping[str, QDType]] = {
    d.name: d
    for d in (
        QDType("int8", -128, 127, torch.int8),
        QDType("uint8", 0, 255, torch.uint8),
        QDType(
            "int7", -64, 63, torch.int8
        ),  # int8 of half the range, for kernels that add pairs of products in 16 bits
        QDType("int4", -8, 7, torch.int8),
        QDType("uint4", 0, 15, torch.uint8),
        QDType("int2", -2, 1, torch.int8),
        QDType("int16", -32768, 32767, torch.int16),
        QDType("int32", -(2**31), 2**31 - 1, torch.int32),
        QDType("float8_e4m3fn", -448, 448, torch.float8_e4m3fn),
    )
}
"""The quantized data types by name."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along an axis.

    Attributes:
        axis: The axis; None (default) takes the output-channel axis of the operation that reads the tensor:
            0 for convolutions and linear layers, 1 for transposed convolutions (R16).
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise RecipeError(f"per-channel axis {self.axis!r} is no dimension", hint="give an int, or None")


Granularity: TypeAlias = PerTensor | PerChannel
GRANULARITIES: Final[Mapping[str, Granularity]] = {"per-tensor": PerTensor(), "per-channel": PerChannel()}

METHODS: Final = ("max", "moving-average", "percentile", "entropy", "mse", "auto")
"""How a range is taken from what calibration saw."""


@dataclass(frozen=True)
class Method:
    """How the range of a tensor is taken from calibration statistics.

    Attributes:
        name: One of :data:`METHODS`.
        percentile: For ``percentile``: the share of values inside the range, in percent, in (50, 100].
        momentum: For ``moving-average``: the weight of the newest batch, in (0, 1].
    """

    name: str
    percentile: float = 99.99
    momentum: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise RecipeError(f"unknown calibration method {self.name!r}", hint=f"use one of {', '.join(METHODS)}")
        for name in ("percentile", "momentum"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(f"{name} {value!r} is no number")
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"percentile {self.percentile} is not in (50, 100]")
        if not 0 < self.momentum <= 1:
            raise RecipeError(f"momentum {self.momentum} is not in (0, 1]")


@dataclass(frozen=True)
class QSpec:
    """How one tensor is quantized.

    A field left at None is filled from the target's spec for the edge in question, so
    ``QSpec(method="entropy")`` changes the calibration and nothing else.

    Attributes:
        dtype: A name in :data:`DTYPES`.
        symmetric: Whether the zero point is 0 (R9: TensorRT takes nothing else).
        granularity: ``"per-tensor"``, ``"per-channel"``, :class:`PerTensor` or :class:`PerChannel`.
        method: A name in :data:`METHODS` or a :class:`Method`.

    Raises:
        RecipeError: A field holds no known value, or an FP8 type is to have a zero point.
    """

    dtype: QDType | str | None = None
    symmetric: bool | None = None
    granularity: Granularity | str | None = None
    method: Method | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):
            if self.dtype not in DTYPES:
                raise RecipeError(f"unknown dtype {self.dtype!r}", hint=f"use one of {', '.join(DTYPES)}")
            object.__setattr__(self, "dtype", DTYPES[self.dtype])
        if isinstance(self.granularity, str):
            if self.granularity not in GRANULARITIES:
                raise RecipeError(
                    f"unknown granularity {self.granularity!r}", hint=f"use one of {', '.join(GRANULARITIES)}"
                )
            object.__setattr__(self, "granularity", GRANULARITIES[self.granularity])
        if isinstance(self.method, str):
            object.__setattr__(self, "method", Method(self.method))
        self._check()

    def _check(self) -> None:
        kinds: dict[str, Any] = {
            "dtype": QDType,
            "symmetric": bool,
            "granularity": PerTensor | PerChannel,
            "method": Method,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise RecipeError(f"{name}={value!r} means nothing in a QSpec", hint="see the docstring of QSpec")
        if isinstance(self.dtype, QDType) and self.dtype.floating and self.symmetric is False:
            raise RecipeError(f"{self.dtype.name} has no zero point", hint="use symmetric=True")

    def over(self, default: QSpec) -> QSpec:
        """This spec with every None filled from `default`.

        An FP8 dtype over an asymmetric default is symmetric: it has no zero point. An unsigned dtype over a
        symmetric default is asymmetric: with a zero point of 0 it would lose all that is negative.
        """
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(self.dtype, QDType) and self.dtype.floating:
            mine["symmetric"] = True
        elif isinstance(self.dtype, QDType) and self.dtype.qmin == 0 and self.symmetric is None:
            mine["symmetric"] = False
        return dataclasses.replace(default, **{k: v for k, v in mine.items() if v is not None})

    @property
    def complete(self) -> bool:
        """Whether no field is left open."""
        return None not in (self.dtype, self.symmetric, self.granularity, self.method)

    @property
    def qdtype(self) -> QDType:
        """The data type of a complete spec."""
        if not isinstance(self.dtype, QDType):
            raise RecipeError("this QSpec has no dtype", hint="complete it with spec.over(target.activation)")
        return self.dtype

    @property
    def axis(self) -> int | None:
        """The per-channel axis of a complete spec; None for per-tensor."""
        return self.granularity.axis if isinstance(self.granularity, PerChannel) else None

    @property
    def calibration(self) -> Method:
        """The calibration method of a complete spec."""
        if not isinstance(self.method, Method):
            raise RecipeError("this QSpec has no method", hint="complete it with spec.over(target.activation)")
        return self.method

    def __str__(self) -> str:
        parts = [self.dtype.name if isinstance(self.dtype, QDType) else "?"]
        if self.symmetric is False:
            parts.append("asymmetric")
        if isinstance(self.granularity, PerChannel):
            parts.append("per-channel" if self.axis is None else f"per-channel({self.axis})")
        elif self.granularity is not None:
            parts.append("per-tensor")
        if isinstance(self.method, Method):
            parts.append(self.method.name)
        return " ".join(parts)


def spec_to(spec: QSpec | None) -> dict[str, Any] | None:
    """A spec as plain data, which :func:`spec_from` reads back; None for None."""
    if spec is None:
        return None
    out: dict[str, Any] = {}
    if isinstance(spec.dtype, QDType):
        out["dtype"] = spec.dtype.name
    if spec.symmetric is not None:
        out["symmetric"] = spec.symmetric
    if isinstance(spec.granularity, PerChannel) and spec.granularity.axis is not None:
        out["granularity"] = {"per-channel": spec.granularity.axis}
    elif spec.granularity is not None:
        out["granularity"] = "per-channel" if isinstance(spec.granularity, PerChannel) else "per-tensor"
    if isinstance(spec.method, Method):
        extra = {
            f.name: getattr(spec.method, f.name)
            for f in dataclasses.fields(Method)
            if f.name != "name" and getattr(spec.method, f.name) != f.default
        }
        out["method"] = {"name": spec.method.name, **extra} if extra else spec.method.name
    return out


def spec_from(data: Any, where: str) -> QSpec | None:
    """A QSpec from plain data, as YAML files hold it.

    Args:
        data: None or a mapping with the keys of :class:`QSpec`; ``granularity: {per-channel: 1}`` names an
            axis, ``method: {name: percentile, percentile: 99.9}`` names a method's options.
        where: What is being read, for messages.

    Raises:
        RecipeError: The data has another form.
    """
    if data is None:
        return None
    known = {f.name for f in dataclasses.fields(QSpec)}
    if not isinstance(data, Mapping) or set(data) - known:
        raise RecipeError(f"{where}: {data!r} is no spec", hint=f"its keys are {', '.join(sorted(known))}")
    fields = dict(data)
    granularity, method = fields.get("granularity"), fields.get("method")
    if isinstance(granularity, Mapping):
        if set(granularity) != {"per-channel"}:
            raise RecipeError(f"{where}: {granularity!r} is no granularity", hint="write {per-channel: axis}")
        fields["granularity"] = PerChannel(granularity["per-channel"])
    if isinstance(method, Mapping):
        try:
            fields["method"] = Method(**method)
        except TypeError as error:
            raise RecipeError(f"{where}: {method!r} is no method ({error})") from error
    return QSpec(**fields)
