"""One quantizer on one task, in a process and an environment of its own; compare.py and its like start it."""

from __future__ import annotations

import argparse
import json
import resource
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from context import Context
from foreign import QUANTIZERS
from tasks import TASKS
from torch import Tensor, nn


def outputs(model: nn.Module, images: Tensor, batch: int) -> np.ndarray:
    """The network's outputs for all images, (N, classes) float32."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(batch)]).numpy()


def peak_mib() -> float:
    """The peak of this process's resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(peer: str, task_name: str, base: Path, work: Path, profile: bool) -> dict[str, Any]:
    """Quantize, and say how it went: never raises for a quantizer's failure, which is a result too."""
    torch.manual_seed(0)
    task = TASKS[task_name]
    ctx = Context(task, base, work, profile)
    before, forwards = peak_mib(), len(ctx.forwards)
    result: dict[str, Any] = {"peer": peer, "task": task_name, "ok": False, "torch": torch.__version__}
    start, quantized = time.perf_counter(), None
    try:
        quantized = QUANTIZERS[peer].run(ctx)
        result["ok"] = ctx.out.is_file()
        if not result["ok"]:
            result["error"] = f"{peer} left no {ctx.out.name}"
    except Exception as error:  # noqa: BLE001 - tools raise what they like, also bare Exception; the table shows it
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"[:600]
    total = time.perf_counter() - start - sum(ctx.forwards[forwards:])
    result.update(total_s=total, peak_mib=peak_mib(), peak_before_mib=before, stages_s=ctx.stages, rooms_s=ctx.rooms)
    if quantized is not None and result["ok"]:
        np.save(work / "torch.npy", outputs(quantized, task.evaluation()[0], task.batch))
    ctx.time_forward()
    result.update(forwards_s=ctx.forwards, forward_s=ctx.forward_seconds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, choices=sorted(QUANTIZERS))
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args.peer, args.task, args.base, args.work, args.profile)
    (args.work / "worker.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
