"""fxq: quantize PyTorch models for TensorRT by rewriting their torch.fx graph.

The names here are the whole of the public face; ``fxq.passes`` and ``fxq.backends`` hold the passes and the
backends.
"""

from __future__ import annotations

from . import calibration_io, notebook_display, passes, pictures, qat
from .ablation import sensitivity
from .deployment import build, engine_report, export, fix, lint, load_engine, predict
from .drawing import Steps, View, diff, view
from .editor import Editor
from .errors import FxqError
from .explanations import explain
from .flow import convert, prepare, prepare_qat, quantize, trace
from .graph import Annotation
from .manager import PassManager, Pipeline
from .methods import score_methods
from .onnx_comparison import compare_onnx
from .passbase import Pass, PassResult
from .printer import format_graph
from .recipe import EdgeSpecs, Method, PerChannel, PerTensor, QSpec, Recipe, Rule
from .reports import report
from .rewriting import RewritePass
from .scales import calibrate, solve
from .side_by_side import compare
from .target import Target

__version__ = "0.1.0"

__all__ = [
    "Annotation",
    "EdgeSpecs",
    "Editor",
    "FxqError",
    "Method",
    "Pass",
    "PassManager",
    "PassResult",
    "PerChannel",
    "PerTensor",
    "Pipeline",
    "QSpec",
    "Recipe",
    "RewritePass",
    "Rule",
    "Steps",
    "Target",
    "View",
    "build",
    "calibrate",
    "calibration_io",
    "compare",
    "compare_onnx",
    "convert",
    "diff",
    "engine_report",
    "explain",
    "export",
    "fix",
    "format_graph",
    "lint",
    "load_engine",
    "passes",
    "pictures",
    "predict",
    "prepare",
    "prepare_qat",
    "qat",
    "quantize",
    "report",
    "score_methods",
    "sensitivity",
    "solve",
    "trace",
    "view",
]

notebook_display.register()
