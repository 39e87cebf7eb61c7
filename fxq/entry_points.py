"""What a command line can name: a Python object as ``module:name`` or ``file.py:name``, tensors in numpy's files."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import FxqError

__all__ = ["load_batches", "load_model", "load_object", "read_tensors"]


def load_object(entry: str) -> Any:
    """Import what an entry names.

    Args:
        entry: ``package.module:name`` (also from the current folder) or ``path/to/file.py:name``; dots in the name are
            followed.

    Raises:
        FxqError: There is no such file, module or name, or importing it fails.
    """
    place, colon, name = entry.rpartition(":")
    if not colon or not place or not name:
        raise FxqError(f"{entry!r} names no Python object", hint="write module:name or path/to/file.py:name")
    try:
        found = _from_file(Path(place)) if place.endswith(".py") else _from_path(place)
    except Exception as error:
        raise FxqError(f"cannot import {place}: {type(error).__name__}: {error}", hint="--debug shows where") from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = ", ".join(sorted(key for key in vars(found) if not key.startswith("_"))[:12])
            raise FxqError(f"{place} has no {name!r}", hint=f"it has {known}" if known else "it is empty")
        found = getattr(found, part)
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _from_path(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _called(entry: str) -> Any:
    """The object, or what it returns if it is a function or a class."""
    found = load_object(entry)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise FxqError(f"{entry} failed: {type(error).__name__}: {error}", hint="--debug shows where") from error


def load_model(entry: str) -> nn.Module:
    """The model that an entry names: a module, or a function or class that gives one without arguments.

    Returns:
        The model in eval mode.

    Raises:
        FxqError: The entry cannot be loaded, or gives no ``nn.Module``.
    """
    found = _called(entry)
    if not isinstance(found, nn.Module):
        raise FxqError(
            f"{entry} gives a {type(found).__name__}, not an nn.Module",
            hint="name a module, or a function without arguments that returns one",
        )
    return found.eval()


def load_batches(source: str, batch_size: int = 32) -> Iterable[Any]:
    """Calibration data: a Python entry, or a file of numpy's.

    Args:
        source: ``module:name`` of an iterable of inputs or of a function that returns one; a ``.npy`` file, whose first
            dimension is cut into batches; or a ``.npz`` file with one such array for each input, by name.
        batch_size: Samples in a batch of a file.

    Raises:
        FxqError: It cannot be loaded.
    """
    if source.endswith((".npy", ".npz")):
        return _batches(read_tensors(Path(source)), batch_size)
    found = _called(source)
    if not isinstance(found, Iterable):
        raise FxqError(f"{source} gives a {type(found).__name__}", hint="give a DataLoader, or any iterable of inputs")
    return found


def _batches(tensors: dict[str, torch.Tensor], size: int) -> Iterator[Any]:
    count = min(len(tensor) for tensor in tensors.values())
    for start in range(0, count, size):
        batch = {name: tensor[start : start + size] for name, tensor in tensors.items()}
        yield batch if set(batch) != {""} and len(batch) > 1 else next(iter(batch.values()))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a ``.npy`` (under the name "") or ``.npz`` file. Pickled objects are refused.

    Raises:
        FxqError: There is no such file, or it holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else dict(found)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError) as error:
        raise FxqError(f"cannot read {path}: {error}", hint="save it with numpy.save or numpy.savez") from error
    if not tensors or any(tensor.ndim == 0 or not len(tensor) for tensor in tensors.values()):
        raise FxqError(f"{path} holds no samples", hint="the first dimension of each array counts samples")
    return tensors
