"""quantize and dequantize compute what ONNX does: eager, traced, exported, compiled or faked."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fxq.errors import RecipeError
from fxq.qdq import DEQUANTIZE, QUANTIZE, dequantize, fake_quantize, quantize
from fxq.recipe import DTYPES

INTEGERS = [name for name, d in DTYPES.items() if not d.floating and name != "int32"]
ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
}


def bits(x: Tensor) -> Tensor:
    """The bit pattern of a float tensor: equal bits mean equal signs of zero too."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def ties(scale: Tensor, axis: int | None, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values, half of them exact multiples of half a step, far beyond the range of any type."""
    along = scale if axis is None else scale.reshape([-1 if d == axis % 4 else 1 for d in range(4)])
    halves = torch.randint(-700, 700, shape, generator=generator) / 2
    noise = torch.randn(shape, generator=generator) * 100
    return torch.where(torch.rand(shape, generator=generator) < 0.5, halves, noise) * along


def reference(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Integers and real values by the formula of R10, in NumPy."""
    shape = [-1 if axis is not None and d == axis % x.ndim else 1 for d in range(x.ndim)]
    s, z = (scale, zero) if axis is None else (scale.reshape(shape), zero.reshape(shape))
    to = DTYPES[dtype]
    q = np.clip(np.rint(x / s).astype(np.float64) + z, to.qmin, to.qmax)
    return q, (q - z).astype(np.float32) * s


def case(seed: int, dtype: str, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (3, 5, 4, 2)
    channels = () if axis is None else (shape[axis],)
    scale = torch.rand(channels, generator=g) * 0.3 + 1e-3
    to = DTYPES[dtype]
    low, high = (0, 1) if to.floating else (int(to.qmin), int(to.qmax) + 1)
    zero = torch.randint(low, high, channels, generator=g, dtype=torch.int32)
    return ties(scale, axis, shape, g), scale, zero


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("axis", [None, 0, 1, 3, -2])
def test_equals_numpy(dtype: str, axis: int | None) -> None:
    for seed in range(5):
        x, scale, zero = case(seed, dtype, axis)
        q = quantize(x, scale, zero, axis, dtype)
        real = dequantize(q, scale, zero, axis)
        wanted_q, wanted = reference(x.numpy(), scale.numpy(), zero.numpy(), axis, dtype)
        assert q.dtype == DTYPES[dtype].storage
        np.testing.assert_array_equal(q.numpy().astype(np.float64), wanted_q)
        np.testing.assert_array_equal(real.numpy(), wanted)


@given(
    x=hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=5),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
    zero=st.integers(-128, 127),
)
def test_equals_numpy_at_any_magnitude(x: np.ndarray, scale: float, zero: int) -> None:
    s, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    with np.errstate(over="ignore", under="ignore"):
        wanted, _ = reference(x, s.numpy(), z.numpy(), None, "int8")
    got = quantize(torch.from_numpy(x), s, z, None, "int8")
    np.testing.assert_array_equal(got.numpy().astype(np.float64), wanted)


def onnx_pair(x: Tensor, scale: Tensor, zero: Tensor, axis: int | None, dtype: str) -> tuple[Any, np.ndarray]:
    """What ONNX Runtime gives: the integers (None for FP8, which NumPy cannot hold) and the real values."""
    kind = ONNX_TYPES[dtype]
    float_kind = helper.np_dtype_to_tensor_dtype(x.numpy().dtype)
    attributes = {} if axis is None else {"axis": axis}
    zero_data = (
        helper.make_tensor("z", kind, zero.shape, [0.0] * zero.numel())
        if dtype.startswith("float8")
        else numpy_helper.from_array(zero.numpy().astype(helper.tensor_dtype_to_np_dtype(kind)), "z")
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    outputs = [helper.make_tensor_value_info("y", float_kind, x.shape)]
    if not dtype.startswith("float8"):
        outputs.append(helper.make_tensor_value_info("q", kind, x.shape))
    graph = helper.make_graph(
        nodes,
        "qdq",
        [helper.make_tensor_value_info("x", float_kind, x.shape)],
        outputs,
        [numpy_helper.from_array(scale.numpy(), "s"), zero_data],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    y, *q = session.run(None, {"x": x.numpy()})
    return (q[0] if q else None), y


@pytest.mark.parametrize("dtype", ONNX_TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1, 3])
@pytest.mark.parametrize("float_type", [torch.float32, torch.float16])
def test_equals_onnx_runtime(dtype: str, axis: int | None, float_type: torch.dtype) -> None:
    for seed in range(10):
        x, scale, zero = case(seed, dtype, axis)
        x, scale = x.clamp(-6e4, 6e4).to(float_type), scale.to(float_type)
        q = quantize(x, scale, zero, axis, dtype)
        real = dequantize(q, scale, zero, axis)
        wanted_q, wanted = onnx_pair(x, scale, zero, axis, dtype)
        assert real.dtype == float_type
        if wanted_q is not None:
            np.testing.assert_array_equal(q.numpy(), wanted_q)
        np.testing.assert_array_equal(real.numpy(), wanted)


def test_divides_rather_than_multiplying_by_the_reciprocal() -> None:
    scale = torch.tensor(0.3)
    x = torch.arange(-1000, 1000) / 2 * scale
    zero = torch.tensor(0, dtype=torch.int32)
    q = quantize(x, scale, zero, None, "int16")
    by_reciprocal = (x * (1 / scale)).round().to(torch.int16)
    assert not torch.equal(q, by_reciprocal)  # else this data would show nothing
    np.testing.assert_array_equal(q.numpy(), np.rint(x.numpy() / scale.numpy()).astype(np.int16))


def test_float8_saturates_and_keeps_nan() -> None:
    x = torch.tensor([0.0, 1.0, -447.0, 449.0, 1e9, torch.inf, -torch.inf, torch.nan])
    q = quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), None, "float8_e4m3fn")
    assert q.dtype == torch.float8_e4m3fn
    wanted = torch.tensor([0.0, 1.0, -448.0, 448.0, 448.0, 448.0, -448.0, torch.nan])
    torch.testing.assert_close(q.float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_int32_reaches_both_ends() -> None:
    x = torch.tensor([-1e12, 1e12, 2.0**30, 0.5, 1.5])
    q = quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), None, "int32")
    assert q.tolist() == [-(2**31), 2**31 - 1, 2**30, 0, 2]


@pytest.mark.parametrize("x_type", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_x_and_scale_are_independent(x_type: torch.dtype) -> None:
    x = (torch.randn(64) * 3).to(x_type)
    scale, zero = torch.tensor(0.0123), torch.tensor(3, dtype=torch.int32)
    q = quantize(x, scale, zero, None, "int8")
    torch.testing.assert_close(q, quantize(x.float(), scale, zero, None, "int8"), rtol=0, atol=0)
    assert dequantize(q, scale, zero, None).dtype == torch.float32
    assert dequantize(q, scale.half(), zero, None).dtype == torch.float16
    assert fake_quantize(x, scale, zero, None, "int8").dtype == x_type


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("x_type", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("train", [False, True])
def test_fake_quantize_is_the_pair_bit_for_bit(dtype: str, axis: int | None, x_type: torch.dtype, train: bool) -> None:
    for seed in range(3):
        x, scale, zero = case(seed, dtype, axis)
        x = torch.cat([x, -x * 1e-9, torch.zeros_like(x)]).to(x_type)  # rounds to zero from both sides
        if DTYPES[dtype].qmax > 2**20:
            zero = torch.zeros_like(zero)
        pair = dequantize(quantize(x, scale, zero, axis, dtype), scale, zero, axis).to(x_type)
        fake = fake_quantize(x.requires_grad_(train), scale, zero, axis, dtype)
        assert fake.requires_grad is train
        assert torch.equal(bits(fake.detach()), bits(pair))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "float8_e4m3fn"])
def test_gradient_passes_inside_the_range_only(dtype: str) -> None:
    to = DTYPES[dtype]
    scale, zero = torch.tensor(0.5), torch.tensor(0 if to.floating else 3, dtype=torch.int32)
    x = torch.linspace(-500, 500, 4001, requires_grad=True)
    fake_quantize(x, scale, zero, None, dtype).backward(torch.full_like(x, 2.0))
    steps = x.detach() / scale
    q = steps if to.floating else steps.round() + zero
    inside = (q >= to.qmin) & (q <= to.qmax)
    assert 0 < inside.sum() < len(x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inside * 2.0, rtol=0, atol=0)


def test_inputs_are_not_changed() -> None:
    x, scale, zero = case(0, "int8", 1)
    before = [t.clone() for t in (x, scale, zero)]
    q = quantize(x, scale, zero, 1, "int8")
    kept = q.clone()
    dequantize(q, scale, zero, 1)
    fake_quantize(x, scale, zero, 1, "int8")
    for now, then in zip((x, scale, zero, q), (*before, kept), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_operators_pass_torch_opcheck(axis: int | None, dtype: str) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if dtype.startswith("float8"):
        checks = checks[1:]  # the schema check multiplies the result, which torch cannot do with FP8
    x, scale, zero = case(0, dtype, axis)
    torch.library.opcheck(QUANTIZE, (x, scale, zero, axis, dtype), test_utils=checks)
    q = quantize(x, scale, zero, axis, dtype)
    torch.library.opcheck(DEQUANTIZE, (q, scale, zero, axis), test_utils=checks)


def test_fake_tensors_know_shape_and_dtype() -> None:
    with FakeTensorMode():
        x, scale, zero = torch.empty(2, 3), torch.empty(3), torch.empty(3, dtype=torch.int32)
        q = quantize(x, scale, zero, 1, "int4")
        assert (q.shape, q.dtype) == ((2, 3), torch.int8)
        assert dequantize(q, scale.half(), zero, 1).dtype == torch.float16


class Pair(torch.nn.Module):
    """One quantize and dequantize, as a converted graph has them."""

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("scale", torch.full(() if axis is None else (3,), 0.05))
        self.register_buffer("zero_point", torch.full(() if axis is None else (3,), 7, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        q = QUANTIZE(x, self.scale, self.zero_point, self.axis, "uint8")
        return DEQUANTIZE(q, self.scale, self.zero_point, self.axis) + 1


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("axis", [None, 1])
def test_export_keeps_the_operators_whole(axis: int | None) -> None:
    model, x = Pair(axis), torch.randn(4, 3, 5)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).run_decompositions({})
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(QUANTIZE) == targets.count(DEQUANTIZE) == 1
    other = torch.randn(7, 3, 5)
    assert torch.equal(program.module()(other), model(other))


@pytest.mark.parametrize("axis", [None, 1])
def test_compiles_as_one_graph(axis: int | None) -> None:
    model, x = Pair(axis), torch.randn(4, 3, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


# Dynamo makes an instance of the autograd function to trace it, and is warned by autograd for it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_fake_quantize_compiles_with_its_gradient() -> None:
    scale, zero = torch.tensor(0.02), torch.tensor(-3, dtype=torch.int32)

    def loss(x: Tensor) -> Tensor:
        return (fake_quantize(x, scale, zero, None, "int8") ** 2).sum()

    x, y = torch.randn(100, requires_grad=True), torch.empty(100)
    y = x.detach().clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_autocast_leaves_the_arithmetic_alone() -> None:
    x, scale, zero = case(0, "int8", None)
    wanted = quantize(x, scale, zero, None, "int8")
    with torch.autocast("cpu", torch.bfloat16):
        q = quantize(x, scale, zero, None, "int8")
        assert torch.equal(q, wanted)
        assert dequantize(q, scale, zero, None).dtype == torch.float32
        assert fake_quantize(x, scale, zero, None, "int8").dtype == torch.float32


def test_fx_prints_and_runs_the_constants() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    scale, zero = graph.placeholder("scale"), graph.placeholder("zero")
    q = graph.call_function(QUANTIZE, (x, scale, zero, None, "int8"))
    graph.output(graph.call_function(DEQUANTIZE, (q, scale, zero, None)))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    values, s, z = case(1, "int8", None)
    assert torch.equal(gm(values, s, z), fake_quantize(values, s, z, None, "int8"))


def test_an_unknown_dtype_is_named() -> None:
    x, scale, zero = case(0, "int8", None)
    for call in (quantize, fake_quantize):
        with pytest.raises(RecipeError, match=r"'int9'.*\n.*int8"):
            call(x, scale, zero, None, "int9")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_a_gpu_gives_the_same_bits(dtype: str, axis: int | None) -> None:
    x, scale, zero = case(0, dtype, axis)
    if DTYPES[dtype].qmax > 2**20:
        zero = torch.zeros_like(zero)
    x = torch.cat([x, torch.randn(100_000 // 40, *x.shape[1:]) * 30])
    here = quantize(x, scale, zero, axis, dtype)
    there = quantize(x.cuda(), scale.cuda(), zero.cuda(), axis, dtype)
    assert torch.equal(here.float(), there.cpu().float())
    mixed = quantize(x.cuda(), scale, zero, axis, dtype)  # parameters left on the host
    assert torch.equal(mixed.float(), there.float())
    real = dequantize(there, scale.cuda(), zero.cuda(), axis)
    assert torch.equal(real.cpu(), dequantize(here, scale, zero, axis))
