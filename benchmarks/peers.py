"""The quantizers: each leaves an INT8 Q/DQ ONNX file at `ctx.out` and returns its network as PyTorch runs it.

A tool that works on ONNX alone returns None. Heavy imports stay inside the function, in a stage of their own
("import"), because the tools do not live in one environment. To add a quantizer, write one such function
under `@quantizer`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import networks
import numpy as np
import torch
from context import Context
from torch import nn

Run = Callable[[Context], nn.Module | None]


@dataclass(frozen=True)
class Quantizer:
    """A registered quantizer.

    Attributes:
        name: What the commands call it.
        run: The function.
        environment: Whose Python runs it: "own", or a key of `runner.ENVIRONMENTS`.
    """

    name: str
    run: Run
    environment: str


QUANTIZERS: dict[str, Quantizer] = {}


def quantizer(
    name: str, environment: str = "peers", **options: Any
) -> Callable[[Callable[..., nn.Module | None]], Callable[..., nn.Module | None]]:
    """Register the function under `name`, with `options` given to it after the context."""

    def register(function: Callable[..., nn.Module | None]) -> Callable[..., nn.Module | None]:
        QUANTIZERS[name] = Quantizer(name, partial(function, **options), environment)
        return function

    return register


@quantizer("fp32", environment="own")
def float_reference(ctx: Context) -> nn.Module:
    """The float network itself, exported."""
    model = ctx.model()
    with ctx.stage("export"):
        networks.export_float(model, ctx.out, ctx.task.image_shape, ctx.opset)
    return model


@quantizer("fxq_cpu", environment="own", target="onnxruntime")
@quantizer("fxq_mse", environment="own", method="mse")
@quantizer("fxq_entropy", environment="own", method="entropy")
@quantizer("fxq_percentile", environment="own", method="percentile")
@quantizer("fxq_max", environment="own", method="max")
@quantizer("fxq", environment="own")
def fxq(ctx: Context, method: str | None = None, target: str = "tensorrt") -> nn.Module:
    """This project with its defaults, for another target, or with another calibration method for all activations."""
    with ctx.stage("import"):
        import fxq
        from fxq.recipe import Method
        from fxq.target import Target
    model, backend = ctx.model(), Target.load(target)
    if method is not None:
        activation = dataclasses.replace(backend.activation, method=Method(method))
        backend = dataclasses.replace(backend, activation=activation)
    with ctx.stage("prepare"):
        prepared = fxq.prepare(model, ctx.example, target=backend)
    with ctx.stage("calibrate"):
        fxq.calibrate(prepared, ctx.calibration, progress=False)
    with ctx.stage("convert"):
        quantized = fxq.convert(prepared)
    with ctx.stage("export"):
        fxq.export(quantized, ctx.out)
    return quantized


# Its calibrators' other method, "mse", is broken in the 0.47.0 that these figures are about: it calls
# fake_tensor_quant with a signature that has changed since.
@quantizer("modelopt_torch_percentile", how="percentile")
@quantizer("modelopt_torch_entropy", how="entropy")
@quantizer("modelopt_torch_mse", how="mse")
@quantizer("modelopt_torch_max", how="max")
def modelopt_torch(ctx: Context, how: str) -> nn.Module:
    """NVIDIA Model Optimizer, PyTorch: INT8_DEFAULT_CFG, then the exporter that its own examples call.

    "max" and "mse" are its algorithms ("mse" refines the weights' scales); for "entropy" and "percentile"
    (99.99) the activations' ranges come from its histogram calibrator, the weights keep "max".
    """
    with ctx.stage("import"):
        import modelopt.torch.quantization as mtq
        from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata
    attention: Any = torch.backends.mha  # torch annotates none of it
    attention.set_fastpath_enabled(False)  # its operator has no ONNX form
    model, config = ctx.model(), copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    histogram = how in ("entropy", "percentile")
    if histogram:
        for rule in config["quant_cfg"]:
            if rule["quantizer_name"] == "*input_quantizer":
                rule["cfg"]["calibrator"] = "histogram"
    with ctx.stage("prepare"):
        mtq.quantize(model, {**config, "algorithm": None})
    with ctx.stage("calibrate"):
        if histogram:
            _modelopt_histograms(ctx, model, how)
        else:
            mtq.calibrate(model, how, ctx.forward_all)
    with ctx.stage("export"):
        axes = {"x": {0: "n"}, "input": {0: "n"}}
        data, _ = get_onnx_bytes_and_metadata(
            model, ctx.example, model_name="m", onnx_opset=ctx.opset, dynamic_axes=axes
        )
        ctx.out.write_bytes(OnnxBytes.from_bytes(data).onnx_model["m.onnx"])
    return model


def _modelopt_histograms(ctx: Context, model: nn.Module, how: str) -> None:
    """Collect statistics over the calibration batches and load the ranges that `how` finds in them."""
    from modelopt.torch.quantization.model_calib import enable_stats_collection
    from modelopt.torch.quantization.nn import TensorQuantizer

    enable_stats_collection(model)
    ctx.forward_all(model)
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled:
            continue
        if "input" not in name:
            module.load_calib_amax()
        elif how == "percentile":
            module.load_calib_amax("percentile", percentile=99.99)
        else:
            module.load_calib_amax(how)
        module.enable_quant()
        module.disable_calib()


@quantizer("modelopt_onnx_max", method="max")
@quantizer("modelopt_onnx_entropy", method="entropy")
def modelopt_onnx(ctx: Context, method: str) -> None:
    """NVIDIA Model Optimizer, ONNX; it calibrates by itself, so everything is one stage."""
    with ctx.stage("import"):
        from modelopt.onnx.quantization import quantize
    batch = "x".join(str(dim) for dim in ctx.calibration[0].shape)
    with ctx.stage("all"):
        quantize(
            str(ctx.float_onnx),
            quantize_mode="int8",
            calibration_data=np.concatenate(ctx.numpy_batches()),
            calibration_shapes=f"input:{batch}",  # else it feeds images one by one, which hurts its entropy
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(ctx.out),
            log_level="WARNING",
        )


@quantizer("ort_trt_percentile", method="Percentile")
@quantizer("ort_trt_minmax", method="MinMax")
def onnxruntime_static(ctx: Context, method: str) -> None:
    """ONNX Runtime's quantize_static with the options of its own TensorRT example."""
    operators = ["Conv", "MatMul", "Gemm", "Add"]
    extra = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "AddQDQPairToWeight": True,
        "DedicatedQDQPair": True,
        "OpTypesToExcludeOutputQuantization": operators,
        "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
    }
    _quantize_static(ctx, method, activation="QInt8", op_types_to_quantize=operators, extra_options=extra)


