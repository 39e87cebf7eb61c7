"""What the linter finds in the files of other tools, all of one ResNet-18, and whether it is true.

    python lint_peers.py --peers-python … --inc-python … --brevitas-python … --tensorrt …

Two tables of markdown: the findings of each file by rule, with what mending it brings; and three findings of each file
that has any, checked: the file is built as it is (where TensorRT refuses it, with that mended) and once more with the
rule's findings mended, and the kernel is looked up in the builder's log both times. The command exits with 1 where a
claim does not hold.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import judge
import numpy as np
import onnx
import runner
from onnx import helper, numpy_helper
from tasks import TASKS

import fxq

TASK = "resnet18"
PEERS = "modelopt_torch_max,modelopt_onnx_entropy,ort_symmetric,torchao,brevitas,inc_trt"
BATCH = 8
Facts = dict[str, Any]
Edit = Callable[[Path, Path, "Bench"], None]


@dataclass(frozen=True)
class Check:
    """A finding that is checked.

    Attributes:
        peer: Whose file.
        rule: The rule.
        node: The finding's node, or the start of its name.
        claim: What the finding says will be seen in the engine.
        fact: The figure that shows it.
        wanted: Its values before and after.
        kernel: The ONNX node whose kernel is looked up; None for the finding's.
        edit: How to mend it; None for fxq.fix.
        before: Rules whose findings are mended first, so that the file builds at all.
        also: Rules that are mended together with it.
    """

    peer: str
    rule: str
    node: str
    claim: str
    fact: str
    wanted: tuple[Any, Any]
    kernel: str | None = None
    edit: Edit | None = None
    before: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


class Bench:
    """Builds files, keeps what is known of them, and judges their numbers.

    Args:
        settings: How to judge.
        base: The task's folder.
    """

    def __init__(self, settings: judge.Settings, base: Path) -> None:
        self.settings, self.base = settings, base
        self.judge = judge.Judge(TASKS[TASK], base, settings)
        self._built: dict[Path, Facts] = {}

    def built(self, path: Path) -> Facts:
        """What engine.py says of a file, its kernels listed."""
        if path not in self._built:
            log = path.with_suffix(".log")
            self._built[path] = judge.build_engine(path, log, self.settings.tensorrt, BATCH, kernels=True)
        return self._built[path]

    def sqnr(self, path: Path) -> float:
        """Of the file in ONNX Runtime with Q and DQ as they stand, against the float network, dB."""
        session = judge.session(path, self.settings.threads, simulate=True)
        return judge.sqnr_db(self.judge.reference, judge.run(session, self.judge.images, BATCH))

    def largest(self, path: Path, tensor: str) -> float:
        """The largest magnitude of a tensor over the calibration images."""
        model = onnx.load(path)
        model.graph.output.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
        held = path.with_suffix(".tapped.onnx")
        onnx.save(model, held)
        session = judge.session(held, self.settings.threads, simulate=True)
        name, images = session.get_inputs()[0].name, TASKS[TASK].calibration().numpy()
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        return max(float(np.abs(session.run([tensor], {name: part})[0]).max()) for part in parts)


def quantize_skip(tensor: str) -> Edit:
    """Put Q/DQ on a tensor in front of the addition that reads it, with its largest magnitude over 127 as scale."""

    def edit(path: Path, target: Path, bench: Bench) -> None:
        scale = np.float32(bench.largest(path, tensor) / 127)
        model = onnx.load(path)
        names = ["skip_scale", "skip_zero"]
        model.graph.initializer.extend(
            [numpy_helper.from_array(scale, names[0]), numpy_helper.from_array(np.int8(0), names[1])]
        )
        index, add = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "Add" and tensor in n.input)
        add.input[list(add.input).index(tensor)] = "skip_dq"
        pair = (("QuantizeLinear", tensor, "skip_q"), ("DequantizeLinear", "skip_q", "skip_dq"))
        for place, (op, read, made) in enumerate(pair):
            model.graph.node.insert(index + place, helper.make_node(op, [read, *names], [made], name=made))
        onnx.save(model, target)

    return edit


def scale_each_channel(path: Path, target: Path, bench: Bench) -> None:
    """Give every weight behind Q/DQ a scale for each output channel: its largest magnitude over 127."""
    del bench
    model = onnx.load(path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs: dict[str, list[onnx.NodeProto]] = {}
    made: dict[str, str] = {}
    for node in model.graph.node:
        weight = node.input[0] if node.op_type == "QuantizeLinear" else made.get(node.input[0] if node.input else "")
        if weight in stored and node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            pairs.setdefault(weight, []).append(node)
            made[node.output[0]] = weight
    products = {n.input[1]: n.op_type for n in model.graph.node if n.op_type in {"Conv", "MatMul", "Gemm"}}
    for weight, (quantize, dequantize) in pairs.items():
        axis = 1 if products[dequantize.output[0]] == "MatMul" else 0
        others = tuple(i for i in range(stored[weight].ndim) if i != axis)
        scale = (np.abs(stored[weight]).max(axis=others) / 127).astype(np.float32)
        parameters = {f"{weight}_scales": scale, f"{weight}_zeros": np.zeros(scale.shape, np.int8)}
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in parameters.items())
        for node in (quantize, dequantize):
            node.input[1:] = list(parameters)
            node.attribute.append(helper.make_attribute("axis", axis))
    onnx.save(model, target)


def _kernel(facts: Facts, node: str) -> Facts:
    """The last kernel that an ONNX node is part of: the one that ends its work."""
    return [kernel for kernel in facts["list"] if node in kernel["nodes"]][-1]


def fact(bench: Bench, path: Path, check: Check, node: str) -> Any:
    """The figure that a check is about, of one file."""
    facts = bench.built(path)
    if check.fact == "builds":
        return facts["ok"]
    if check.fact == "SQNR":
        return round(bench.sqnr(path), 2)
    if not facts["ok"]:
        return f"not built: {facts['errors']}"
    if check.fact == "kernels and bytes":
        return f"{facts['kernels']}, {facts['activation_bytes_total'] / 1e6:.1f} MB"
    kernel = _kernel(facts, check.kernel or node)
    if check.fact == "reads":
        return ", ".join(sorted(kernel["inputs"]))
    if check.fact == "roundings":
        return kernel["name"].count("Roun")
    if check.fact == "fused into":
        return next(kernel_node for kernel_node in kernel["nodes"] if kernel["name"].startswith(kernel_node))
    raise ValueError(check.fact)


ADDED = "the addition's kernel reads the skip in float"
ROUNDED = "the convolution's sum is rounded before the addition"
OUTPUT = "the output is rounded for nothing"
MERGED = "advice: a builder may merge equal quantizers by itself"
SAME = ("same", "same")
DOWNSAMPLED = "/layer2/layer2.0"
SKIPS = ("Float, Float", "Float, Int8")

CHECKS = (
    Check("modelopt_torch_max", "R23", "/layer1/layer1.0/Add", ADDED, "reads", SKIPS),
    Check("modelopt_torch_max", "R23", "/layer2/layer2.1/Add", ADDED, "reads", SKIPS),
    Check("modelopt_torch_max", "R29", "/layer2/", MERGED, "kernels and bytes", SAME),
    Check("ort_symmetric", "R17", "fc.bias", "TensorRT refuses the file", "builds", (False, True)),
    Check(
        "ort_symmetric",
        "R21",
        "/conv1/",
        "the pair in front of Relu rounds once more",
        "roundings",
        (2, 1),
        kernel="/relu/Relu",
        before=("R17",),
        also=("R31",),
    ),
    Check(
        "ort_symmetric",
        "R23",
        "/layer1/layer1.0/Add",
        ROUNDED,
        "roundings",
        (2, 1),
        before=("R17", "R21", "R31", "R38"),
    ),
    Check("torchao", "R23", "node_add_105", ROUNDED, "roundings", (2, 1)),
    Check("torchao", "R23", "node_add_282", ROUNDED, "roundings", (3, 2)),
    Check("torchao", "R31", "node_dequantize_per_tensor_40", OUTPUT, "roundings", (1, 0), kernel="node_linear"),
    Check("brevitas", "R14", "", "TensorRT refuses the file", "builds", (False, True)),
    Check("brevitas", "R23", "/Add_1", ROUNDED, "roundings", (2, 1), before=("R14",)),
    Check("brevitas", "R31", "/fc_output", OUTPUT, "roundings", (1, 0), kernel="/fc/Gemm", before=("R14",)),
    Check(
        "inc_trt",
        "R23",
        f"{DOWNSAMPLED}/Add",
        "the addition is not fused into the block's last convolution",
        "fused into",
        (f"{DOWNSAMPLED}/downsample/downsample.0/Conv_quant", f"{DOWNSAMPLED}/conv2/Conv_quant"),
        edit=quantize_skip(f"{DOWNSAMPLED}/downsample/downsample.0/Conv_output_0"),
    ),
    Check("inc_trt", "R29", "/layer1/", MERGED, "kernels and bytes", SAME),
    Check(
        "inc_trt",
        "R32",
        "/conv1/",
        "a scale for each channel loses less",
        "SQNR",
        ("less", "more"),
        edit=scale_each_channel,
    ),
)


def mend(check: Check, path: Path, bench: Bench) -> tuple[Path, Path, str]:
    """The files before and after, and the finding's node."""
    stem = f"check{CHECKS.index(check)}"
    before, after = (path.with_name(f"{stem}-{when}.onnx") for when in ("before", "after"))
    shutil.copy(path, before)
    if check.before:
        fxq.fix(path, before, rules=check.before)
    nodes = [f.node for f in fxq.lint(before).of(check.rule) if (f.node or "").startswith(check.node)]
    if not nodes:
        raise LookupError(f"{check.peer}: the linter has no {check.rule} at {check.node}")
    if check.edit is not None:
        check.edit(before, after, bench)
    else:
        fxq.fix(before, after, rounding=True, rules={check.rule, *check.also})
    left = [f.node for f in fxq.lint(after).of(check.rule)]
    if nodes[0] in left:
        raise LookupError(f"{check.peer}: mending left {check.rule} at {nodes[0]}")
    return before, after, str(nodes[0])


