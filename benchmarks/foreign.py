"""torchao and Brevitas, whose files `lint_peers.py` reads: registered beside the quantizers of `peers.py`.

They are made as the tools' pages show it, and signed and symmetric, since TensorRT takes nothing else.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from context import Context
from peers import QUANTIZERS, quantizer

__all__ = ["QUANTIZERS"]


@quantizer("torchao")
def torchao_pt2e(ctx: Context) -> None:
    """torchao's PT2E with the XNNPACK quantizer that its pages use, symmetric; torch.onnx's dynamo exporter."""
    with ctx.stage("import"):
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import QuantizationSpec
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer
        from torchao.testing.pt2e._xnnpack_quantizer_utils import QuantizationConfig
    activation = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=pt2e.HistogramObserver.with_args(eps=2**-12),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=pt2e.PerChannelMinMaxObserver,
    )
    tool = XNNPACKQuantizer().set_global(QuantizationConfig(activation, activation, weight, None))
    batch = ({0: torch.export.Dim("n", min=2, max=1024)},)
    with ctx.stage("prepare"):
        exported = torch.export.export(ctx.model(), (ctx.example,), dynamic_shapes=batch)
        model = prepare_pt2e(exported.module(), tool)
    with ctx.stage("calibrate"):
        ctx.forward_all(model)
    with ctx.stage("convert"):
        model = convert_pt2e(model)
    with ctx.stage("export"):
        torch.onnx.export(
            model,
            (ctx.example,),
            str(ctx.out),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=batch,
            opset_version=18,
            external_data=False,
        )


@quantizer("brevitas", environment="brevitas")
def brevitas(ctx: Context) -> None:
    """Brevitas' graph.quantize, signed activations, a scale for each output channel, float biases; its QCDQ export."""
    with ctx.stage("import"):
        from brevitas.export import export_onnx_qcdq
        from brevitas.graph import quantize as tool
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
    kinds = {
        "act_quant": Int8ActPerTensorFloat,
        "input_quant": Int8ActPerTensorFloat,
        "weight_quant": Int8WeightPerChannelFloat,
        "bias_quant": None,
    }

    def signed(table: dict[Any, Any]) -> dict[Any, Any]:
        table = copy.copy(table)
        for kind, entry in table.items():
            if entry is not None:
                table[kind] = (entry[0], {key: kinds.get(key, value) for key, value in entry[1].items()})
        return table

    with ctx.stage("prepare"):
        model = tool.preprocess_for_quantize(ctx.model(), trace_model=True, merge_bn=True)
        model = tool.quantize(
            model,
            quant_identity_map=signed(tool.QUANT_IDENTITY_MAP),
            compute_layer_map=signed(tool.COMPUTE_LAYER_MAP),
            quant_act_map=signed(tool.QUANT_ACT_MAP),
            unsigned_act_tuple=(),
        )
    with ctx.stage("calibrate"), calibration_mode(model):
        ctx.forward_all(model)
    with ctx.stage("export"), torch.no_grad():
        axes = {"input": {0: "n"}, "output": {0: "n"}}
        export_onnx_qcdq(
            model,
            args=ctx.example,
            export_path=str(ctx.out),
            opset_version=ctx.opset,
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=axes,
        )
