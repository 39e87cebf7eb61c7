"""What looks like TensorRT's where there is none: a module with a name and a version, and the record of an engine."""

from __future__ import annotations

from types import ModuleType

from fxq.backends.trt_options import BuildOptions
from fxq.backends.trt_record import BuildRecord

RECORD = BuildRecord(
    library="tensorrt",
    version="11.2.0.5",
    fxq="0.1",
    system="linux x86_64",
    device="NVIDIA L4",
    capability="8.9",
    onnx_sha256="0" * 64,
    engine_sha256="1" * 64,
    key="2" * 64,
    options=BuildOptions().as_dict(),
    profiles={},
    build_seconds=1.0,
)


def fake(name: str, version: str) -> ModuleType:
    module = ModuleType(name)
    vars(module)["__version__"] = version
    return module
