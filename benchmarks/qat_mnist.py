"""LeNet on MNIST, 3 epochs: float, post-training quantization and quantization-aware training.

    FXQ_DATA=DIR python benchmarks/qat_mnist.py

The experiment of NNI's mixed-precision page: SGD with learning rate 0.01 and momentum 0.5, batches of 64, 3 epochs
from scratch, once in float and once quantization-aware; all-INT8, and mixed with the convolutions, fc1 and fc2 in INT8
and fc3 in float. Post-training quantization calibrates the float network on 512 train images. Figures are means over
the seeds. Latency is ONNX Runtime's at batch 128 over that of the float export, the files taking turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import images
import networks
import qat_training as qat
import torch
from torch import fx, nn

import fxq

EPOCHS, BATCH = 3, 64
RECIPES = {"all INT8": None, "mixed": fxq.Recipe([fxq.Rule("fc3", None, "stays float")])}
NNI = {"float": (96.0, 1.0), "mixed": (96.0, 1.199961 / 0.753688), "all INT8": (93.7, 1.199961 / 0.229869)}
"""NNI's own top-1, and how many times as fast as float, on a GTX 2080."""


def trained(seed: int, split: images.Split, **options: Any) -> nn.Module:
    """A LeNet trained in float, or quantization-aware with fxq.prepare_qat's options."""
    torch.manual_seed(seed)
    model: nn.Module = networks.LeNet()
    if options:
        model = fxq.prepare_qat(model, split.images[:2], **options)
    optimizer = torch.optim.SGD(fxq.qat.parameter_groups(model, lr=0.01, scale_lr=1e-4), momentum=0.5)
    plan = fxq.qat.schedule(model, observe_until=EPOCHS - 1) if options else None
    qat.train(
        model, split.images, split.labels, optimizer=optimizer, epochs=EPOCHS, batch=BATCH, seed=seed, before_epoch=plan
    )
    return model.eval()


def run_seed(seed: int, scales: list[str]) -> tuple[dict[str, float], dict[str, fx.GraphModule], dict[str, float]]:
    """Top-1 by name, what is exported, and average bits."""
    train, test = images.mnist("train"), images.mnist("test")
    model = trained(seed, train)
    found = {"float": qat.top1(model, test.images, test.labels)}
    exported, bits = {"float": fxq.trace(model, test.images[:128])}, {"float": 32.0}
    for name, recipe in RECIPES.items():
        prepared = fxq.prepare(model, train.images[:128], recipe=recipe)
        bits[name] = qat.average_bits(prepared)
        fxq.calibrate(prepared, train.images[:512].split(64), progress=False)
        found[f"{name}, PTQ"] = qat.top1(fxq.convert(prepared), test.images, test.labels)
        for policy in scales:
            gm = trained(seed, train, recipe=recipe, scales=policy)
            converted = fxq.convert(gm)
            found[f"{name}, QAT {policy}"] = qat.top1(converted, test.images, test.labels)
            exported.setdefault(name, converted)
    return found, exported, bits


def latencies(exported: dict[str, fx.GraphModule], threads: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one batch of 128 in ONNX Runtime, the files taking turns."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    x = {"x": torch.randn(128, 1, 28, 28).numpy()}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for index, (name, gm) in enumerate(exported.items()):
            path = fxq.export(gm, Path(folder) / f"{index}.onnx")
            broken = fxq.lint(path).errors if name != "float" else ()
            if broken:
                raise SystemExit(f"{name}: {broken}")
            sessions[name] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(rounds + 5):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, x)
                if number >= 5:
                    times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scales", default="moving-average,learned")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--results", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    rows: dict[str, list[float]] = {}
    for seed in map(int, args.seeds.split(",")):
        found, exported, bits = run_seed(seed, args.scales.split(","))
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
        print(f"seed {seed}: {found}", flush=True)
    times = latencies(exported, args.threads, args.rounds)
    print("\n" + qat.means(rows, "LeNet on MNIST"))
    print("\n| export | average bits | float's latency over it | NNI: top-1 %, times as fast |\n|---|---|---|---|")
    for name, value in times.items():
        theirs = NNI[name]
        print(f"| {name} | {bits[name]:.1f} | {times['float'] / value:.2f} | {theirs[0]}, {theirs[1]:.2f} |")
    if args.results:
        part = args.results.with_suffix(".part")
        part.write_text(json.dumps({"top1": rows, "bits": bits, "ms": times}, indent=1))
        part.replace(args.results)


if __name__ == "__main__":
    main()
