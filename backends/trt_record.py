"""What an engine was built from, with what and where: a JSON file beside it, and the cache of built engines.

The engine file itself stays TensorRT's own, so that any tool can load it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final

from ..errors import EngineError
from .files import write_whole
from .trt_api import Platform
from .trt_kernels import LayerInfo, TensorInfo
from .trt_options import BuildOptions

__all__ = ["BuildRecord", "EngineCache", "record_path"]

_FORMAT: Final = 1


@dataclass(frozen=True)
class BuildRecord:
    """How an engine was built.

    Attributes:
        library: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: The library's version.
        fxq: fxq's version.
        system: ``"linux x86_64"`` and the like.
        device: Name of the GPU that it was built on, or None where it was built without one.
        capability: That GPU's compute capability, or None.
        onnx_sha256: Of the ONNX file and its weight files.
        engine_sha256: Of the engine file.
        key: Of everything that decides what is built: model, options, shapes, library, platform.
        options: See :class:`fxq.backends.trt_options.BuildOptions`.
        profiles: For each dynamic input its shapes as (min, opt, max).
        build_seconds: What the builder took.
        kernels: See :class:`fxq.backends.trt_kernels.LayerInfo`; None where they are not known.
    """

    library: str
    version: str
    fxq: str
    system: str
    device: str | None
    capability: str | None
    onnx_sha256: str
    engine_sha256: str
    key: str
    options: Mapping[str, Any]
    profiles: Mapping[str, Any]
    build_seconds: float
    kernels: tuple[LayerInfo, ...] | None = field(default=None, repr=False)

    def mismatches(self, here: Platform, library: str, version: str) -> list[str]:
        """Why an engine that was built so cannot run here; empty if nothing speaks against it.

        Args:
            here: This machine.
            library: The library that would run it.
            version: That library's version.
        """
        found = []
        if self.library != library:
            found.append(f"it was built with {self.library} and {library} would run it")
        elif not self._takes_version(version):
            found.append(f"it was built with {self.library} {self.version} and {version} is installed")
        if self.system != here.system:
            found.append(f"it was built on {self.system} and this is {here.system}")
        if not self._takes_capability(here.capability):
            built, ours = f"{self.device} (compute capability {self.capability})", f"{here.device} ({here.capability})"
            found.append(f"it was built for {built} and this GPU is {ours}")
        return found

    def _takes_version(self, version: str) -> bool:
        built, ours = ([int(part) for part in text.split(".")[:4]] for text in (self.version, version))
        if self.options.get("version_compatible"):
            return built[0] == ours[0] and built <= ours
        return built[:3] == ours[:3]

    def _takes_capability(self, ours: str | None) -> bool:
        wanted = self.options.get("compute_capabilities")
        if wanted:
            return ours in wanted
        if self.capability is None or ours is None or self.library == "tensorrt_rtx":
            return True  # built ahead of time, or portable: the library says
        if self.options.get("hardware") == "ampere-plus":
            return int(ours.split(".")[0]) >= 8
        return self.capability == ours

    def __str__(self) -> str:
        """A line: library, platform, model."""
        where = f"{self.device} ({self.capability})" if self.device else f"{self.system} without a GPU"
        return f"{self.library} {self.version} on {where}, by fxq {self.fxq}, from ONNX {self.onnx_sha256[:12]}"

    def text(self) -> str:
        """A few lines: library, platform, model; the shapes that it takes; options that are not the default."""
        lines = [str(self)]
        for name, (low, best, high) in self.profiles.items():
            shapes = ["x".join(map(str, shape)) for shape in (low, high, best)]
            lines.append(f"  {name}: {shapes[0]} to {shapes[1]}, tuned for {shapes[2]}")
        usual = BuildOptions().as_dict()
        options = {name: value for name, value in self.options.items() if value != usual.get(name)}
        if options:
            lines.append("  options: " + ", ".join(f"{name}={value}" for name, value in options.items()))
        return "\n".join(lines)

    def write(self, engine: Path) -> None:
        """Write the record beside an engine file, whole or not at all."""
        data = {"format": _FORMAT, **asdict(self)}
        write_whole(record_path(engine), json.dumps(data, indent=1).encode())

    @classmethod
    def read(cls, engine: Path) -> BuildRecord | None:
        """The record beside an engine file; None if there is none.

        Raises:
            EngineError: It cannot be read, or belongs to another engine.
        """
        path = record_path(engine)
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            kernels, version = data.pop("kernels"), data.pop("format")
            record = cls(**data, kernels=None if kernels is None else tuple(_layer(one) for one in kernels))
        except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
            raise EngineError(
                f"the record {path} of how {engine.name} was built cannot be read: {error}",
                hint="build the engine again, or remove the record to use the engine unseen",
            ) from error
        if version != _FORMAT:
            raise EngineError(
                f"the record {path} has format {version}, and this fxq reads {_FORMAT}",
                hint="build the engine again, or use the fxq that built it",
            )
        if engine.is_file() and sha256(engine) != record.engine_sha256:
            raise EngineError(
                f"{engine} is not the engine that {path.name} speaks of: its content is another",
                hint="copy an engine together with its record, or build it again",
            )
        return record


def record_path(engine: str | PathLike[str]) -> Path:
    """Where the record of an engine file lies: beside it, with ``.json`` added."""
    path = Path(engine)
    return path.with_name(f"{path.name}.json")


def sha256(path: Path) -> str:
    """A file's digest, without holding the file in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _layer(data: Mapping[str, Any]) -> LayerInfo:
    tensors = {
        name: tuple(TensorInfo(t["name"], tuple(t["shape"]), t["dtype"]) for t in data[name])
        for name in ("inputs", "outputs", "constants")
    }
    rest = {**data, **tensors, "onnx_nodes": tuple(data["onnx_nodes"])}
    return LayerInfo(**rest)


class EngineCache:
    """A folder of engines by the key of what decides them.

    Args:
        folder: Made on first use; may be shared by processes, because files appear whole.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)

    def take(self, key: str, target: Path) -> BuildRecord | None:
        """Copy the engine of that key, with its record, to `target`; None if there is none or it is damaged."""
        held = self.folder / f"{key}.engine"
        try:
            record = BuildRecord.read(held) if held.is_file() else None
        except EngineError:
            return None  # damaged: it is built anew and replaced
        if record is None or record.key != key:
            return None
        write_whole(target, held.read_bytes())
        record.write(target)
        return record

    def keep(self, engine: Path, record: BuildRecord) -> None:
        """Put a built engine into the cache."""
        held = self.folder / f"{record.key}.engine"
        write_whole(held, engine.read_bytes())
        record.write(held)