@quantizer("ort_symmetric")
def onnxruntime_symmetric(ctx: Context) -> None:
    """ONNX Runtime's quantize_static in Q/DQ format, signed and symmetric for TensorRT, the rest as it comes."""
    extra = {"ActivationSymmetric": True, "WeightSymmetric": True}
    _quantize_static(ctx, "MinMax", activation="QInt8", extra_options=extra)


@quantizer("ort_cpu_qoperator", quant_format="QOperator")
@quantizer("ort_cpu", quant_format="QDQ")
def onnxruntime_cpu(ctx: Context, quant_format: str) -> None:
    """ONNX Runtime's quantize_static for its own CPU provider: uint8 activations, int8 weights per channel.

    The weights keep 8 bits, which needs a CPU with VNNI; its documentation asks for 7 (reduce_range) without.
    """
    _quantize_static(ctx, "MinMax", activation="QUInt8", quant_format=quant_format)


def _quantize_static(ctx: Context, method: str, *, activation: str, quant_format: str = "QDQ", **options: Any) -> None:
    with ctx.stage("import"):
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(ctx.numpy_batches())

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    prepared = ctx.work / "preprocessed.onnx"
    with ctx.stage("prepare"):
        try:
            quant_pre_process(str(ctx.float_onnx), str(prepared))
        except Exception:  # noqa: BLE001 - on Swin it raises a bare Exception, on ViT it asserts
            quant_pre_process(str(ctx.float_onnx), str(prepared), skip_symbolic_shape=True)
    with ctx.stage("calibrate + convert"):
        ort.quantize_static(
            str(prepared),
            str(ctx.out),
            Reader(),
            quant_format=ort.QuantFormat[quant_format],
            per_channel=True,
            activation_type=ort.QuantType[activation],
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod[method],
            **options,
        )


