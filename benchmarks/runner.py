"""What the benchmark commands share: options, running quantizers in their environments, results, tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import images
import networks
import torch
from foreign import QUANTIZERS
from judge import HERE, Judge, Settings
from tasks import TASKS

PEERS_PYTHON = "FXQ_PEERS_PYTHON"
ENVIRONMENTS = {
    "peers": (PEERS_PYTHON, "setup_peers.sh"),
    "inc": ("FXQ_INC_PYTHON", "setup_inc.sh"),
    "brevitas": ("FXQ_BREVITAS_PYTHON", "setup_brevitas.sh"),
}
"""Environments of other tools: the variable that names their Python (and their option), and what makes them."""
TENSORRT_FOLDER = "FXQ_TENSORRT"
Result = dict[str, Any]
Results = dict[str, dict[str, Result]]  # task -> quantizer -> result


def options(description: str, peers: str, engine: bool) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `engine` adds those about the builder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", default=peers, help=f"comma-separated, of {', '.join(QUANTIZERS)} (default: {peers})"
    )
    for environment, (variable, script) in ENVIRONMENTS.items():
        parser.add_argument(
            f"--{environment}-python",
            default=os.environ.get(variable),
            help=f"the Python of the environment that {script} made (default: {variable})",
        )
    parser.add_argument("--data", help=f"the data folder (default: {images.DATA_VARIABLE})")
    work = Path(tempfile.gettempdir()) / "fxq-benchmarks"
    parser.add_argument("--work", type=Path, default=work, help=f"ONNX files and logs (default: {work})")
    parser.add_argument("--results", type=Path, help="JSON file; earlier results in it are kept and shown")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each quantizer; the fastest counts")
    parser.add_argument("--limit", type=int, default=1800, help="seconds a quantizer may take (default: %(default)s)")
    parser.add_argument("--judge-only", action="store_true", help="judge the files of an earlier run again")
    if engine:
        parser.add_argument(
            "--tensorrt",
            type=Path,
            default=os.environ.get(TENSORRT_FOLDER),
            help=f"folder with tensorrt and its libraries (default: {TENSORRT_FOLDER}, else the installed)",
        )
        parser.add_argument("--no-engine", action="store_true", help="build no engines")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, checked: everything that a long run would stumble over later ends here with what to do."""
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    unknown = [name for name in args.peers if name not in QUANTIZERS]
    if unknown or not args.peers:
        parser.error(f"--peers: unknown {', '.join(unknown) or 'nothing'}; there are {', '.join(QUANTIZERS)}")
    for environment in ENVIRONMENTS:
        foreign = [name for name in args.peers if QUANTIZERS[name].environment == environment]
        if foreign and not args.judge_only:
            _check_environment(parser, args, environment, foreign)
    if any(name.startswith("fxq") for name in args.peers) and importlib.util.find_spec("fxq") is None:
        parser.error("fxq is not importable: install it, or put the checkout on PYTHONPATH")
    if args.data:
        os.environ[images.DATA_VARIABLE] = args.data
    if not hasattr(args, "tensorrt"):
        args.tensorrt, args.no_engine = None, True
    if not args.no_engine:
        args.tensorrt = args.tensorrt and args.tensorrt.resolve()
        _check_tensorrt(parser, args.tensorrt)
    args.work, args.threads = args.work.resolve(), max(1, args.threads)
    torch.set_num_threads(args.threads)  # this process trains and judges
    return args


def _check_environment(
    parser: argparse.ArgumentParser, args: argparse.Namespace, environment: str, names: list[str]
) -> None:
    (variable, script), option = ENVIRONMENTS[environment], f"{environment}_python"
    if not getattr(args, option):
        parser.error(
            f"{', '.join(names)}: make their environment with `{script} DIR` and pass "
            f"--{environment}-python DIR/bin/python (or set {variable})"
        )
    python = str(Path(getattr(args, option)).absolute())  # not resolved: a venv's Python is a link
    if not os.access(python, os.X_OK):
        parser.error(f"--{environment}-python: {python} is no executable")
    setattr(args, option, python)


def _check_tensorrt(parser: argparse.ArgumentParser, folder: Path | None) -> None:
    if folder is None and importlib.util.find_spec("tensorrt") is None:
        parser.error(f"no tensorrt installed: pass --tensorrt DIR (or set {TENSORRT_FOLDER}), or --no-engine")
    if folder is not None and not (folder / "tensorrt").is_dir():
        parser.error(f"--tensorrt: no `tensorrt` package in {folder}")