def findings_row(bench: Bench, peer: str, path: Path) -> str:
    """What is found, and what mending it brings: findings left, activation bytes, SQNR."""
    found = fxq.lint(path)
    counts = Counter((finding.rule, finding.severity) for finding in found)
    said = ", ".join(f"{rule} {count} {severity}" for (rule, severity), count in sorted(counts.items())) or "none"
    cells = [_brought(bench, path)]
    for option in (False, True):
        target = path.with_name("rounding.onnx" if option else "exact.onnx")
        fixed = fxq.fix(path, target, rounding=option)
        cells.append(f"{len(fixed.changes)} changes, {len(fixed.left)} left; {_brought(bench, target)}")
    return f"| {peer} | {said} | " + " | ".join(cells) + " |"


def _brought(bench: Bench, path: Path) -> str:
    facts = bench.built(path)
    built = f"{facts['activation_bytes_total'] / 1e6:.0f} MB" if facts["ok"] else "refused"
    return f"{built}, {bench.sqnr(path):.1f} dB"


def check_row(bench: Bench, check: Check, path: Path) -> tuple[str, bool]:
    """A row of the second table, and whether the claim holds."""
    before, after, node = mend(check, path, bench)
    seen = tuple(fact(bench, file, check, node) for file in (before, after))
    holds = _holds(check.wanted, seen)
    verdict = "yes" if holds else f"NO, wanted {check.wanted[0]} and {check.wanted[1]}"
    row = (check.peer, f"{check.rule} {node}", check.claim, check.fact, seen[0], seen[1], verdict)
    return "| " + " | ".join(str(cell) for cell in row) + " |", holds


