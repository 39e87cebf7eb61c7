"""The pipelines, as data: what fxq.prepare, fxq.prepare_qat and fxq.convert run, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ..manager import Pipeline
from .advise import Advise
from .annotate import Annotate
from .canonicalize import Canonicalize
from .convert_quantizers import ConvertQuantizers
from .correct_biases import CorrectBiases
from .decompose_activations import DecomposeActivations
from .decompose_attention import DecomposeAttention
from .decompose_products import DecomposeProducts
from .drop_identities import DropIdentities
from .expand_attention import ExpandAttention
from .expand_modules import ExpandModules
from .finish_training import FinishTraining
from .functionalize import Functionalize
from .fuse_batch_norm import FuseBatchNorm
from .insert_quantizers import InsertQuantizers
from .keep_dropout import KeepDropout
from .propagate_quantization import PropagateQuantization
from .quantize_biases import QuantizeBiases
from .quantize_concat import QuantizeConcat
from .quantize_norms import QuantizeNorms
from .residual_add import ResidualAdd
from .restore_training import RestoreTraining
from .separate_projections import SeparateProjections
from .set_aside_training import SetAsideTraining
from .tie_scales import TieScales
from .write_clamped_sums import WriteClampedSums

__all__ = ["CONVERT", "PREPARE", "PREPARE_QAT"]

PREPARE: Final = Pipeline(
    "prepare",
    (
        Functionalize(),
        ExpandModules(),
        ExpandAttention(),
        DecomposeProducts(),
        Canonicalize(),
        DropIdentities(),
        FuseBatchNorm(),
        SeparateProjections(),
        DecomposeAttention(),
        DecomposeActivations(),
        Annotate(),
        Advise(),
        ResidualAdd(),
        QuantizeConcat(),
        QuantizeNorms(),
        PropagateQuantization(),
        TieScales(),
        InsertQuantizers(),
    ),
)
"""Traced graph to a graph with observers."""

PREPARE_QAT: Final = replace(
    PREPARE.before("drop-identities", KeepDropout())
    .replace("fuse-batch-norm", SetAsideTraining())
    .after("insert-quantizers", RestoreTraining()),
    name="prepare-qat",
)
"""Traced graph to a graph with fake quantizers in the same places, which trains."""

CONVERT: Final = Pipeline(
    "convert", (FinishTraining(), CorrectBiases(), ConvertQuantizers(), WriteClampedSums(), QuantizeBiases())
)
"""Calibrated or trained graph to a graph with explicit quantize and dequantize operations."""
