"""What calibration costs: each observer's forward pass as a multiple of the plain one, and the time to solve.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --device cuda --batch 64 --rounds 5
    python benchmarks/calibration.py --torch-ao --modelopt   (in an environment that has them, see setup_peers.sh)
    python benchmarks/calibration.py --memory 8 512

The plain forward is the same fused graph without observers, in inference mode. Every batch goes through all
variants in turn, so that all of them see the same load on the machine; medians over all batches and rounds
count. The network is torchvision's with random weights, the images are smoothed noise.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from images import synthetic
from networks import torchvision_models
from torch import Tensor, fx, nn

import fxq
from fxq.observing import Histogram
from fxq.quantizer import Quantizer, quantizers
from fxq.recipe import QSpec, Recipe, Rule

COLLECTED = {
    "max": ["max"],
    "moving-average": ["moving-average"],
    "entropy": ["percentile", "entropy", "mse", "auto"],
}
TORCH_AO = "torch.ao HistogramObserver"
MODELOPT = {"modelopt max": "max", "modelopt histogram": "histogram"}


@dataclass
class Variant:
    """One way to run the network over a batch, with the seconds that each batch took."""

    name: str
    run: Callable[[Tensor], object]
    seconds: list[float] = field(default_factory=list)

    def time(self, batch: Tensor) -> None:
        """Run one batch and note how long it took."""
        wait = torch.cuda.synchronize if batch.is_cuda else (lambda: None)
        wait()
        start = time.perf_counter()
        self.run(batch)
        wait()
        self.seconds.append(time.perf_counter() - start)


def prepared(model: nn.Module, example: Tensor, method: str) -> fx.GraphModule:
    """The network with observers for one method."""
    recipe = Recipe([Rule("*", QSpec(method=method))])
    gm = fxq.prepare(model, example, recipe=recipe)
    return gm.eval()


def plain(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph without quantizers."""
    gm = copy.deepcopy(gm)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Quantizer):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.recompile()
    return gm.eval()


def torch_ao(model: nn.Module, example: Tensor) -> nn.Module:
    """torch.ao's prepare_fx with its default (histogram) observers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        found: nn.Module = prepare_fx(copy.deepcopy(model).cpu(), get_default_qconfig_mapping("x86"), (example.cpu(),))
    return found.to(example.device)


def modelopt(model: nn.Module, how: str) -> nn.Module:
    """modelopt's quantized modules in its mode for collecting, by maxima or by histograms."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.model_calib import enable_stats_collection

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for rule in config["quant_cfg"]:
        if how == "histogram" and rule["quantizer_name"] == "*input_quantizer":
            rule["cfg"]["calibrator"] = "histogram"
    found: nn.Module = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(found, {**config, "algorithm": None})
    enable_stats_collection(found)
    return found


