"""Target files as plain data: where they are found, and how one extends another."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import yaml

from .errors import TargetError

__all__ = ["extended", "read_target"]

_ENDINGS: Final = (".yaml", ".yml")
_ADDED: Final = ("ops", "overrides")
"""Keys of an extending file that do not simply replace what it extends."""


def read_target(name: str | Path, folder: Path | None = None, seen: tuple[str, ...] = ()) -> Any:
    """The data of one target, with what it extends merged in.

    Args:
        name: The name of one of fxq's own targets, or a path that ends in ``.yaml`` or ``.yml``.
        folder: What a relative path starts from; None is the current folder.
        seen: The files that led here, by extending it.

    Raises:
        TargetError: There is no such target, its file is unreadable, or target files extend each other.
    """
    if str(name).endswith(_ENDINGS):
        path = (folder or Path()) / name
        key, data, beside = str(path.resolve()), _read(path), path.parent
    else:
        key, data, beside = str(name), _own(str(name)), Path()
    if key in seen:
        raise TargetError(
            f"target files extend each other: {' -> '.join((*seen[seen.index(key) :], key))}",
            hint="let one of them extend no other, or one of fxq's own targets",
        )
    return extended(data, str(name), beside, (*seen, key))


def extended(data: Any, where: str, folder: Path | None = None, seen: tuple[str, ...] = ()) -> Any:
    """`data` itself, or merged over the target that it ``extends``.

    Rows of ``ops`` come behind the base's, so that they hold for the kinds they name; ``overrides`` change
    heuristics one by one; any other key replaces the base's. The name is never inherited.

    Args:
        data: The mapping that a target file holds.
        where: What is being read, for messages.
        folder: What a relative path in ``extends`` starts from; None is the current folder.
        seen: The files that led here, by extending it.

    Raises:
        TargetError: The base cannot be read, or an override fits no heuristic.
    """
    if not isinstance(data, Mapping) or "extends" not in data:
        return data
    if not isinstance(data["extends"], str):
        raise TargetError(
            f"{where}: it extends {data['extends']!r}", hint="give one target's name, or the path of one .yaml file"
        )
    base = read_target(data["extends"], folder, seen)
    if not isinstance(base, Mapping):
        raise TargetError(f"{where}: what it extends, {data['extends']}, is not a target")
    own = {key: value for key, value in data.items() if key not in (*_ADDED, "extends")}
    merged = {**{key: value for key, value in base.items() if key != "name"}, **own}
    merged["ops"] = [*_rows(base, "ops", where), *_rows(data, "ops", where)]
    for override in _rows(data, "overrides", where):
        merged["heuristics"] = _overridden(_rows(merged, "heuristics", where), override, where)
    return merged


def _overridden(rows: list[Mapping[str, Any]], override: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """The heuristics with one override: its rule, and its check if it has one, say which rows change."""
    chosen = {key: override[key] for key in ("rule", "check") if key in override}
    fits = [all(row.get(key) == value for key, value in chosen.items()) for row in rows]
    if "rule" not in chosen or not any(fits):
        known = dict.fromkeys(f"{row.get('rule')} ({row.get('check')})" for row in rows)
        raise TargetError(
            f"{where}: the override of {' '.join(map(str, chosen.values())) or 'nothing'} fits no heuristic",
            hint=f"name one by rule, and check where the rule has several: {', '.join(known)}",
        )
    numbers = override.get("parameters", {})
    if not isinstance(numbers, Mapping):
        raise TargetError(f"{where}: parameters {numbers!r} are no mapping", hint="write parameters: {few: 32}")
    return [
        {**row, **override, "parameters": {**row.get("parameters", {}), **numbers}} if fit else row
        for row, fit in zip(rows, fits, strict=True)
    ]


def _rows(data: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    rows = data.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise TargetError(f"{where}: {key} is no list of mappings", hint="compare it with backends/tensorrt.yaml")
    return rows


def _own(name: str) -> Any:
    folder = resources.files("fxq.backends")
    known = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    if name not in known:
        raise TargetError(f"unknown target {name!r}", hint=f"use one of {', '.join(known)} or a .yaml file")
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TargetError(f"cannot read the target file {path}: {error}") from error
