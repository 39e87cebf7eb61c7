"""What each calibration method costs in accuracy, by fxq and by modelopt, on the same images.

    FXQ_DATA=DIR FXQ_PEERS_PYTHON=DIR/bin/python python benchmarks/accuracy.py --write

The trained ResNet-20 on 2,000 CIFAR-10 test images and LeNet on the 10,000 of MNIST, calibrated on 32, 128 and 512
train images, several disjoint subsets of each size; the quantized networks run in PyTorch. Results stay in
accuracy.json beside this file, and --write puts the tables that they give into docs/calibration.md. A later run adds
what the file lacks; --again measures what is there once more; --check measures nothing, and says whether the page is
what the results give.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import images
import numpy as np
import runner
import torch
from accuracy_worker import TOOLS
from judge import HERE, Judge, Settings
from pages import written
from tasks import TASKS

Figures = Mapping[str, Sequence[float]]  # method -> changed predictions, SQNR in dB, top-1 in percent
Results = dict[str, dict[str, Any]]  # "task/tool/size/subset" -> {"methods": Figures, "notes": …}

RESULTS: Final = HERE / "accuracy.json"
PAGE: Final = HERE.parent / "docs" / "calibration.md"
BEGIN: Final = "<!-- accuracy: written by benchmarks/accuracy.py -->"
END: Final = "<!-- accuracy: end -->"
NAMES: Final = {"cifar_resnet20": "ResNet-20, CIFAR-10", "mnist_lenet": "LeNet, MNIST"}
SIZES: Final = (32, 128, 512)
SINGLE: Final = ("max", "percentile", "entropy", "mse", "moving-average")
SHARED: Final = ("max", "percentile", "entropy", "mse")
DEFAULT: Final = "the default: mse, biases corrected"
ADDS: Final = "fxq, additions float"
LESS: Final = "fxq, counting less"
ROWS: Final = (  # tool as shown, method as shown, tool, method as stored
    *(("fxq", method, "fxq", method) for method in (*SINGLE, "auto")),
    ("fxq", DEFAULT, "fxq", "default"),
    *((ADDS, method, "fxq", f"{method} adds") for method in (*SHARED, "auto")),
    (ADDS, DEFAULT, "fxq", "default adds"),
    *((LESS, method, "fxq", f"{method} less") for method in (*SHARED[1:], "auto")),
    *(("modelopt", method, "modelopt", method) for method in SHARED),
    ("modelopt", "max, its algorithm mse for the weights", "modelopt", "mse of weights"),
)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path(tempfile.gettempdir()) / "fxq-benchmarks"
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--tasks", default=",".join(NAMES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="calibration images (default: %(default)s)")
    parser.add_argument("--subsets", type=int, default=3, help="disjoint ones of each size (default: %(default)s)")
    parser.add_argument(
        "--peers-python",
        default=os.environ.get(runner.PEERS_PYTHON),
        help=f"the Python of the environment that setup_peers.sh made (default: {runner.PEERS_PYTHON})",
    )
    parser.add_argument("--data", help=f"the data folder (default: {images.DATA_VARIABLE})")
    parser.add_argument("--work", type=Path, default=work, help=f"networks and outputs (default: {work})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what the results hold already once more")
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--check", action="store_true", help="only compare the page with the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: %(default)s)")
    args = parser.parse_args()
    args.tools, args.tasks, sizes = (text.split(",") for text in (args.tools, args.tasks, args.sizes))
    args.sizes = [int(size) for size in sizes]
    if unknown := [*(set(args.tools) - TOOLS.keys()), *(set(args.tasks) - NAMES.keys())]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if args.data:
        os.environ[images.DATA_VARIABLE] = args.data
    if "modelopt" in args.tools and not args.check:
        if not args.peers_python:
            parser.error(f"modelopt: pass --peers-python (or set {runner.PEERS_PYTHON}), see setup_peers.sh")
        args.peers_python = str(Path(args.peers_python).absolute())  # not resolved: a venv's Python is a link
    return args


def measure(args: argparse.Namespace, tool: str, task: str, size: int, subset: int, judge: Judge) -> dict[str, Any]:
    """One tool's methods on one subset, in a process of its own."""
    work = args.work.resolve() / "accuracy" / task
    work.mkdir(parents=True, exist_ok=True)
    name = f"{size}-{subset}"
    for old in work.glob(f"{tool}-*{name}.*"):
        old.unlink()
    python = sys.executable if tool == "fxq" else args.peers_python
    command = [python, "-W", "ignore", str(HERE / "accuracy_worker.py"), "--tool", tool, "--task", task]
    command += ["--base", str(judge.base), "--work", str(work), "--size", str(size), "--subset", str(subset)]
    command += ["--threads", str(args.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    with (work / f"{tool}-{name}.txt").open("w") as log:
        subprocess.run(command, check=True, env=environment, cwd=work, stdout=log, stderr=subprocess.STDOUT)
    figures = {}
    for path in sorted(work.glob(f"{tool}-*-{name}.npy")):
        found = judge.compare(np.load(path))
        method = path.stem.removeprefix(f"{tool}-").removesuffix(f"-{name}")
        figures[method] = [found["changed"], round(found["sqnr_db"], 3), round(found["top1"], 3)]
    notes = json.loads((work / f"{tool}-{name}.json").read_text())
    first = {"images": len(judge.images), "top1_float": found["top1_float"]} if figures else {}
    return {"methods": figures, "notes": notes, **first}


def measure_all(args: argparse.Namespace) -> Results:
    """What the results lack, stored after each subset."""
    results: Results = json.loads(args.results.read_text()) if args.results.exists() else {}
    torch.set_num_threads(args.threads)
    for task in args.tasks:
        base = args.work.resolve() / task
        judge = Judge(TASKS[task], base, Settings(args.threads, None, engine=False))
        keys = [(tool, size, subset) for tool in args.tools for size in args.sizes for subset in range(args.subsets)]
        for tool, size, subset in keys:
            key = f"{task}/{tool}/{size}/{subset}"
            if key in results and not args.again:
                continue
            start = time.perf_counter()
            results[key] = measure(args, tool, task, size, subset, judge)
            store(args.results, results)
            print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
    return results


def store(path: Path, results: Results) -> None:
    """Write the results whole, a line for each subset."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
    part = path.with_suffix(".part")
    part.write_text(f"{{\n{lines}\n}}\n")
    part.replace(path)


def subsets(results: Results, task: str, tool: str, size: int) -> list[dict[str, Any]]:
    """The runs of one tool at one size, in the order of the subsets."""
    start = f"{task}/{tool}/{size}/"
    return [results[key] for key in sorted(results) if key.startswith(start)]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}"


def cell(runs: list[dict[str, Any]], method: str) -> str:
    """Changed predictions, SQNR and top-1 of one method over the subsets."""
    errors = [run["notes"]["errors"][method] for run in runs if method in run["notes"]["errors"]]
    found = [run["methods"][method] for run in runs if method in run["methods"]]
    if errors or not found:
        return f"failed: {errors[0][:60]}" if errors else "-"
    changed, sqnr, top1 = zip(*found, strict=True)
    return f"{spread(changed, '.1f')}, {spread(sqnr, '.2f')} dB, {statistics.fmean(top1):.2f}%"


def less(pairs: Mapping[int, tuple[list[Figures], list[Figures]]], method: str, than: str | None) -> list[str]:
    """How much more `method` changes and what SQNR it gains, on the same subsets: a cell for each size, and the noise.

    Args:
        pairs: For each size both tools' figures, subset by subset.
        method: The first tool's.
        than: The second tool's; None is the best single one, told for each figure and size by its mean.

    Returns:
        Mean differences, and last their standard deviation from subset to subset, pooled over the sizes.
    """
    cells: list[list[str]] = [[] for _ in pairs]
    noise = []
    for index, form, unit, best in ((0, "+.1f", "", min), (1, "+.2f", " dB", max)):
        variances = []
        for cell, (one, other) in zip(cells, pairs.values(), strict=True):
            rival = than or best(SINGLE, key=lambda m, f=other, i=index: statistics.fmean(x[m][i] for x in f))
            found = [a[method][index] - b[rival][index] for a, b in zip(one, other, strict=True)]
            cell.append(f"{statistics.fmean(found):{form}}{unit}{'' if than else f' ({rival})'}")
            variances.append(statistics.variance(found))
        noise.append(f"{statistics.fmean(variances) ** 0.5:{form[1:]}}{unit}")
    return [", ".join(parts) for parts in (*cells, noise)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(results: Results, task: str) -> str:
    """fxq less modelopt in one placement, method by method, and `auto` less the best of the single methods."""
    own, other = (
        {size: [run["methods"] for run in subsets(results, task, tool, size)] for size in SIZES}
        for tool in ("fxq", "modelopt")
    )
    suffix = " adds" if "max adds" in own[SIZES[0]][0] else ""
    both = {size: (own[size], other[size]) for size in SIZES}
    rows = [[f"{method}: fxq less modelopt", *less(both, f"{method}{suffix}", method)] for method in SHARED]
    rows.append(["fxq's auto less its best method", *less({n: (own[n], own[n]) for n in SIZES}, "auto", None)])
    return table(["changed, SQNR", *(f"{size} images" for size in SIZES), "noise"], rows)


def missing(results: Results, tasks: Iterable[str] = NAMES) -> list[str]:
    """The first subsets that the tables need and the results lack."""
    keys = (f"{task}/{tool}/{size}/0" for task in tasks for tool in TOOLS for size in SIZES)
    return [key for key in keys if key not in results]


def render(results: Results) -> str:
    """The tables of the page, of all tasks that the results hold."""
    parts = []
    for task in (task for task in NAMES if not missing(results, [task])):
        runs = {tool: {size: subsets(results, task, tool, size) for size in SIZES} for tool in TOOLS}
        rows = [
            [shown, label, *(cell(runs[tool][size], method) for size in SIZES)]
            for shown, label, tool, method in ROWS
            if all(method in run["methods"] or method in run["notes"]["errors"] for run in runs[tool][SIZES[0]])
        ]
        first = runs["fxq"][SIZES[0]][0]
        counted = [f"{first['notes']['counted']:.1%} of the values"]
        if "counted less" in first["notes"]:
            counted.append(f"{first['notes']['counted less']:.1%} where they count less")
        parts.append(
            f"{NAMES[task]}: {first['images']:,} test images, top-1 {first['top1_float']:.2f}% in float. "
            f"Histograms counted {', '.join(counted)}.\n\n"
            f"{table(['', 'method', *(f'{size} images' for size in SIZES)], rows)}\n\n{differences(results, task)}"
        )
    return "\n\n".join(parts)


def main() -> None:
    args = options()
    try:
        results = json.loads(args.results.read_text()) if args.check else measure_all(args)
    except images.MissingDataError as error:
        sys.exit(str(error))
    text, page = render(results), args.page.read_text()
    if not args.check:
        print(text)
    if (args.write or args.check) and (lacking := missing(results)):
        sys.exit(f"the results lack {', '.join(lacking)}")
    if args.check and page != written(page, text, BEGIN, END):
        sys.exit(f"{args.page} does not show {args.results}: run accuracy.py --write")
    if args.write:
        args.page.write_text(written(page, text, BEGIN, END))


if __name__ == "__main__":
    main()
