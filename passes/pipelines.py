"""The pipelines, as data: what fxq.prepare and fxq.convert run, in order."""

from __future__ import annotations

from typing import Final

from ..manager import Pipeline
from .advise import Advise
from .annotate import Annotate
from .canonicalize import Canonicalize
from .convert_quantizers import ConvertQuantizers
from .drop_identities import DropIdentities
from .expand_modules import ExpandModules
from .functionalize import Functionalize
from .fuse_batch_norm import FuseBatchNorm
from .insert_quantizers import InsertQuantizers
from .residual_add import ResidualAdd
from .tie_scales import TieScales

__all__ = ["CONVERT", "PREPARE"]

PREPARE: Final = Pipeline(
    "prepare",
    (
        Functionalize(),
        ExpandModules(),
        Canonicalize(),
        DropIdentities(),
        FuseBatchNorm(),
        Annotate(),
        Advise(),
        ResidualAdd(),
        TieScales(),
        InsertQuantizers(),
    ),
)
"""Traced graph to a graph with observers."""

CONVERT: Final = Pipeline("convert", (ConvertQuantizers(),))
"""Calibrated graph to a graph with explicit quantize and dequantize operations."""
