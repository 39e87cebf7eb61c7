"""The passes, one a file, in the order of the pipelines that :mod:`fxq.passes.pipelines` holds as data."""

from __future__ import annotations

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
from .pipelines import CONVERT, PREPARE, PREPARE_QAT
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

__all__ = [
    "CONVERT",
    "PREPARE",
    "PREPARE_QAT",
    "Advise",
    "Annotate",
    "Canonicalize",
    "ConvertQuantizers",
    "CorrectBiases",
    "DecomposeActivations",
    "DecomposeAttention",
    "DecomposeProducts",
    "DropIdentities",
    "ExpandAttention",
    "ExpandModules",
    "FinishTraining",
    "Functionalize",
    "FuseBatchNorm",
    "InsertQuantizers",
    "KeepDropout",
    "PropagateQuantization",
    "QuantizeBiases",
    "QuantizeConcat",
    "QuantizeNorms",
    "ResidualAdd",
    "RestoreTraining",
    "SeparateProjections",
    "SetAsideTraining",
    "TieScales",
    "WriteClampedSums",
]
