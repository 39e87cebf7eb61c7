"""One network with float32, float16 and bfloat16 for what is not quantized: kernels meant and built, bytes by cause.

    python benchmarks/compute_types.py --tasks resnet18 --results types.json --tensorrt DIR

Each row is stored as soon as it is there, and a later run goes on behind it. `comparison.py` makes the page. The
builder has to be importable, so the folder that holds it goes onto the search paths, as judge.py does it; this command
starts itself again to do so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tasks import TASKS

if TYPE_CHECKING:
    from torch import fx

    from fxq.backends.trt_kernels import LayerInfo, TensorInfo

TYPES = ("fp32", "fp16", "bf16")
NETWORKS = "resnet18,resnet50,mobilenet_v3_large"
LIBRARIES = ("tensorrt", "tensorrt-rtx")
SMALL = 1024  # bytes; scalars and statistics


def causes(kernels: Iterable[LayerInfo], edges: frozenset[str]) -> dict[str, Any]:
    """Activation bytes that kernels read and write, by why a tensor has its type.

    Args:
        kernels: The engine's.
        edges: Names of the network's inputs and outputs.

    Returns:
        Bytes of `io` (the network's inputs and outputs, which keep float32), `sums` (what INT8 convolutions and matrix
        products write in float for the next kernel), `pools` (float32 tensors at pooling kernels, which this builder
        runs in float32 where the file says bfloat16), `int8`, `float` (any other tensor of the compute type), and
        `float32_left`: names of float32 tensors of none of these causes.
    """
    kernels = list(kernels)
    pools = {t.name for k in kernels if "pool" in k.kind for t in (*k.inputs, *k.outputs) if t.dtype == "float32"}
    sums = {t.name for k in kernels if k.weighted and k.reads_int8 for t in k.outputs if t.dtype != "int8"}
    found: Counter[str] = Counter(dict.fromkeys(("io", "sums", "pools", "int8", "float"), 0))
    left = set()
    for tensor in (t for k in kernels for t in (*k.inputs, *k.outputs)):
        cause = _cause(tensor, edges, sums, pools)
        found[cause] += tensor.nbytes or 0
        if cause == "float" and tensor.dtype == "float32" and (tensor.nbytes or 0) > SMALL:
            left.add(tensor.name)
    return {**found, "float32_left": sorted(left)}


def _cause(tensor: TensorInfo, edges: frozenset[str], sums: set[str], pools: set[str]) -> str:
    if tensor.name in edges:
        return "io"
    if tensor.name in sums:
        return "sums"
    if tensor.name in pools:
        return "pools"
    return "int8" if tensor.dtype in ("int8", "uint8", "bool") else "float"


def graph_of(task_name: str, work: Path) -> fx.GraphModule:
    """The task's network, quantized with the task's calibration images."""
    import fxq

    task = TASKS[task_name]
    batches = list(task.calibration().split(task.batch))
    return fxq.quantize(task.model(work / task_name), batches, progress=False)  # of 8 images, as engine.py builds


def row(quantized: fx.GraphModule, compute_dtype: str, folder: Path) -> dict[str, Any]:
    """What one file is meant to become, and what it became."""
    import fxq
    from fxq.backends.onnx_graph import OnnxGraph
    from fxq.backends.trt_agreement import compare_kernels

    path = folder / f"{compute_dtype}.onnx"
    fxq.export(quantized, path, compute_dtype=compute_dtype, dynamic_shapes=None)  # the batch that it was traced with
    engine = fxq.build(path, folder / "net.engine")
    graph, kernels = OnnxGraph(path), engine.kernels or ()
    report = fxq.engine_report(engine, path)
    predictions = {}
    for library in LIBRARIES:
        meant = compare_kernels(graph, fxq.predict(path, library=library).kernels, kernels)
        predictions[library] = {
            "kernels": meant.kernels[0],
            "precision": meant.precision_share,
            "fusions": meant.fusion_share,
        }
    weighted = [kernel for kernel in kernels if kernel.weighted]
    return {
        "kernels": len(kernels),
        "weighted": len(weighted),
        "int8": sum(kernel.reads_int8 for kernel in weighted),
        "predicted": predictions,
        "findings": Counter(f"{f.severity} {f.rule}" for f in report.findings),
        "activation_bytes": report.activation_bytes,
        "causes": causes(kernels, frozenset(graph.inputs | graph.outputs)),
    }


def run(args: argparse.Namespace) -> Iterator[str]:
    """Fill the results; a line for each new row."""
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    for task in args.tasks.split(","):
        missing = [name for name in TYPES if name not in results.get(task, {})]
        quantized = graph_of(task, args.work) if missing else None
        for compute_dtype in missing:
            assert quantized is not None
            with tempfile.TemporaryDirectory() as folder:
                found = row(quantized, compute_dtype, Path(folder))
            results.setdefault(task, {})[compute_dtype] = found
            part = args.results.with_suffix(".part")
            part.write_text(json.dumps(results, indent=1))
            part.replace(args.results)
            yield f"{task} {compute_dtype}: {found['activation_bytes'] / 1e6:.1f} MB, {found['causes']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path(tempfile.gettempdir()) / "fxq-benchmarks"
    parser.add_argument("--tasks", default=NETWORKS, help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=work, help="the float networks' folder (default: %(default)s)")
    parser.add_argument("--results", type=Path, required=True, help="JSON file; what is in it is not run again")
    parser.add_argument("--tensorrt", type=Path, default=os.environ.get("FXQ_TENSORRT"))
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.tensorrt is not None:  # the libraries have to be named before a process starts
        environment = {key: value for key, value in os.environ.items() if key != "FXQ_TENSORRT"}
        for variable in ("LD_LIBRARY_PATH", "PYTHONPATH"):
            rest = [os.environ[variable]] if os.environ.get(variable) else []
            environment[variable] = os.pathsep.join([str(Path(args.tensorrt).resolve()), *rest])
        command = [sys.executable, __file__, "--tasks", args.tasks, "--work", args.work, "--results", args.results]
        command += ["--threads", str(args.threads)]
        sys.exit(subprocess.run([str(word) for word in command], check=False, env=environment).returncode)
    torch.set_num_threads(args.threads)
    for line in run(args):
        print(line, flush=True)


if __name__ == "__main__":
    main()
