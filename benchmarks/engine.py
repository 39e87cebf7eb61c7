"""Build an ONNX file into an engine and count, as JSON, what its kernels read and write.

    python engine.py model.onnx --batch 8 --log builder.log

The figures come from the builder's own log, so no GPU is needed. TensorRT-RTX's builder (1.7) lists its
kernels there; a builder that does not gives "ok" without kernel figures. compare.py runs this as a process of
its own, because the folder with TensorRT's libraries has to be named before the process starts. It shares no
code with fxq: whoever is judged does not bring the judge.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
import tensorrt as trt

BYTES = {
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Int8": 1,
    "UInt8": 1,
    "Bool": 1,
    "Int32": 4,
    "Int64": 8,
    "FP8": 1,
}
WIDE = ("Float", "Half", "BFloat16")
SYNCHRONIZATION = ("signal", "wait")
WEIGHTED = ("correlation", "convolution", "deconvolution", "gemm", "matmul", "gett", "fc")
WEIGHTED_FUSION = re.compile(r"Fc|Gemm|MatMul|Conv|Dot")  # in the name of a runtime_fusion kernel
KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: .*?Metadata: ?(?P<metadata>.*)"
)
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
TENSOR = re.compile(r"\{ Name: (?P<name>\S+), Dimensions: \[(?P<dims>[\d,]*)\].*?Datatype: (?P<dtype>\w+)")


class Log(trt.ILogger):
    """Keeps every message of the builder."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[tuple[Any, str]] = []

    def log(self, severity: Any, message: str) -> None:
        self.messages.append((severity, message))


@dataclass(frozen=True)
class Tensor:
    """A tensor of a kernel, with the type it has in memory."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.dims) * BYTES.get(self.dtype, 4)

    @property
    def axes(self) -> int:
        """How many dimensions are longer than 1."""
        return sum(dim > 1 for dim in self.dims)


@dataclass(frozen=True)
class Kernel:
    """One kernel of the engine, as the builder's log prints it."""

    name: str
    kind: str
    inputs: list[Tensor]
    constants: list[Tensor]
    outputs: list[Tensor]
    metadata: str

    @property
    def weighted(self) -> bool:
        """A convolution or matrix product, alone or fused."""
        if self.kind == "runtime_fusion":
            return bool(WEIGHTED_FUSION.search(self.name))
        return self.kind in WEIGHTED

    @property
    def weights(self) -> Tensor | None:
        """The largest constant of two or more dimensions."""
        return max((t for t in self.constants if t.axes > 1), key=lambda t: prod(t.dims), default=None)

    @property
    def reads_int8(self) -> bool:
        """The activation and the weights (a constant, or the last input) both come in as INT8."""
        if not self.inputs:
            return False
        weights = self.weights or self.inputs[-1]
        return self.inputs[0].dtype == "Int8" and weights.dtype == "Int8"

    @property
    def macs(self) -> int:
        """Multiply-adds: output elements times weights of one output channel."""
        if self.weights is None or not self.outputs:
            return 0
        dims = self.outputs[0].dims
        channels = dims[1] if len(dims) == 4 else dims[-1]
        return prod(dims) * prod(self.weights.dims) // max(channels, 1)

    @property
    def depthwise(self) -> bool:
        """A convolution with one output channel for each group; in INT8 this builder pads each group to 4 channels."""
        if not self.weighted or self.weights is None or not self.outputs or len(self.weights.dims) != 4:
            return False
        groups = self.inputs[0].dims[1] // max(self.weights.dims[1], 1)
        return groups > 1 and groups == self.outputs[0].dims[1]

    @property
    def added(self) -> list[Tensor]:
        """The inputs that an elementwise operation can join: two or more of one shape, else none."""
        if not self.inputs:
            return []
        same = [t for t in self.inputs if t.dims == self.inputs[0].dims]
        return same if len(same) > 1 else []


def parse_kernels(messages: list[str]) -> list[Kernel]:
    """The kernels under "Layers:", without those that only synchronize streams.

    Raises:
        ValueError: A line has a kernel in a form this parser does not know; counting the others would lie.
    """
    kernels = []
    for message in messages:
        if "Layers:" not in message:
            continue
        for line in message[message.index("Layers:") :].splitlines():
            if not line.startswith("Name: "):
                continue
            match = KERNEL.match(line)
            if match is None:
                raise ValueError(f"the builder's log has a kernel in an unknown form: {line[:200]}")
            if match["kind"].strip() not in SYNCHRONIZATION:
                kernels.append(
                    Kernel(
                        name=match["name"],
                        kind=match["kind"].strip(),
                        inputs=_tensors(match["inputs"]),
                        constants=_tensors(match["constants"]),
                        outputs=_tensors(match["outputs"]),
                        metadata=match["metadata"].replace("\x1f", "").strip(),
                    )
                )
    return kernels