def run_worker(args: argparse.Namespace, peer: str, task: str, base: Path, profile: bool = False) -> Result:
    """Run one quantizer in its own process and environment, in an emptied folder; its failure is a result."""
    work = base / peer
    work.mkdir(parents=True, exist_ok=True)
    for old in work.iterdir():
        if old.is_file():
            old.unlink()
    own = QUANTIZERS[peer].environment == "own"
    python = sys.executable if own else getattr(args, f"{QUANTIZERS[peer].environment}_python")
    command = [python, "-W", "ignore", str(HERE / "worker.py"), "--peer", peer, "--task", task]
    command += ["--base", str(base), "--work", str(work), "--threads", str(args.threads)]
    if profile:
        command.append("--profile")
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    log = work / "log.txt"
    failed = {"peer": peer, "task": task, "ok": False}
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command,
                check=False,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=None if own else work,  # some tools leave files where they run
                timeout=args.limit,
            ).returncode
        except subprocess.TimeoutExpired:
            return {**failed, "error": f"over {args.limit} s"}
    if code or not (work / "worker.json").exists():
        return {**failed, "error": f"exit {code}: {log.read_text()[-600:]}"}
    return dict(json.loads((work / "worker.json").read_text()))


def prepare_task(name: str, work: Path) -> Path:
    """The task's folder, with the float network as fp32.pt and fp32.onnx."""
    base, task = work / name, TASKS[name]
    model = task.model(base)
    if not (base / "fp32.onnx").exists():
        part = base / "fp32.part"
        networks.export_float(model, part, task.image_shape)
        part.replace(base / "fp32.onnx")
    return base


def run_all(args: argparse.Namespace, tasks: Iterable[str]) -> Results:
    """Run and judge every chosen quantizer on every task; results are stored after each."""
    path = args.results or args.work / "results.json"
    results: Results = json.loads(path.read_text()) if path.exists() else {}
    settings = Settings(args.threads, args.tensorrt, engine=not args.no_engine)
    for task in tasks:
        try:
            base = prepare_task(task, args.work)
            judge = Judge(TASKS[task], base, settings)
        except images.MissingDataError as error:
            sys.exit(f"{task}: {error}")
        for peer in args.peers:
            result = _run_one(args, peer, task, base, results)
            if result["ok"]:
                result.update(judge.judge(base / peer), load=os.getloadavg()[0], threads=args.threads)
            results.setdefault(task, {})[peer] = result
            store(path, results)
            note = "" if result["ok"] else f": {result['error'][:300]}"
            print(
                f"{time.strftime('%H:%M:%S')} {task} {peer} {'done' if result['ok'] else 'FAILED'}{note}",
                flush=True,
            )
    return results


def _run_one(args: argparse.Namespace, peer: str, task: str, base: Path, results: Results) -> Result:
    if args.judge_only:
        return results.get(task, {}).get(peer) or {"ok": False, "error": "no earlier run in the results"}
    runs = [run_worker(args, peer, task, base) for _ in range(max(1, args.repeat))]
    broken = [run for run in runs if not run["ok"]]
    if broken:
        return broken[0]
    best = min(runs, key=lambda run: run["total_s"])
    return {**best, "totals_s": [run["total_s"] for run in runs]}


def store(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1))
    part.replace(path)


Column = tuple[str, Callable[[Result], str]]


def table(rows: dict[str, Result], columns: list[Column]) -> str:
    """A markdown table of one task; a failed quantizer is a row that says why."""
    lines = ["| " + " | ".join(["quantizer", *(name for name, _ in columns)]) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for peer, result in rows.items():
        if result.get("ok"):
            cells = [cell(result) for _, cell in columns]
        else:
            error = " ".join(result.get("error", "?").split()).replace("|", "/")
            cells = [f"failed: {error[:160]}"] + [""] * (len(columns) - 1)
        lines.append("| " + " | ".join([peer, *cells]) + " |")
    return "\n".join(lines)


def show(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash for what was not measured."""
    return "-" if value is None else format(value, form)


def at(result: Result, *keys: str) -> Any:
    """A nested value, or None where any step of the way is missing."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def finish(results: Results, tasks: Iterable[str], args: argparse.Namespace, columns: list[Column]) -> None:
    """Print the tables of `tasks`; exit with 1 where a quantizer of this run failed."""
    for task in tasks:
        print(f"\n### {task}\n\n{table(results.get(task, {}), columns)}")
    failed = [f"{peer} on {task}" for task in tasks for peer in args.peers if not at(results, task, peer, "ok")]
    if failed:
        sys.exit(f"\nfailed: {', '.join(failed)}")
