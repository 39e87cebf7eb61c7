"""The errors that fxq raises, under one root.

::

    FxqError
    ├── TraceError             the model could not be turned into a graph
    ├── GuardError             a graph is called with shapes for which the model would take another way
    ├── RecipeError            a recipe, rule or spec asks for something that cannot be
    ├── TargetError            a target's data is wrong or the target is unknown
    ├── PassError              a pass broke its contract, or a pipeline is out of order
    │   └── VerifyError        a graph is not legal at the stage it claims to be in
    ├── CalibrationError       no data, bad data, or a quantizer that saw none
    ├── ConvertError           a graph cannot be converted as it stands
    ├── ExportError            lowering to ONNX failed
    ├── BuildError             TensorRT refused the network
    ├── EngineError            an engine cannot be loaded or run here
    └── MissingDependencyError an optional package is not installed

Every message names the place (node, module path, the user's source line) where there is one, and the next step.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "CalibrationError",
    "ConvertError",
    "EngineError",
    "ExportError",
    "FxqError",
    "GuardError",
    "MissingDependencyError",
    "PassError",
    "RecipeError",
    "TargetError",
    "TraceError",
    "VerifyError",
]


class FxqError(Exception):
    """Root of fxq's errors.

    Args:
        message: What is wrong, one sentence.
        node: Name of the graph or ONNX node at fault.
        module_path: Dotted path of the user's module that the node came from.
        source: The user's ``file:line``.
        hint: The next step for the reader.
    """

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        module_path: str | None = None,
        source: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.node = node
        self.module_path = module_path
        self.source = source
        self.hint = hint
        rows = [("node", node), ("module", module_path), ("source", source), ("next step", hint)]
        super().__init__("\n".join([message, *(f"  {label}: {value}" for label, value in rows if value)]))


class TraceError(FxqError):
    """The model could not be turned into a graph."""


class GuardError(FxqError):
    """A traced graph is called with shapes for which the model would have taken another way."""


class RecipeError(FxqError):
    """A recipe, rule or spec asks for something that cannot be."""


class TargetError(FxqError):
    """A target's data is wrong, or no target has that name."""


class PassError(FxqError):
    """A pass broke its contract, or a pipeline is out of order."""


class VerifyError(PassError):
    """A graph is not legal at the stage it claims to be in."""


class CalibrationError(FxqError):
    """Calibration had no data, bad data, or left a quantizer without any."""


class ConvertError(FxqError):
    """A graph cannot be converted as it stands."""


class ExportError(FxqError):
    """Lowering to ONNX failed."""


class BuildError(FxqError):
    """TensorRT refused the network."""


class EngineError(FxqError):
    """An engine cannot be loaded or run here."""


class MissingDependencyError(FxqError):
    """An optional package is needed and not installed."""
