"""ONNX Runtime on the CPU: latency of INT8 over float, with accuracy beside it, for fxq and two other tools.

    FXQ_DATA=DIR python benchmarks/onnxruntime_cpu.py

Every tool quantizes the same float network for ONNX Runtime's CPU provider, on the same calibration images. One ONNX
Runtime then runs all files once in every round, so that they see the same machine, and in an order drawn anew, for a
file is slower behind one that has filled the caches: the ratio is the median time of a file over the median time of the
float file. What each file became in ONNX Runtime, by operator, is printed with --operators.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import runner
from runner import Result, at, show
from tasks import TASKS

PEERS = "fp32,fxq_cpu,ort_cpu,ort_cpu_qoperator,inc_cpu,inc_cpu_qoperator"
CELLS = "resnet18,cifar_resnet18,cifar_resnet20,mnist_lenet"
FLOAT = "fp32"


@dataclass(frozen=True)
class Cell:
    """One measurement: all files of a task at one number of threads and one batch.

    Attributes:
        task: The task.
        threads: Threads of each session.
        batch: Images in one run.
        milliseconds: For each file, its median.
        rounds: Runs of each file, behind one that warms up.
    """

    task: str
    threads: int
    batch: int
    milliseconds: dict[str, float]
    rounds: int

    def ratio(self, peer: str) -> float | None:
        """A file's median over the float file's."""
        own = self.milliseconds.get(peer)
        return None if own is None else own / self.milliseconds[FLOAT]


def session(path: Path, threads: int, optimized: Path | None = None) -> ort.InferenceSession:
    """A CPU session as users make it; `optimized` keeps what ONNX Runtime made of the file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(files: dict[str, Path], images: np.ndarray, threads: int, seconds: float) -> tuple[dict[str, float], int]:
    """Median milliseconds of each file, run in turns for about `seconds`, at least 5 rounds and at most 1,000."""
    sessions = {name: session(path, threads) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    feeds = {name: {one.get_inputs()[0].name: images} for name, one in sessions.items()}
    for name, one in sessions.items():  # the first run allocates
        one.run(None, feeds[name])
    end, rounds = time.perf_counter() + seconds, 0
    order, draw = list(sessions), random.Random(0)
    while rounds < 5 or (rounds < 1000 and time.perf_counter() < end):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            sessions[name].run(None, feeds[name])
            times[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return {name: statistics.median(kept) for name, kept in times.items()}, rounds


def operators(path: Path, work: Path) -> dict[str, int]:
    """How often ONNX Runtime runs which operator for a file, most frequent first."""
    import onnx

    optimized = work / "optimized.onnx"
    session(path, 1, optimized)
    return dict(Counter(node.op_type for node in onnx.load(optimized).graph.node).most_common())


def table(task: str, rows: dict[str, Result], cells: list[Cell]) -> str:
    """One task's rows: accuracy, then a ratio for each cell; the float row has milliseconds."""
    names = [f"{cell.threads} thr, batch {cell.batch}" for cell in cells]
    lines = ["| " + " | ".join([task, "top-1", "SQNR dB", "changed", *names]) + " |", "|---" * (4 + len(names)) + "|"]
    for peer, result in rows.items():
        if not result.get("ok"):
            lines.append(
                f"| {peer} | failed: {' '.join(str(result.get('error')).split())[:160]} |" + " |" * (2 + len(names))
            )
            continue
        judged = [at(result, "onnxruntime", key) for key in ("top1", "sqnr_db", "changed")]
        accuracy = [show(judged[0]), "" if peer == FLOAT else show(judged[1]), "" if peer == FLOAT else str(judged[2])]
        times = [f"{cell.milliseconds[FLOAT]:.3g} ms" if peer == FLOAT else show(cell.ratio(peer)) for cell in cells]
        lines.append("| " + " | ".join([peer, *accuracy, *times]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = runner.options(__doc__, PEERS, engine=False)
    parser.add_argument("--tasks", default=CELLS, help="(default: %(default)s)")
    parser.add_argument("--cells", default="1x1,1x128,4x1,4x128", help="threads x batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="for each cell (default: %(default)s)")
    parser.add_argument("--operators", action="store_true", help="also print what ONNX Runtime runs")
    args = runner.parse(parser)
    tasks = args.tasks.split(",")
    if FLOAT not in args.peers:
        parser.error(f"--peers: ratios need {FLOAT}")
    results = runner.run_all(args, tasks)
    measured: list[Cell] = []
    for task in tasks:
        rows = {peer: results[task][peer] for peer in args.peers}
        files = {peer: args.work / task / peer / "int8.onnx" for peer, result in rows.items() if result.get("ok")}
        shown = TASKS[task].evaluation()[0].numpy()
        for threads, batch in (map(int, cell.split("x")) for cell in args.cells.split(",")):
            images = np.ascontiguousarray(np.resize(shown, (batch, *shown.shape[1:])))
            cell = Cell(task, threads, batch, *measure(files, images, threads, args.seconds))
            measured.append(cell)
        print(f"\n{table(task, rows, [cell for cell in measured if cell.task == task])}", flush=True)
        if args.operators:
            with tempfile.TemporaryDirectory() as folder:
                for peer, path in files.items():
                    print(f"{peer}: {json.dumps(operators(path, Path(folder)))}")
        stored: dict[str, Any] = {"cells": [asdict(cell) for cell in measured]}
        runner.store(args.work / "onnxruntime_cpu.json", stored)
    runner.finish({}, [], args, [])


if __name__ == "__main__":
    main()
