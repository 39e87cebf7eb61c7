"""Calibration to and from files: statistics as safetensors, ranges as JSON, and TensorRT's calibration cache.

Statistics go on where they stopped (``fxq.calibrate(…, reset=False)``, ``fxq.solve``). Ranges set scales without
any data, whoever found them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from os import PathLike
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx

from .amax_files import Amax, read_amax, read_tensorrt_cache
from .backends.files import write_whole
from .bias_correction import CORRECTIONS, store_corrections
from .errors import CalibrationError
from .graph import constant, device_of, origin, remember
from .qparams import scale_and_zero_point
from .quantizer import Quantizer, quantized_nodes, quantizers, tie_groups

__all__ = [
    "load_statistics",
    "read_amax",
    "read_tensorrt_cache",
    "save_statistics",
    "set_amax",
    "write_amax",
]

_FORMAT: Final = "fxq-calibration-1"


def save_statistics(prepared: fx.GraphModule, path: str | PathLike[str]) -> None:
    """Write what calibration collected, and the solved scales, as safetensors.

    Args:
        prepared: A prepared graph; also one that is not solved, or not fed to the end.
        path: Written whole or not at all.

    Raises:
        CalibrationError: The graph has no quantizers.
    """
    found = _quantizers(prepared)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name, quantizer in found.items()
        for key, value in quantizer.state_dict().items()
    }
    kinds = json.dumps({name: _kind(quantizer) for name, quantizer in found.items()})
    write_whole(path, save(tensors, metadata={"format": _FORMAT, "quantizers": kinds}))


def load_statistics(prepared: fx.GraphModule, path: str | PathLike[str]) -> None:
    """Take over what :func:`save_statistics` wrote, statistics and scales.

    Args:
        prepared: A graph prepared from the same model by the same recipe; what it collected is replaced.
        path: The file.

    Raises:
        CalibrationError: It is no such file, or of other tensors or observers; nothing is changed then.
    """
    found = _quantizers(prepared)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CalibrationError(f"{path} holds no calibration", hint="load what save_statistics wrote")
    kinds: dict[str, Any] = json.loads(metadata["quantizers"])
    problems = [f"{name} is not in the file" for name in found if name not in kinds]
    problems += [f"{name} is not in the graph" for name in kinds if name not in found]
    problems += [
        f"{name} is {kinds[name]} in the file and {_kind(q)} in the graph"
        for name, q in found.items()
        if name in kinds and kinds[name] != _kind(q)
    ]
    problems += [
        f"{name} lacks {key}"
        for name, q in found.items()
        for key in q.state_dict()
        if name in kinds and f"{name}.{key}" not in tensors
    ]
    if problems:
        raise CalibrationError(
            f"{path} does not fit this graph: {'; '.join(problems)}",
            hint="prepare the same model with the same recipe, or set ranges with set_amax",
        )
    device = device_of(prepared)
    for name, quantizer in found.items():
        prefix = f"{name}."
        quantizer.to(device)
        quantizer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        if quantizer.observer is not None:
            quantizer.observer.shared = True
    _forget_corrections(prepared)


def write_amax(prepared: fx.GraphModule, path: str | PathLike[str]) -> None:
    """Write the range of every quantized tensor as JSON: its name to amax, a list per channel.

    Args:
        prepared: A graph whose quantizers are solved and symmetric (R9).
        path: Written whole or not at all.

    Raises:
        CalibrationError: A quantizer has no scale, or is asymmetric, so that amax does not say its range.
    """
    found = _quantizers(prepared)
    unsolved = [q.tensor for q in found.values() if not q.solved]
    if unsolved:
        raise CalibrationError(f"{', '.join(unsolved)} have no scale", hint="run fxq.calibrate first")
    _require_symmetric(found.values())
    amax = {q.tensor: (q.scale.double() * q.spec.qdtype.qmax).tolist() for q in found.values()}
    write_whole(path, (json.dumps(amax, indent=1) + "\n").encode())


def set_amax(prepared: fx.GraphModule, amax: Mapping[str, Amax], *, partial: bool = False) -> None:
    """Set scales from ranges, without data.

    Tensors that share a scale get the largest range that any of them is given; weights that are not named
    take their own. Biases corrected under other scales are not corrected any more.

    Args:
        prepared: A prepared graph; its scales are changed, its statistics are not.
        amax: The largest magnitude of each tensor, by the tensor's name or, where it is one tensor's alone, the
            path of the module that makes it; a list per channel.
        partial: Let names that fit nothing pass, and leave quantizers that nothing names as they are.

    Raises:
        CalibrationError: A name fits no tensor, a quantizer is not named, a quantizer is asymmetric, or a
            value is no range or has another number of channels; nothing is changed then.
    """
    found = _quantizers(prepared)
    given = _by_quantizer(prepared, found, amax, partial=partial)
    _require_symmetric([found[name] for name in given])
    names = {id(q): name for name, q in found.items()}
    ranges: dict[str, Tensor] = {}
    missing: list[str] = []
    for group in tie_groups(q for q in found.values() if not q.weight):
        said = [given[names[id(q)]] for q in group if names[id(q)] in given]
        if said:
            shared = torch.stack([_range(group[0], value) for value in said]).amax(dim=0)
            ranges |= {names[id(q)]: shared for q in group}
        else:
            missing += [q.tensor for q in group]
    ranges |= {name: _range(q, given[name]) for name, q in found.items() if q.weight and name in given}
    if missing and not partial:
        raise CalibrationError(f"there is no amax for {', '.join(missing)}", hint="name them too, or pass partial=True")
    places, device = quantized_nodes(prepared), device_of(prepared)
    for name, quantizer in found.items():
        weight = constant(places.get(name))
        if name in ranges:
            parameters = scale_and_zero_point(-ranges[name], ranges[name], quantizer.spec)
            quantizer.set_parameters(*(p.to(device) for p in parameters))
        elif quantizer.weight and weight is not None and not quantizer.solved:
            quantizer.solve_weight(weight)
    _forget_corrections(prepared)
    remember(prepared, calibration={"ranges": "given"})


def _quantizers(prepared: fx.GraphModule) -> dict[str, Quantizer]:
    found = quantizers(prepared)
    if not found:
        raise CalibrationError("this graph has no quantizers", hint="pass what fxq.prepare returned")
    return found


def _kind(quantizer: Quantizer) -> list[Any]:
    """What must agree for one's state to be another's: the observer, its axis, the type, the sign."""
    observer = quantizer.observer
    kind = "weight" if observer is None else type(observer).__name__
    spec = quantizer.spec
    return [kind, quantizer.axis, spec.qdtype.name, "asymmetric" if spec.symmetric is False else "symmetric"]


def _require_symmetric(found: Any) -> None:
    asymmetric = [q.tensor for q in found if q.spec.symmetric is False]
    if asymmetric:
        raise CalibrationError(
            f"amax does not say the range of asymmetric quantizers: {', '.join(asymmetric)}",
            hint="use symmetric specs (R9), or save_statistics and load_statistics",
        )


def _by_quantizer(
    prepared: fx.GraphModule, found: Mapping[str, Quantizer], amax: Mapping[str, Amax], *, partial: bool
) -> dict[str, Amax]:
    """Ranges by the quantizers' names."""
    names = {q.tensor: name for name, q in found.items()}
    paths: dict[str, list[str]] = {}
    for name, node in quantized_nodes(prepared).items():
        if not found[name].weight:
            paths.setdefault(origin(node).module_path, []).append(name)
    names = {path: made[0] for path, made in paths.items() if path and len(made) == 1} | names
    unknown = [name for name in amax if name not in names]
    if unknown and not partial:
        close = difflib.get_close_matches(unknown[0], names, n=1)
        raise CalibrationError(
            f"no quantized tensor is called {', '.join(unknown)}",
            hint=(f"did you mean {close[0]}? " if close else "") + "partial=True lets such names pass",
        )
    return {names[name]: value for name, value in amax.items() if name in names}


def _range(quantizer: Quantizer, value: Amax) -> Tensor:
    """A given amax in the shape of the quantizer's ranges, float64: exact for what :func:`write_amax` wrote."""
    amax = torch.as_tensor(value, dtype=torch.float64)
    if (amax.ndim != 0) != (quantizer.axis is not None) or amax.ndim > 1:
        wanted = "a list, one for each channel" if quantizer.axis is not None else "one number"
        raise CalibrationError(
            f"{quantizer.tensor} needs {wanted} as amax, and is given {value!r}", node=quantizer.tensor
        )
    if quantizer.solved and quantizer.scale.shape != amax.shape:
        raise CalibrationError(
            f"{quantizer.tensor} has {quantizer.scale.numel()} channels, and amax {amax.numel()}",
            node=quantizer.tensor,
        )
    if not bool((amax.isfinite() & (amax >= 0)).all()):
        raise CalibrationError(f"the amax of {quantizer.tensor} is {value!r}", node=quantizer.tensor)
    return amax


def _forget_corrections(prepared: fx.GraphModule) -> None:
    if hasattr(prepared, CORRECTIONS):
        store_corrections(prepared, {})
