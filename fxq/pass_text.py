"""Passes and their options as text, and read back from it: ``residual-add``, ``cap{limit=6.0, mode='hard'}``.

Options are Python literals, ``inf``, ``nan``, torch's dtypes, frozen dataclasses and enum members that the pass's own
module knows by name, and tuples, lists, sets and dicts of all these. Text is never executed.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import math
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .errors import PassError
from .passbase import Pass

__all__ = ["loaded_passes", "parse_passes"]

_LITERALS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan, "frozenset()": frozenset(), "set()": set()}
_NAME = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*")


def parse_passes(text: str, passes: Iterable[type[Pass]] = ()) -> tuple[str, tuple[Pass, ...]]:
    """Read ``name(pass, pass{option=value}, …)``, which ``str(pipeline)`` writes.

    Args:
        text: The text.
        passes: Classes to take before those that are loaded, for names that several have.

    Returns:
        The pipeline's name and its passes.

    Raises:
        PassError: The text has another form, or names a pass or an option that does not exist.
    """
    name, at = _word(text, 0)
    if text[at : at + 1] != "(" or not text.rstrip().endswith(")"):
        raise _wrong(text, at, "a pipeline is written name(pass, pass{option=value})")
    end = len(text.rstrip()) - 1
    registry = loaded_passes(passes)
    made: list[Pass] = []
    at += 1
    while text[at:end].strip():
        if made:
            if text[at] != ",":
                raise _wrong(text, at, "passes are separated by commas")
            at += 1
        called, at = _word(text, at)
        options, at = _options(text, at) if text[at] == "{" else ("", at)
        made.append(_make(called, options, registry))
        at += len(text[at:end]) - len(text[at:end].lstrip())
    return name, tuple(made)


def loaded_passes(first: Iterable[type[Pass]] = ()) -> dict[str, tuple[type[Pass], ...]]:
    """Name to the concrete pass classes of that name; to the one in `first` if that has one."""
    given = {kind.name: (kind,) for kind in first}
    found: dict[str, tuple[type[Pass], ...]] = {}
    for kind in _subclasses(Pass):  # type: ignore[type-abstract]
        name = getattr(kind, "name", None)
        if isinstance(name, str) and not kind.__abstractmethods__ and not _redefined(kind):
            found[name] = (*found.get(name, ()), kind)
    return {**found, **given}


def _redefined(kind: type[Pass]) -> bool:
    """Whether another class has taken its place, as when a notebook's cell runs twice."""
    now: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        now = getattr(now, part, None)
    return isinstance(now, type) and now is not kind


def _subclasses(kind: type[Pass]) -> Iterator[type[Pass]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _word(text: str, at: int) -> tuple[str, int]:
    found = _NAME.match(text, at)
    if found is None:
        raise _wrong(text, at, "a name is expected there")
    return found[1], found.end()


def _wrong(text: str, at: int, hint: str) -> PassError:
    return PassError(f"the text of a pipeline cannot be read at {text[at : at + 20]!r}", hint=hint)


def _options(text: str, at: int) -> tuple[str, int]:
    """What the braces that open at `at` hold, and where the text goes on."""
    end = text.find("}", at)
    while end >= 0:
        inner = text[at + 1 : end]
        try:
            ast.parse(f"dict({inner})", mode="eval")
        except SyntaxError:
            end = text.find("}", end + 1)
        else:
            return inner, end + 1
    raise _wrong(text, at, "options are written {name=value, name=value}")


def _make(name: str, options: str, registry: dict[str, tuple[type[Pass], ...]]) -> Pass:
    kinds = registry.get(name, ())
    if not kinds:
        raise PassError(
            f"no pass is called {name!r}",
            hint=f"import the module that defines it; loaded are {', '.join(sorted(registry))}",
        )
    if len(kinds) > 1:
        where = ", ".join(f"{k.__module__}.{k.__qualname__}" for k in kinds)
        raise PassError(f"several passes are called {name!r}: {where}", hint="pass the one you mean as passes=[...]")
    (kind,) = kinds
    call = ast.parse(f"dict({options})", mode="eval").body
    assert isinstance(call, ast.Call)
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in values:
            said = f"{{{options}}} spreads a mapping" if keyword.arg is None else f"{keyword.arg} is given twice"
            raise PassError(f"pass {name}: {said}", hint="options are written name=value, each once")
        if keyword.arg not in known:
            raise PassError(
                f"pass {name} has no option {keyword.arg!r}",
                hint=f"it has {', '.join(sorted(known)) or 'none'}",
            )
        values[keyword.arg] = _value(keyword.value, kind)
    if call.args:
        raise PassError(f"pass {name}: options are written name=value, not {ast.unparse(call.args[0])}")
    try:
        return kind(**values)
    except TypeError as error:
        raise PassError(f"pass {name} cannot be made with {{{options}}}: {error}") from error


def _value(tree: ast.expr, kind: type[Pass]) -> Any:
    """A literal, a dataclass or enum member of the pass's module, or a container of such."""
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and not tree.args:
        made = getattr(sys.modules[kind.__module__], tree.func.id, None)
        named = all(k.arg is not None for k in tree.keywords)
        if isinstance(made, type) and dataclasses.is_dataclass(made) and named:
            try:
                return made(**{str(k.arg): _value(k.value, kind) for k in tree.keywords})
            except TypeError as error:
                raise PassError(f"{ast.unparse(tree)} cannot be made: {error}") from error
    if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name):
        owner = getattr(sys.modules[kind.__module__], tree.value.id, None)
        if isinstance(owner, type) and issubclass(owner, enum.Enum) and tree.attr in owner.__members__:
            return owner[tree.attr]
        if tree.value.id == "torch" and isinstance(getattr(torch, tree.attr, None), torch.dtype):
            return getattr(torch, tree.attr)
    if isinstance(tree, ast.Tuple | ast.List | ast.Set | ast.Dict):
        return _container(tree, kind)
    if isinstance(tree, ast.Call) and ast.unparse(tree.func) == "frozenset" and len(tree.args) == 1:
        return frozenset(_value(tree.args[0], kind))
    if ast.unparse(tree) in _LITERALS:
        return _LITERALS[ast.unparse(tree)]
    try:
        return ast.literal_eval(tree)
    except ValueError as error:
        raise PassError(
            f"{ast.unparse(tree)} is no option that text can hold",
            hint="options are literals, or dataclasses and enums that the pass's module has",
        ) from error


def _container(tree: ast.Tuple | ast.List | ast.Set | ast.Dict, kind: type[Pass]) -> Any:
    if isinstance(tree, ast.Dict):
        keys = (key for key in tree.keys if key is not None)
        return {_value(key, kind): _value(held, kind) for key, held in zip(keys, tree.values, strict=True)}
    values = [_value(element, kind) for element in tree.elts]
    return values if isinstance(tree, ast.List) else tuple(values) if isinstance(tree, ast.Tuple) else set(values)
