"""What a command line can name: a Python object as ``module:name`` or ``file.py:name``, tensor files, image folders."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from ..errors import FxqError
from .image_folder import ImageFolder, Preprocessing

__all__ = ["FILES", "load_batches", "load_model", "load_object", "read_tensors"]

FILES: Final = (".npy", ".npz", ".safetensors")
"""Files of tensors, by their endings."""
_NAMED: Final = 5


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


def load_model(entry: str, weights: Path | None = None) -> nn.Module:
    """The model that an entry names: a module, or a function or class that gives one without arguments.

    Args:
        entry: As for :func:`load_object`.
        weights: A safetensors file with the model's state dict, which has to fit exactly.

    Returns:
        The model in eval mode.

    Raises:
        FxqError: The entry cannot be loaded, gives no ``nn.Module``, or the weights do not fit it.
    """
    found = _called(entry)
    if not isinstance(found, nn.Module):
        raise FxqError(
            f"{entry} gives a {type(found).__name__}, not an nn.Module",
            hint="name a module, or a function without arguments that returns one",
        )
    if weights is not None:
        _load_weights(found, weights, entry)
    return found.eval()


def _load_weights(model: nn.Module, path: Path, entry: str) -> None:
    if path.suffix != ".safetensors":
        raise FxqError(
            f"{path} is no .safetensors file",
            hint="checkpoints of torch.save can run code when they are loaded: save the state dict with "
            "safetensors.torch.save_file, or let a function of yours load it",
        )
    state = _safetensors(path)
    wanted = model.state_dict()
    held = {wanted[name].data_ptr() for name in wanted.keys() & state}  # tied tensors are stored under one name
    differences = {
        "lacks": [name for name, tensor in wanted.items() if name not in state and tensor.data_ptr() not in held],
        "also has": [name for name in state if name not in wanted],
        "has in another shape": [name for name in wanted if name in state and state[name].shape != wanted[name].shape],
    }
    for what, names in differences.items():
        if names:
            some = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
            raise FxqError(f"{path} is not the state dict of {entry}: it {what} {some}", hint="name the model it is of")
    model.load_state_dict(state, strict=False)


def load_batches(
    source: str, batch_size: int = 32, images: Preprocessing | None = None, count: int = 512
) -> Iterable[Any]:
    """Calibration data: a Python entry, a file of tensors, or a folder of images.

    Args:
        source: ``module:name`` of an iterable of inputs or of a function that returns one; a ``.npy`` file, whose first
            dimension is cut into batches; a ``.npz`` or ``.safetensors`` file with one such array for each input, by
            name; or a folder of images.
        batch_size: Samples in a batch of a file or folder.
        images: What is done to the images of a folder.
        count: How many images of a folder are taken.

    Raises:
        FxqError: It cannot be loaded, or a folder comes without `images`.
    """
    if source.endswith(FILES):
        return _batches(read_tensors(Path(source)), batch_size)
    if Path(source).is_dir():
        if images is None:
            raise FxqError(f"{source} is a folder of images", hint="say how large the model takes them: --size 224")
        return ImageFolder(Path(source), images, count=count, batch_size=batch_size)
    found = _called(source)
    if not isinstance(found, Iterable):
        raise FxqError(f"{source} gives a {type(found).__name__}", hint="give a DataLoader, or any iterable of inputs")
    return found if isinstance(found, torch.Tensor | np.ndarray | Mapping) else _UsersBatches(found, source)


class _UsersBatches:
    """Batches of the user's own code, whose errors say where they came from."""

    def __init__(self, batches: Iterable[Any], source: str) -> None:
        self.batches, self.source = batches, source

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # a TypeError, for generators, is what len() is to raise

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.batches
        except FxqError:
            raise
        except Exception as error:
            raise FxqError(
                f"{self.source} failed: {type(error).__name__}: {error}", hint="--debug shows where"
            ) from error


def _batches(tensors: dict[str, torch.Tensor], size: int) -> list[Any]:
    count = min(len(tensor) for tensor in tensors.values())
    starts = range(0, count, size)
    if len(tensors) == 1:
        (only,) = tensors.values()
        return [only[start : start + size] for start in starts]
    return [{name: tensor[start : start + size] for name, tensor in tensors.items()} for start in starts]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a ``.npy`` (under the name ""), ``.npz`` or ``.safetensors`` file. Pickled objects are refused.

    Raises:
        FxqError: There is no such file, or it holds something else.
    """
    tensors = _safetensors(path) if path.suffix == ".safetensors" else _arrays(path)
    if not tensors or any(tensor.ndim == 0 or not len(tensor) for tensor in tensors.values()):
        raise FxqError(f"{path} holds no samples", hint="the first dimension of each array counts samples")
    return tensors


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else dict(found)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise FxqError(f"cannot read {path}: {error}", hint="save it with numpy.save or numpy.savez") from error


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FxqError(f"cannot read {path}: {error}", hint="save it with safetensors.torch.save_file") from error
