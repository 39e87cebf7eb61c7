"""Ranges from files: JSON of tensor name to amax, and TensorRT's calibration cache."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

from .errors import CalibrationError

__all__ = ["Amax", "read_amax", "read_tensorrt_cache"]

_INT8: Final = 127.0

Amax = float | Sequence[float]
"""The largest magnitude of a tensor, or of each of its channels."""


def read_amax(path: str | PathLike[str]) -> dict[str, Amax]:
    """Read tensor names and their amax from JSON, as :func:`fxq.calibration_io.write_amax` and other tools write it.

    Raises:
        CalibrationError: It is not JSON of that form; the first wrong entry is named.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CalibrationError(f"{path} holds a {type(found).__name__}, not an object of tensor name to amax")
    for name, value in found.items():
        values = value if isinstance(value, list) else [value]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if not values or not numbers or not all(0 <= v < math.inf for v in values):
            raise CalibrationError(
                f"{path}: the amax of {name} is {value!r}", hint="give a number from 0 on, or a list of them"
            )
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def read_tensorrt_cache(path: str | PathLike[str]) -> dict[str, Amax]:
    """Read the calibration cache that TensorRT's INT8 calibrators wrote (before release 11).

    It is text: a line such as ``TRT-8601-EntropyCalibration2``, then ``name: 3c010a14`` for each tensor, the
    bits of its float32 scale in hexadecimal, most significant first. The scale is amax / 127.

    Returns:
        Tensor name to amax.

    Raises:
        CalibrationError: A line is not of that form; it is named.
    """
    try:
        first, *lines = Path(path).read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if not first.startswith("TRT-"):
        raise CalibrationError(
            f"{path} begins with {first!r}, not with TRT- and a version", hint="is it a calibration cache?"
        )
    found: dict[str, Amax] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        name, separator, bits = line.rpartition(":")
        try:
            scale = struct.unpack(">f", bytes.fromhex(bits.strip().zfill(8)))[0]
        except (ValueError, struct.error):
            scale = math.nan
        name = name.strip()
        if not separator or not name or not 0 <= scale < math.inf:
            raise CalibrationError(f"{path}, line {number}: {line!r} is no name and scale in hexadecimal")
        if name in found:
            raise CalibrationError(f"{path}, line {number}: {name} is there twice", hint="are these two caches in one?")
        found[name] = scale * _INT8
    if not found:
        raise CalibrationError(f"{path} names no tensor", hint="did calibration finish when it was written?")
    return found
