"""Every torchvision network of four families through fxq: traced, quantized, exported, run, checked, built.

    python benchmarks/zoo.py --work DIR --tensorrt DIR --table docs/zoo.md

Each network runs in a process of its own, with a limit on time and on memory, and leaves DIR/zoo/MODEL.json; a
later run takes up where this one stopped. `--again` runs what failed, `--only a,b` runs these whatever there is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo_models import ZooModel, zoo
from zoo_table import page

HERE = Path(__file__).resolve().parent


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path(tempfile.gettempdir()) / "fxq-benchmarks"
    parser.add_argument("--work", type=Path, default=work, help=f"where results are kept (default: {work})")
    parser.add_argument("--tensorrt", type=Path, default=os.environ.get("FXQ_TENSORRT"))
    parser.add_argument("--only", default="", help="comma-separated names; run again whatever there is")
    parser.add_argument("--again", action="store_true", help="also run what failed before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds per network (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=16, help="GiB per network (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0, help="start no network after so long (default: no end)")
    parser.add_argument("--table", type=Path, help="write the page here")
    parser.add_argument("--table-only", action="store_true", help="run nothing, write the page of what was run")
    return parser


def load(path: Path) -> dict[str, Any] | None:
    """A network's row, None where there is none."""
    return dict(json.loads(path.read_text())) if path.exists() else None


def passed(row: dict[str, Any] | None) -> bool:
    """Whether a network went the whole way."""
    return row is not None and bool(row.get("done")) and all(s == "ok" for s in row["steps"].values())


def run(model: ZooModel, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One network in its own process; whatever ends that is in the row."""
    path = folder / f"{model.name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", str(HERE / "zoo_worker.py"), "--model", model.name]
    command += ["--work", str(folder), "--threads", str(args.threads), "--memory", str(args.memory)]
    command += ["--limit", str(args.limit)]
    if args.tensorrt is not None:
        command += ["--tensorrt", str(Path(args.tensorrt).resolve())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    log = folder / f"{model.name}.txt"
    why = ""
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command, check=False, stdout=stream, stderr=subprocess.STDOUT, env=environment, timeout=args.limit
            ).returncode
            why = f"exit {code}: {log.read_text()[-300:]}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"over {args.limit:.0f} s"
    row = load(path) or {"model": model.name, "family": model.family, "steps": {"start": "died here"}, "seconds": {}}
    if why:
        row["steps"] = {name: why if said == "died here" else said for name, said in row["steps"].items()}
        row["done"] = True
        path.write_text(json.dumps(row, indent=1))
    return row


def chosen(models: Iterable[ZooModel], folder: Path, args: argparse.Namespace) -> list[ZooModel]:
    """What this call is to run."""
    only = [name for name in args.only.split(",") if name]
    models = list(models)
    unknown = set(only) - {m.name for m in models}
    if unknown:
        sys.exit(f"--only: no network is called {', '.join(sorted(unknown))}")
    if only:
        return [m for m in models if m.name in only]
    rows = {m.name: load(folder / f"{m.name}.json") for m in models}
    return [m for m in models if rows[m.name] is None or (args.again and not passed(rows[m.name]))]


def main() -> None:
    args = options().parse_args()
    folder = args.work / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    models, start = list(zoo()), time.monotonic()
    waiting = [] if args.table_only else chosen(models, folder, args)
    for model in sorted(waiting, key=lambda m: m.parameters):  # the smallest first
        if args.seconds and time.monotonic() - start > args.seconds:
            break
        row = run(model, folder, args)
        said = "ok" if passed(row) else next((f"{k}: {v}" for k, v in row["steps"].items() if v != "ok"), "?")
        print(f"{time.strftime('%H:%M:%S')} {model.name} {' '.join(said.split())[:300]}", flush=True)
    rows = [row for m in models if (row := load(folder / f"{m.name}.json")) is not None]
    if args.table is not None:
        done = [row for row in rows if row.get("done")]
        missing = [m.name for m in models if m.name not in {row["model"] for row in done}]
        args.table.write_text(page(done, missing))
    failed = [row["model"] for row in rows if not passed(row)]
    print(f"{len(rows) - len(failed)} of {len(models)} went the whole way" + (f"; failed: {failed}" if failed else ""))


if __name__ == "__main__":
    main()
