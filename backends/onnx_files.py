"""An ONNX file is checked, and written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import ExportError
from .onnx_names import MODULE_PATH, SOURCE, properties

if TYPE_CHECKING:
    import onnx

__all__ = ["infer_shapes", "write_model"]

_LIMIT: Final = (1 << 31) - 1
"""Bytes that a protobuf file can hold; models beyond that keep their weights in a file of their own."""
_KEPT_INSIDE: Final = 1024
"""Bytes of a tensor that stays in the model file all the same: shapes and scales are needed to read the
graph.
"""
_DIGITS: Final = 16
"""Of the content's hash, in the name of a weight file: those of other tools are called otherwise, and are kept."""
_HINT: Final = "this is a graph that ONNX does not allow; leave the part named here out of the model, or report it"


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Check a model in full and write it.

    Args:
        model: Its shapes are completed by inference and, above 2 GB, its weights moved out; changed in place.
        path: An existing file is replaced once the new one is complete and checked, and its weight file, if
            it had one, removed.

    Raises:
        ExportError: The checker or strict shape inference refuses the model, or the folder cannot be written.
    """
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}", hint="make it first")
    with _discarded_on_error() as created:
        if _size(model) > _LIMIT:
            created.extend(_move_weights_out(model, path))
        infer_shapes(model)
        temporary = _temporary(path)
        created.append(temporary)
        temporary.write_bytes(model.SerializeToString())
        _check(model, temporary)
        replaced = _weight_files(path) - _weight_files(temporary, path)
        temporary.replace(path)
    for file in replaced:
        file.unlink(missing_ok=True)


def infer_shapes(model: onnx.ModelProto) -> None:
    """Complete the types and shapes of all tensors, in place.

    Raises:
        ExportError: Types or shapes contradict each other.
    """
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise _refused(model, "ONNX shape inference", error) from error
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)


def _check(model: onnx.ModelProto, file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refused(model, "the ONNX checker", error) from error


def _refused(model: onnx.ModelProto, who: str, error: Exception) -> ExportError:
    """What `who` said, at the node that it speaks of where it names one."""
    text = str(error).strip()
    named = [node for node in model.graph.node if node.name and f"name: {node.name})" in text]
    known = properties(named[0]) if named else {}
    return ExportError(
        f"{who} refuses the model: {text}",
        node=named[0].name if named else None,
        module_path=known.get(MODULE_PATH),
        source=known.get(SOURCE),
        hint=_HINT,
    )


def _size(model: onnx.ModelProto) -> int:
    """Bytes of the file to write, near enough above; protobuf itself cannot say beyond 2 GB."""
    tensors: int = sum(len(t.raw_data) + 256 + len(t.name) for t in model.graph.initializer)
    parts: list[Any] = [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    return tensors + int(sum(part.ByteSize() + 16 for part in parts))


def _move_weights_out(model: onnx.ModelProto, path: Path) -> list[Path]:
    """Write the weights to a file named by its content, so that it never replaces one with other weights.

    Returns:
        The file, unless it was there before.
    """
    import onnx

    temporary = _temporary(path)
    digest = hashlib.sha256()
    with _discarded_on_error() as created, temporary.open("wb") as file:
        created.append(temporary)
        moved = []
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _KEPT_INSIDE:
                continue
            padding = b"\0" * (-file.tell() % 4096)  # whole pages can be mapped into memory
            moved.append((tensor, file.tell() + len(padding), len(tensor.raw_data)))
            for part in (padding, tensor.raw_data):
                file.write(part)
                digest.update(part)
    data = path.with_name(f"{path.name}.{digest.hexdigest()[:_DIGITS]}.data")
    for tensor, offset, length in moved:
        onnx.external_data_helper.set_external_data(tensor, data.name, offset=offset, length=length)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
    was_there = data.exists()
    temporary.replace(data)
    return [] if was_there else [data]


def _weight_files(model: Path, path: Path | None = None) -> set[Path]:
    """The weight files of fxq's own that a model, which is to be found at `path`, refers to."""
    import onnx
    from google.protobuf.message import DecodeError

    path = path or model
    if not model.exists():
        return set()
    try:
        held = onnx.load(os.fspath(model), load_external_data=False)
    except DecodeError:
        return set()
    names = {entry.value for t in held.graph.initializer for entry in t.external_data if entry.key == "location"}
    own = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{_DIGITS}}}\.data")
    return {path.with_name(name) for name in names if own.fullmatch(name)}


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    # mkstemp makes files that only their owner reads; the result should have the mode any new file gets.
    mask = os.umask(0)
    os.umask(mask)
    Path(name).chmod(0o666 & ~mask)
    return Path(name)


@contextlib.contextmanager
def _discarded_on_error() -> Iterator[list[Path]]:
    """Files appended to the list are removed if the block fails."""
    created: list[Path] = []
    try:
        yield created
    except BaseException:
        for file in created:
            file.unlink(missing_ok=True)
        raise