def peak_memory(count: int, args: argparse.Namespace) -> float:
    """Peak resident MB of a process that calibrates by entropy on `count` batches, made one by one."""
    command = [sys.executable, __file__, "--model", args.model, "--batch", str(args.batch), "--threads"]
    command += [str(args.threads), "--size", str(args.size), "--peak-of", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_own_peak(args: argparse.Namespace) -> None:
    """Calibrate on generated batches and print this process's peak resident MB."""
    shape = (args.batch, 3, args.size, args.size)
    gm = prepared(torchvision_models().get_model(args.model, weights=None).eval(), torch.randn(shape), "entropy")
    batches = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(args.peak_of))
    fxq.calibrate(gm, batches, progress=False, bias_correction=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def bytes_observed(gm: fx.GraphModule, batch: Tensor) -> int:
    """Bytes that the observers of activations read per batch."""
    observed = {f"quantizers.{name}" for name, q in quantizers(gm).items() if not q.weight}
    total = 0

    class Sizes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            nonlocal total
            result = super().run_node(n)
            if n.target in observed and isinstance(result, Tensor):
                total += result.numel() * result.element_size()
            return result

    with torch.inference_mode():
        Sizes(copy.deepcopy(gm)).run(batch)
    return total


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision classifier (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="times over all batches (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), help="(default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--torch-ao", action="store_true", help=f"run {TORCH_AO} as well")
    parser.add_argument("--modelopt", action="store_true", help="run NVIDIA's modelopt as well")
    parser.add_argument("--size", type=int, default=224, help="side of an image (default: %(default)s)")
    parser.add_argument(
        "--memory", type=int, nargs="+", help="only print the peak memory of calibrating on so many batches"
    )
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def counted(run: object) -> str:
    """The share of the elements that went into histograms."""
    if not isinstance(run, fx.GraphModule):
        return "-"
    found = [q.observer for q in quantizers(run).values() if isinstance(q.observer, Histogram)]
    for observer in found:
        observer.flush()
    seen = sum(int(observer.elements) for observer in found)
    return f"{sum(int(observer.counts.sum()) for observer in found) / seen:.1%}" if seen else "-"


def forward_table(variants: list[Variant]) -> str:
    """Each variant's median batch beside the first one's."""
    base = statistics.median(variants[0].seconds)
    lines = ["| collects | of a plain forward | ms per batch | counted |", "|---|---|---|---|"]
    for variant in variants:
        median = statistics.median(variant.seconds)
        lines.append(f"| {variant.name} | {median / base:.3f} | {median * 1e3:.1f} | {counted(variant.run)} |")
    return "\n".join(lines)


def solve_table(graphs: dict[str, fx.GraphModule], base: float) -> str:
    """The least of three solves of all tensors by each method, weights by their own values included."""
    lines = ["| solves, all tensors | of a plain forward | ms |", "|---|---|---|"]
    for collected, methods in COLLECTED.items():
        for method in methods:
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                fxq.solve(graphs[collected], method)
                seconds.append(time.perf_counter() - start)
            lines.append(f"| {method} | {min(seconds) / base:.3f} | {min(seconds) * 1e3:.0f} |")
    return "\n".join(lines)


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak_of is not None:
        print_own_peak(args)
        return
    if args.memory:
        print("| batches | peak resident MB |\n|---|---|")
        for count in args.memory:
            print(f"| {count} | {peak_memory(count, args):.0f} |")
        return
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = torchvision_models().get_model(args.model, weights=None).eval()
    model = model.to(args.device, memory_format=layout)
    images = synthetic(args.batch * args.batches, (3, args.size, args.size), seed=1)
    batches = [b.to(args.device).contiguous(memory_format=layout) for b in images.split(args.batch)]
    graphs = {method: prepared(model, batches[0], method) for method in COLLECTED}
    variants = [Variant("plain", plain(graphs["max"])), *(Variant(name, gm) for name, gm in graphs.items())]
    if args.torch_ao:
        variants.append(Variant(TORCH_AO, torch_ao(model, batches[0])))
    if args.modelopt:
        variants += [Variant(name, modelopt(model, how)) for name, how in MODELOPT.items()]
    with torch.inference_mode():
        for variant in variants:
            variant.run(batches[0])
            variant.run(batches[0])
        for _ in range(args.rounds):
            for batch in batches:
                for variant in variants:
                    variant.time(batch)

    base = statistics.median(variants[0].seconds)
    count = sum(not q.weight for q in quantizers(graphs["max"]).values())
    read = bytes_observed(graphs["max"], batches[0]) / 1e6
    print(f"{args.model}, batch {args.batch}, {args.device}, {args.threads} threads")
    print(f"{count} tensors, {read:.0f} MB a batch are observed\n")
    print(f"{forward_table(variants)}\n\n{solve_table(graphs, base)}\n")
    start = time.perf_counter()
    fxq.calibrate(graphs["entropy"], batches, progress=False, bias_correction=False)
    whole = time.perf_counter() - start
    print(
        f"fxq.calibrate by entropy, the whole call, without bias correction: {whole / (base * len(batches)):.3f} of "
        "the plain forwards"
    )


if __name__ == "__main__":
    main()
