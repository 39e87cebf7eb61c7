"""The optimization profile: between which shapes an engine works, and for which it is tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from ..errors import BuildError

__all__ = ["PROFILES", "Profiles", "Ranges", "ShapeRange", "profile_shapes", "recorded_profiles"]

PROFILES: Final = "fxq.profiles"
"""Key of a model's metadata_props: for each dynamic input its shapes as [min, opt, max], in JSON."""

ShapeRange: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int]]
# The same, checked.
_Range: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Profiles: TypeAlias = Mapping[str, ShapeRange]
Ranges: TypeAlias = dict[str, _Range]

# Smallest, tuned-for and largest batch where the caller names none.
_BATCHES = (1, 8, 32)


def recorded_profiles(metadata: Mapping[str, str]) -> Profiles:
    """What an ONNX file's metadata say about the shapes that it is for; empty if nothing.

    Raises:
        BuildError: The entry is damaged.
    """
    text = metadata.get(PROFILES)
    if text is None:
        return {}
    try:
        held = json.loads(text)
        return {str(name): (shapes[0], shapes[1], shapes[2]) for name, shapes in held.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise BuildError(
            f"the file's entry {PROFILES} is damaged: {text[:80]}", hint="export it again, or pass profiles={...}"
        ) from error


def profile_shapes(
    inputs: Mapping[str, tuple[int, ...]], profiles: Profiles | None, recorded: Profiles | None = None
) -> Ranges:
    """The smallest, tuned-for and largest shape of every dynamic input.

    Args:
        inputs: Input name to shape, -1 where it is dynamic.
        profiles: What the caller gave for each dynamic input. None: what is recorded, else batches of 1, 8 and 32
            in the first dimension, which then has to be the only dynamic one.
        recorded: What the file says for some of them.

    Returns:
        Empty where every shape is static.

    Raises:
        BuildError: An input has no range or one that does not fit it, or a range names no dynamic input.
    """
    dynamic = {name: shape for name, shape in inputs.items() if any(dim < 0 for dim in shape)}
    if profiles is None:
        known = recorded or {}
        return {
            name: _checked(name, shape, known[name]) if name in known else _batch_range(name, shape)
            for name, shape in dynamic.items()
        }
    if unknown := sorted(set(profiles) - set(dynamic)):
        raise BuildError(
            f"profiles names {', '.join(unknown)}, but the inputs of dynamic shape are {', '.join(dynamic) or 'none'}",
            hint="give one (min, opt, max) for each input of dynamic shape, and none for the others",
        )
    if missing := sorted(set(dynamic) - set(profiles)):
        raise BuildError(
            f"profiles leaves out {', '.join(missing)}",
            hint=_example(missing[0], dynamic[missing[0]]),
        )
    return {name: _checked(name, shape, profiles[name]) for name, shape in dynamic.items()}


def _batch_range(name: str, shape: tuple[int, ...]) -> _Range:
    if any(dim < 0 for dim in shape[1:]):
        raise BuildError(
            f"input {name} of shape {list(shape)} is dynamic beyond its batch, and TensorRT asks how far",
            node=name,
            hint=_example(name, shape),
        )
    low, best, high = ((batch, *shape[1:]) for batch in _BATCHES)
    return low, best, high


def _checked(name: str, shape: tuple[int, ...], given: ShapeRange) -> _Range:
    ranges = [tuple(int(dim) for dim in one) for one in given]
    fits = len(ranges) == 3 and all(
        len(one) == len(shape) and all(dim in {-1, have} for dim, have in zip(shape, one, strict=True))
        for one in ranges
    )
    ordered = fits and all(1 <= low <= best <= high for low, best, high in zip(*ranges, strict=True))
    if not ordered:
        raise BuildError(
            f"the profile of input {name}, {list(given)}, is no (min, opt, max) of its shape {list(shape)}: "
            "it takes three shapes of that rank, static sizes kept, the others at least 1 and not falling",
            node=name,
            hint=_example(name, shape),
        )
    low, best, high = ranges
    return low, best, high


def _example(name: str, shape: tuple[int, ...]) -> str:
    """A call to copy, with made-up sizes where the shape is dynamic."""
    sizes = [tuple(value if dim < 0 else dim for dim in shape) for value in _BATCHES]
    return f'pass profiles={{"{name}": ({", ".join(map(str, sizes))})}} with sizes of your own'
