"""The largest magnitude of every float tensor of a model, on example inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from .onnx_files import write_model
from .onnx_numbers import STANDS_FOR_INFINITY
from .onnxrt import Session

if TYPE_CHECKING:
    import onnx

__all__ = ["largest_magnitudes"]

_KINDS: Final = (torch.float32, torch.float64)


def largest_magnitudes(model: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Run a model once in ONNX Runtime and note the largest finite magnitude of each of its float tensors.

    Masks, which are infinite or as good as that, do not count.

    Args:
        model: A float32 model, not changed.
        inputs: Input name to tensor.

    Returns:
        Tensor name to magnitude, the float inputs among them.

    Raises:
        EngineError: ONNX Runtime cannot run the model.
        ExportError: The model is none that ONNX allows.
    """
    copied: Any = type(model)()
    copied.CopyFrom(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_model(copied, path)
        session = Session(path, optimize=False)
        fed = {name: inputs[name] for name in session.input_names}
        found = {name: _magnitude(tensor) for name, tensor in fed.items() if tensor.dtype in _KINDS}
        for name, tensor in session.run_all(fed, nodes_per_step=64):
            if tensor.dtype in _KINDS:
                found[name] = _magnitude(tensor)
    return found


def _magnitude(tensor: Tensor) -> float:
    sizes = tensor.abs().flatten()
    real = sizes[sizes < STANDS_FOR_INFINITY]  # neither NaN nor infinity
    return float(real.max()) if real.numel() else 0.0