def _holds(wanted: tuple[Any, Any], seen: tuple[Any, ...]) -> bool:
    if wanted == SAME:
        return bool(seen[0] == seen[1])
    return bool(seen[0] < seen[1]) if wanted == ("less", "more") else seen == wanted


def main() -> None:
    args = runner.parse(runner.options(__doc__, PEERS, engine=True))
    base = runner.prepare_task(TASK, args.work)
    bench = Bench(judge.Settings(args.threads, args.tensorrt), base)
    for peer in args.peers:
        result = {"ok": True} if args.judge_only else runner.run_worker(args, peer, TASK, base)
        if not result["ok"]:
            sys.exit(f"{peer}: {result['error']}")
    print("| file | findings | as it is | `--fix` | `--fix-rounding` |\n|---|---|---|---|---|")
    for peer in args.peers:
        print(findings_row(bench, peer, base / peer / "int8.onnx"), flush=True)
    print("\n| file | finding | what it says | looked at | before | after | true |\n|---|---|---|---|---|---|---|")
    results = [check_row(bench, c, base / c.peer / "int8.onnx") for c in CHECKS if c.peer in args.peers]
    print("\n".join(row for row, _ in results))
    if not all(holds for _, holds in results):
        sys.exit("a finding does not hold")


if __name__ == "__main__":
    main()
