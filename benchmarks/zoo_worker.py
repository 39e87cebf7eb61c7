"""One network of the zoo, step by step, in a process of its own; zoo.py starts it.

    python zoo_worker.py --model resnet18 --work DIR --threads 2

Each step writes what it found to DIR/MODEL.json, so that a step that takes the process down is known.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import judge
import networks
import onnx
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from zoo_models import LARGE, ZooModel, zoo

import fxq
from fxq.backends.onnxrt import Session


class StopError(Exception):
    """A step failed; the later ones have nothing to work on."""


class Row:
    """What is known of one network, kept in a file from step to step."""

    def __init__(self, path: Path, model: ZooModel) -> None:
        self.path = path
        self.facts: dict[str, Any] = {"model": model.name, "family": model.family, "steps": {}, "seconds": {}}

    def store(self) -> None:
        """Write the file whole."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.facts, indent=1))
        part.replace(self.path)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the body; an error is the step's result, and stops."""
        self.facts["steps"][name] = "died here"
        self.store()
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.facts["steps"][name] = f"{type(error).__name__}: {error}"[:1500]
            raise StopError from error
        else:
            self.facts["steps"][name] = "ok"
        finally:
            self.facts["seconds"][name] = round(time.perf_counter() - start, 2)
            self.facts["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            self.store()


def code_mark() -> str:
    """Eight digits that are the same for rows which the same source of fxq made."""
    package = Path(fxq.__file__).parent
    folders = (package, package / "passes", package / "backends")  # the latter may be links, which glob passes by
    rooms = {path for folder in folders for kind in ("*.py", "*.yaml") for path in folder.rglob(kind)}
    digest = hashlib.sha256()
    for room in sorted(rooms):
        digest.update(str(room.relative_to(package)).encode() + b"\0" + room.read_bytes())
    return digest.hexdigest()[:8]


def flat(result: Any) -> list[Tensor]:
    """The floating-point tensors of a nested result, in order."""
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def sqnr_db(reference: list[Tensor], got: list[Tensor]) -> float:
    """Over all outputs together, each scaled by the reference's own power, so that none drowns another."""
    signal = noise = 0.0
    for ref, out in zip(reference, got, strict=True):
        power = float(ref.double().square().sum()) or 1.0
        signal += 1.0
        noise += float((ref - out).double().square().sum()) / power
    return 10 * math.log10(signal / noise) if noise else math.inf


def _run(model: Any, batches: tuple[Tensor, ...]) -> list[Tensor]:
    """The flat outputs over all batches, joined along the batch."""
    with torch.inference_mode():
        parts = [flat(model(batch)) for batch in batches]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def build(model: ZooModel, row: Row) -> tuple[nn.Module, bool]:
    """The seeded network, and whether it counts as large."""
    torch.manual_seed(0)
    skeleton = model.skeleton()
    parameters = sum(p.numel() for p in skeleton.parameters())
    large = parameters > LARGE
    calibration, judged, batch = model.batches(large)
    row.facts["settings"] = {
        "shape": list(model.shape),
        "calibration": calibration,
        "judged": judged,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
    }
    warm_up = model.inputs(8 if large else 24, seed=4).split(4 if large else 8)
    return networks.seeded(lambda: skeleton, list(warm_up)), large


def quantize(net: nn.Module, model: ZooModel, row: Row, large: bool) -> fx.GraphModule:
    """Trace, place, calibrate and convert."""
    calibration, _, batch = model.batches(large)
    data = model.inputs(calibration, seed=1)
    with row.step("trace and place"):
        prepared = fxq.prepare(net, data[:2])
    with row.step("calibrate"):
        fxq.calibrate(prepared, data.split(batch), progress=False)
    with row.step("convert"):
        quantized = fxq.convert(prepared)
    report = fxq.report(quantized)
    totals = report.totals
    row.facts["placement"] = {
        "weighted": totals.weighted,
        "weighted_int8": totals.weighted_quantized,
        "residuals": totals.residuals,
        "skips_int8": totals.skips_quantized,
        "identity_skips_int8": totals.identity_skips_quantized,
        "float": [f"{r.module_path} {r.kind}" for r in report.weighted if r.precision == "float"],
        "notes": sorted({f"{n.rule}: {n.text}" for n in fxq.graph.state(quantized).notes if n.kind != "advice"})[:40],
    }
    return quantized


def check(path: Path, row: Row) -> None:
    """The ONNX checker, and fxq's rules."""
    with row.step("checker"):
        onnx.checker.check_model(str(path), full_check=True)
    with row.step("lint"):
        row.facts["rules"] = judge.rule_findings(path)


def run(model: ZooModel, row: Row, threads: int, tensorrt: Path | None, limit: float) -> None:
    """All steps of one network."""
    with row.step("build"):
        net, large = build(model, row)
    _, judged, batch = model.batches(large)
    inputs = model.inputs(judged, seed=2).split(batch)
    reference = _run(net, inputs)
    generator = torch.Generator().manual_seed(5)
    noisy = tuple(x + 0.01 * x.std() * torch.randn(x.shape, generator=generator) for x in inputs)
    row.facts["sqnr_noisy_input_db"] = sqnr_db(reference, _run(net, noisy))
    quantized = quantize(net, model, row, large)
    del net
    with row.step("PyTorch"):
        row.facts["sqnr_pytorch_db"] = sqnr_db(reference, _run(quantized, inputs))
    path = row.path.with_suffix(".onnx")
    with row.step("export"):
        fxq.export(quantized, path)
    del quantized
    check(path, row)
    with row.step("ONNX Runtime"):
        session = Session(path, threads=threads)
        row.facts["sqnr_onnxruntime_db"] = sqnr_db(reference, _run(session.run, inputs))
        del session
    with row.step("engine"):
        found = judge.build_engine(path, row.path.with_suffix(".log"), tensorrt, batch=2, limit=limit)
        row.facts["engine"] = found
        if not found["ok"]:
            raise RuntimeError(" ".join(str(found["errors"][-1]).split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--threads", required=True, type=int)
    parser.add_argument("--memory", required=True, type=float, help="GiB of data that the process may hold")
    parser.add_argument("--limit", required=True, type=float, help="seconds that the engine's builder may take")
    parser.add_argument("--tensorrt", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = int(args.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    (model,) = [m for m in zoo() if m.name == args.model]
    row = Row(args.work / f"{model.name}.json", model)
    row.facts["fxq"], row.facts["code"] = fxq.__version__, code_mark()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(model, row, args.threads, args.tensorrt, args.limit)
        except StopError:
            pass
        finally:
            row.path.with_suffix(".onnx").unlink(missing_ok=True)
            row.facts["done"] = True
            row.store()


if __name__ == "__main__":
    main()
