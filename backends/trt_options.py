"""What a user decides about a build, and how it is set on the builder's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

from ..errors import BuildError
from .trt_api import require_flag

__all__ = ["HARDWARE", "WEIGHTS", "BuildOptions", "configure"]

Hardware = Literal["same-capability", "ampere-plus"]
Weights = Literal["embedded", "stripped", "refittable"]

HARDWARE: Final[Mapping[str, str]] = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
"""Which other GPUs an engine is to run on, and TensorRT's name for that."""
WEIGHTS: Final[Mapping[str, tuple[str, ...]]] = {
    "embedded": (),
    "stripped": ("STRIP_PLAN", "REFIT_IDENTICAL"),
    "refittable": ("REFIT",),
}
"""How an engine holds its weights, and the builder flags for that."""


@dataclass(frozen=True)
class BuildOptions:
    """Everything about a build that changes the engine, but for the model and its shapes.

    Attributes:
        workspace_bytes: Most GPU memory that a kernel may use as scratch space; None for all of it.
        optimization_level: 0 to 5; None for TensorRT's default, 3.
        hardware: None for the very GPU, else a key of :data:`HARDWARE`.
        version_compatible: Whether later versions of TensorRT are to run the engine too.
        weights: A key of :data:`WEIGHTS`.
        compute_capabilities: TensorRT-RTX: the GPUs to build for, as ``"8.9"``; empty for its portable default.

    Raises:
        BuildError: A field holds no such value.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    hardware: Hardware | None = None
    version_compatible: bool = False
    weights: Weights = "embedded"
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise BuildError(f"optimization_level is 0 to 5, not {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 0:
            raise BuildError(f"workspace_bytes is {self.workspace_bytes}")
        if self.hardware is not None and self.hardware not in HARDWARE:
            raise BuildError(f"hardware is {self.hardware!r}", hint=f"use one of {', '.join(HARDWARE)}, or None")
        if self.weights not in WEIGHTS:
            raise BuildError(f"weights is {self.weights!r}", hint=f"use one of {', '.join(WEIGHTS)}")
        object.__setattr__(self, "compute_capabilities", tuple(self.compute_capabilities))

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return {**asdict(self), "compute_capabilities": list(self.compute_capabilities)}


def configure(trt: ModuleType, builder: Any, options: BuildOptions, timing_cache: Path | None) -> Any:
    """A builder configuration with the options set.

    Raises:
        BuildError: The library lacks what an option needs, or refuses the timing cache.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the kernels' types would not be listed
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware is not None:
        _set_hardware(trt, config, options.hardware)
    if options.version_compatible:
        config.set_flag(require_flag(trt, "BuilderFlag", "VERSION_COMPATIBLE", option="version_compatible"))
    for name in WEIGHTS[options.weights]:
        config.set_flag(require_flag(trt, "BuilderFlag", name, option=f"weights={options.weights!r}"))
    _set_capabilities(trt, config, options.compute_capabilities)
    if timing_cache is not None:
        _load_timing_cache(config, timing_cache)
    return config


def _set_hardware(trt: ModuleType, config: Any, hardware: Hardware) -> None:
    option = f"hardware={hardware!r}"
    level = require_flag(trt, "HardwareCompatibilityLevel", HARDWARE[hardware], option=option)
    config.hardware_compatibility_level = level
    # TensorRT-RTX has the attribute and leaves it as it was.
    if config.hardware_compatibility_level != level:
        raise BuildError(
            f"{trt.__name__} {trt.__version__} does not take {option}",
            hint="leave the option out; TensorRT-RTX's engines are portable, and take compute_capabilities",
        )


def _set_capabilities(trt: ModuleType, config: Any, wanted: tuple[str, ...]) -> None:
    if not wanted:
        return
    if not hasattr(config, "set_compute_capability"):
        raise BuildError(
            f"{trt.__name__} {trt.__version__} builds for the GPU that is there",
            hint='leave compute_capabilities out; library="tensorrt_rtx" builds for others',
        )
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        name = f"SM{capability.replace('.', '')}"
        config.set_compute_capability(
            require_flag(trt, "ComputeCapability", name, option=f"compute capability {capability}"), index
        )


def _load_timing_cache(config: Any, path: Path) -> None:
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(
            f"TensorRT does not take the timing cache {path}",
            hint="it was made by another version or on another GPU: remove the file, or name another one",
        )
