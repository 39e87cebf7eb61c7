"""ResNet-50 from the float network to the ONNX file: each stage as a multiple of a plain float forward.

    python benchmarks/walltime.py --repeat 3

The calibration data are 16 batches of 8 images of 224x224. The float forward runs over the same batches in
the same process, before the first stage and after each, and the median counts: both see the same load. One
more run under the profiler, whose overhead its seconds include, says where each stage's time goes.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import runner
from runner import Result, show

TASK = "resnet50"
SHOWN_ROOMS = 6


def ratios(result: Result) -> dict[str, float]:
    """Each stage over the float forward, and all of them together; imports are left out."""
    forward = result["forward_s"]
    found = {name: seconds / forward for name, seconds in result["stages_s"].items() if name != "import"}
    return {**found, "total": sum(found.values())}


def stage_table(runs: list[Result]) -> str:
    """Median, least and most of each stage over the runs."""
    lines = ["| stage | of a float forward | least to most | seconds |", "|---|---|---|---|"]
    for stage in ratios(runs[0]):
        values = [ratios(run)[stage] for run in runs]
        seconds = statistics.median(ratios(run)[stage] * run["forward_s"] for run in runs)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {stage} | {statistics.median(values):.2f} | {spread} | {seconds:.2f} |")
    forward = statistics.median(run["forward_s"] for run in runs)
    return "\n".join([*lines, f"| float forward | 1 | | {forward:.2f} |"])


def room_table(profiled: Result) -> str:
    """The rooms and libraries that take most of each stage, as shares of it."""
    lines = ["| stage | seconds, profiled | where |", "|---|---|---|"]
    for stage, rooms in profiled["rooms_s"].items():
        if stage != "import":
            whole = sum(rooms.values())
            top = [f"{name} {seconds / whole:.0%}" for name, seconds in list(rooms.items())[:SHOWN_ROOMS]]
            lines.append(f"| {stage} | {show(profiled['stages_s'][stage])} | {', '.join(top)} |")
    return "\n".join(lines)


def main() -> None:
    parser = runner.options(__doc__, "fxq", engine=False)
    parser.set_defaults(repeat=3)
    args = runner.parse(parser)
    if args.judge_only:
        parser.error("--judge-only: nothing is judged here")
    path = args.results or args.work / "walltime.json"
    base, failed = runner.prepare_task(TASK, args.work), False
    results: dict[str, dict[str, Any]] = {}
    for peer in args.peers:
        runs = [runner.run_worker(args, peer, TASK, base) for _ in range(max(1, args.repeat))]
        profiled = runner.run_worker(args, peer, TASK, base, profile=True)
        broken = [run for run in [*runs, profiled] if not run["ok"]]
        results[peer] = {"runs": runs, "profiled": profiled}
        runner.store(path, results)
        print(f"\n### {TASK}, {peer}, {args.threads} threads\n")
        if broken:
            failed = True
            print(f"failed: {broken[0]['error']}")
        else:
            print(f"{stage_table(runs)}\n\n{room_table(profiled)}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