@quantizer("inc_trt", environment="inc", quant_format="QDQ", device="gpu", backend="onnxrt_trt_ep")
@quantizer("inc_cpu_qoperator", environment="inc", quant_format="QOperator")
@quantizer("inc_cpu", environment="inc", quant_format="QDQ")
def neural_compressor(ctx: Context, quant_format: str, **options: str) -> None:
    """Intel Neural Compressor 2.6, ONNX, with its defaults for the CPU or for TensorRT's provider; all in one stage.

    Without a function that measures accuracy it takes the first of its tuning steps, which quantizes all that it can.
    """
    with ctx.stage("import"):
        from neural_compressor import PostTrainingQuantConfig, quantization

    class Loader:
        batch_size = ctx.task.batch

        def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
            return ((batch, 0) for batch in ctx.numpy_batches())

    images = sum(len(batch) for batch in ctx.calibration)
    config = PostTrainingQuantConfig(quant_format=quant_format, calibration_sampling_size=[images], **options)
    with ctx.stage("all"):
        quantization.fit(str(ctx.float_onnx), config, calib_dataloader=Loader()).save(str(ctx.out))


@quantizer("torch_fx_minmax", observer="MinMaxObserver")
@quantizer("torch_fx_histogram", observer="HistogramObserver")
def torch_fx(ctx: Context, observer: str) -> nn.Module:
    """PyTorch's FX graph mode with its own TensorRT backend configuration, exported through TorchScript.

    Its export does not work by itself and is helped in two places (`_mend_torch_fx_export`).
    """
    with ctx.stage("import"):
        from torch.ao.quantization import QConfig, QConfigMapping
        from torch.ao.quantization import observer as observers
        from torch.ao.quantization.backend_config.tensorrt import get_tensorrt_backend_config
        from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx
    activation = getattr(observers, observer).with_args(
        dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-128, quant_max=127
    )
    weight = observers.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    mapping = QConfigMapping().set_global(QConfig(activation, weight))
    backend, model = get_tensorrt_backend_config(), ctx.model()
    with ctx.stage("prepare"):
        model = prepare_fx(model, mapping, (ctx.example,), backend_config=backend)
    with ctx.stage("calibrate"):
        ctx.forward_all(model)
    with ctx.stage("convert"):
        model = convert_to_reference_fx(model, backend_config=backend)
    with ctx.stage("export"):
        _mend_torch_fx_export(ctx.opset)
        networks.export_float(model, ctx.out, ctx.task.image_shape, ctx.opset)
    return model


def _mend_torch_fx_export(opset: int) -> None:
    """Let TorchScript trace and export reference quantized modules.

    They put a torch.qscheme into their state_dict, which tracing cannot detach, and the exporter has no
    symbolic for aten::quantize_per_channel.
    """
    from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
    from torch.onnx import symbolic_helper

    @symbolic_helper.parse_args("v", "v", "v", "v", "i")
    def per_channel(g: Any, x: Any, scale: Any, zero_point: Any, axis: Any, dtype: int) -> Any:
        onnx_dtype = {12: 3, 13: 2, 14: 6}[dtype]  # qint8, quint8 and qint32 as ONNX numbers them
        return symbolic_helper.quantize_helper(g, x, scale, g.op("Cast", zero_point, to_i=onnx_dtype), axis)

    plain = nn.Module._save_to_state_dict
    ReferenceQuantizedModule._save_to_state_dict = plain
    torch.onnx.register_custom_op_symbolic("aten::quantize_per_channel", per_channel, opset)