def _tensors(text: str) -> list[Tensor]:
    return [
        Tensor(m["name"], tuple(int(d) for d in m["dims"].split(",") if d), m["dtype"]) for m in TENSOR.finditer(text)
    ]


def identity_skips(kernels: list[Kernel]) -> list[Tensor]:
    """The inputs of residual additions that do not come straight from a convolution.

    An Add fused into its convolution takes the skip as second input, and an identity skip has other readers.
    An Add in a kernel of its own takes the convolution's output and the skip.
    """
    from_weighted = {t.name for k in kernels if k.weighted for t in k.outputs}
    readers: dict[str, int] = {}
    for kernel in kernels:
        for name in {t.name for t in kernel.inputs}:
            readers[name] = readers.get(name, 0) + 1
    skips = []
    for kernel in kernels:
        if kernel.weighted and kernel.weights is not None:
            skips += [t for t in kernel.inputs[1:] if t.dims == kernel.outputs[0].dims and readers[t.name] > 1]
        elif not kernel.weighted and any(t.name in from_weighted for t in kernel.added):
            skips += [t for t in kernel.added if t.name not in from_weighted]
    return skips


def figures(kernels: list[Kernel]) -> dict[str, Any]:
    """What the tables show of the kernels; bytes are activations read and written over all kernels.

    Depthwise bytes are all reads and writes of tensors that a depthwise convolution reads or writes.
    """
    weighted = [k for k in kernels if k.weighted]
    int8, skips = [k for k in weighted if k.reads_int8], identity_skips(kernels)
    traffic: dict[str, int] = {}
    for tensor in (t for k in kernels for t in [*k.inputs, *k.outputs]):
        traffic[tensor.dtype] = traffic.get(tensor.dtype, 0) + tensor.bytes
    beside = {t.name for k in kernels if k.depthwise for t in [*k.inputs, *k.outputs]}
    macs = sum(k.macs for k in weighted)
    return {
        "kernels": len(kernels),
        "weighted_kernels": len(weighted),
        "weighted_kernels_reading_int8": len(int8),
        "int8_macs": sum(k.macs for k in int8) / macs if macs else None,
        "identity_skips": len(skips),
        "identity_skips_read_in_int8": sum(t.dtype == "Int8" for t in skips),
        "activation_bytes": traffic,
        "activation_bytes_total": sum(traffic.values()),
        "activation_bytes_depthwise": sum(
            t.bytes for k in kernels for t in [*k.inputs, *k.outputs] if t.name in beside
        ),
        "depthwise_kernels": sum(k.depthwise for k in kernels),
        "kernels_with_wide_output": sum(any(t.dtype in WIDE and t.bytes > 1024 for t in k.outputs) for k in kernels),
        "weighted_kernels_not_int8": [f"{k.name} {k.metadata}" for k in weighted if not k.reads_int8],
    }


def static_batch(path: Path, batch: int) -> bytes:
    """The model with the symbolic first dimension of its inputs and outputs set to `batch`."""
    model = onnx.load(path)
    for value in [*model.graph.input, *model.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = batch
    del model.graph.value_info[:]  # they still say the old dimension
    return model.SerializeToString()


def described(kernel: Kernel) -> dict[str, Any]:
    """A kernel for readers who look for one: its name, ONNX nodes, and the types of what it reads and writes."""
    return {
        "name": kernel.name,
        "nodes": NODE.findall(kernel.metadata),
        "inputs": [tensor.dtype for tensor in kernel.inputs],
        "outputs": [tensor.dtype for tensor in kernel.outputs],
    }


def report(path: Path, batch: int, log_path: Path | None, listed: bool = False) -> dict[str, Any]:
    """Build `path` at a fixed batch, strongly typed; a refusal comes back as "ok": False with the reasons."""
    log = Log()
    builder = trt.Builder(log)
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # 10.x wants it said, 11 knows nothing else
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    result: dict[str, Any] = {"ok": False, "batch": batch, "tensorrt": trt.__version__}
    if not parser.parse(static_batch(path, batch)):
        result["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return result
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    result["build_s"] = time.perf_counter() - start
    if log_path is not None:
        log_path.write_text("\n".join(f"[{severity}] {message}" for severity, message in log.messages))
    if engine is None:
        result["errors"] = [m for severity, m in log.messages if severity <= trt.ILogger.ERROR][-5:]
        return result
    kernels = parse_kernels([message for _, message in log.messages])
    if listed:
        result["list"] = [described(kernel) for kernel in kernels]
    result.update(ok=True, engine_bytes=engine.nbytes, **(figures(kernels) if kernels else {}))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--log", type=Path, help="write the builder's whole log here")
    parser.add_argument("--kernels", action="store_true", help="list the kernels too")
    args = parser.parse_args()
    print(json.dumps(report(args.onnx, args.batch, args.log, args.kernels), indent=1))


if __name__ == "__main__":
    main()
