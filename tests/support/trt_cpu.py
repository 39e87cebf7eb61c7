"""TensorRT on a machine without a GPU, for tests.

NVIDIA's Python bindings (``tensorrt-cu13-bindings``) and TensorRT-RTX's library (inside an ONNX Runtime
plugin) are ordinary wheels. TensorRT-RTX parses and builds ahead of time on a CPU, but the bindings ask for
``libnvinfer.so.11`` and its siblings; the C files in ``trt_shim/`` are those libraries and forward to
TensorRT-RTX. The bindings look for them in their own folder (their run path is ``$ORIGIN``), so one folder
holds everything and ``import tensorrt`` needs nothing but that folder's parent on ``sys.path``: no
environment variable, no second process.

What this cannot do: load or run an engine without a GPU that TensorRT-RTX supports (compute capability 8.0,
8.6, 8.9, 12.x). The bindings are a little newer than the library; ``_mend`` lists what is mended for that.

As a script it prints the folder: ``PYTHONPATH=$(python tests/support/trt_cpu.py) python ...``.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

BINDINGS = ("tensorrt-cu13-bindings", "11.4.0.106")
LIBRARY = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "0.5.0")
SHIM = Path(__file__).resolve().parent / "trt_shim"
# TensorRT's library name -> the C file that stands in for it.
SHIM_LIBRARIES = {
    "libnvinfer.so.11": "nvinfer.c",
    "libnvonnxparser.so.11": "nvonnxparser.c",
    "libnvinfer_plugin.so.11": "nvinfer_plugin.c",
}
# Soname that the shims open -> start of the file's name in the wheel.
RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")


class UnavailableError(Exception):
    """TensorRT cannot be set up here; the message says what is missing."""


def load() -> ModuleType:
    """Set TensorRT up if this is the first time, and import it.

    Raises:
        UnavailableError: Wrong platform, no C compiler, or the wheels cannot be had.
    """
    folder = str(prepare())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module("tensorrt")
    if not Path(module.__file__ or "").is_relative_to(folder):
        raise UnavailableError(f"another tensorrt was imported before: {module.__file__}")
    _mend(module)
    return module


def prepare() -> Path:
    """The folder to put on ``sys.path``, made on first use and kept by version outside the checkout."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnavailableError(f"the wheels are for Linux x86-64; this is {sys.platform} {platform.machine()}")
    folder = _cache() / _key()
    if folder.exists():
        return folder
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError("no C compiler: neither gcc nor cc is on the PATH")
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():  # another worker may have made it while this one waited
            _make(folder, compiler)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxq-tests"


def _key() -> str:
    """Everything that the folder's content depends on."""
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SHIM.iterdir()) if path.is_file()))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"trt-{BINDINGS[1]}-rtx-{LIBRARY[1]}-{python}-{sources.hexdigest()[:8]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold ``path`` against the other pytest workers; the system releases it if this process dies."""
    import fcntl  # not on every platform, and only reached on Linux

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, compiler: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as name:
        wheels, made = Path(name) / "wheels", Path(name) / "made"
        _download(wheels)
        _unpack(wheels, made / "tensorrt")
        for library, source in SHIM_LIBRARIES.items():
            _compile(compiler, SHIM / source, made / "tensorrt" / library)
        made.rename(folder)  # whole or not at all


def _download(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, *("==".join(pin) for pin in (BINDINGS, LIBRARY))], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UnavailableError(f"pip could not download TensorRT's wheels:\n{done.stderr.strip()}")


def _unpack(wheels: Path, folder: Path) -> None:
    """The bindings' package as ``folder``, and TensorRT-RTX's libraries inside it under their sonames."""
    folder.mkdir(parents=True)
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                top, _, rest = member.filename.partition("/")
                soname = next((name for name in RTX_LIBRARIES if rest.startswith(name)), None)
                if top == "tensorrt_bindings" and rest and not member.is_dir():
                    target = folder / rest
                elif soname:
                    target = folder / soname
                else:
                    continue
                found.append(target.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    missing = {"tensorrt.so", *RTX_LIBRARIES} - set(found)
    if missing:
        raise UnavailableError(f"the wheels do not hold {', '.join(sorted(missing))}; their layout has changed")


def _compile(compiler: str, source: Path, library: Path) -> None:
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    link = [f"-Wl,-soname,{library.name}", "-Wl,-rpath,$ORIGIN", "-ldl"]
    done = subprocess.run(
        [compiler, *flags, "-o", str(library), str(source), *link],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UnavailableError(f"{compiler} could not compile {source.name}:\n{done.stderr.strip()}")


def _mend(trt: ModuleType) -> None:
    """Mend what differs between the bindings and the slightly older library behind them.

    ``ITensor.is_shape_tensor`` and ``is_execution_tensor`` call a slot that the library numbers differently
    and answer wrongly for every tensor. No network in the tests has shape tensors, so the right answer is a
    constant.
    """
    trt.ITensor.is_shape_tensor = property(lambda _tensor: False)
    trt.ITensor.is_execution_tensor = property(lambda _tensor: True)


def mend_polygraphy() -> None:
    """Keep Polygraphy from printing the builder configuration: it crashes, see ``_mend``."""
    from polygraphy.backend.trt import util

    util.str_from_config = lambda *_arguments: "(not printed: the bindings are newer than the library)"


if __name__ == "__main__":
    sys.stdout.write(f"{prepare()}\n")
