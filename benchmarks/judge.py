"""The judge: one ONNX Runtime, one structural report and one engine builder for every quantizer's file."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import structure
import torch

if TYPE_CHECKING:
    from tasks import Task

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """How to judge.

    Attributes:
        threads: Threads of ONNX Runtime.
        tensorrt: Folder with `tensorrt` and its libraries, put first on both search paths of the builder's
            process; None takes the installed `tensorrt`.
        engine: Whether to build engines.
        engine_batch: Their fixed batch.
    """

    threads: int
    tensorrt: Path | None
    engine: bool = True
    engine_batch: int = 8


def session(path: Path, threads: int, simulate: bool = False) -> ort.InferenceSession:
    """A CPU session; `simulate` computes Q/DQ in float instead of choosing INT8 kernels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if simulate:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, images: np.ndarray, batch: int) -> np.ndarray:
    """The outputs for all images, (N, classes)."""
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[i : i + batch]})[0] for i in range(0, len(images), batch)]
    return np.concatenate(parts)


def sqnr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """Signal to quantization noise ratio over all outputs: 10 log10(sum ref^2 / sum (ref - got)^2), dB."""
    reference, got = reference.astype(np.float64), got.astype(np.float64)
    return float(10 * np.log10((reference**2).sum() / max(((reference - got) ** 2).sum(), 1e-30)))


def latency(plain: ort.InferenceSession, int8: ort.InferenceSession, image: np.ndarray, runs: int = 15) -> list[float]:
    """Median milliseconds of both sessions on one image, run in turn so that both see the same load."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(runs + 3):
        for timed, kept in zip((plain, int8), times, strict=True):
            start = time.perf_counter()
            timed.run(None, {timed.get_inputs()[0].name: image})
            if turn >= 3:  # the first runs allocate
                kept.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(kept) for kept in times]


def rule_findings(path: Path) -> dict[str, Any]:
    """What fxq's own rule check says of the file: the one figure here that the judged tool has a say in."""
    import fxq

    findings = fxq.lint(path)
    return {
        "ok": True,
        "errors": len(findings.errors),
        "warnings": len(findings.warnings),
        "advice": len(findings.advice),
        "findings": [f"{finding.rule} {finding.node}: {finding.message}" for finding in findings],
    }


class Judge:
    """Judges files of one task against the float network in PyTorch.

    Args:
        task: The task.
        base: Its folder, with `fp32.pt` and `fp32.onnx`.
        settings: How to judge.
    """

    def __init__(self, task: Task, base: Path, settings: Settings) -> None:
        self.task, self.base, self.settings = task, base, settings
        images, self.labels = task.evaluation()
        self.images = images.numpy()
        model = task.model(base)
        with torch.no_grad():
            self.reference = torch.cat([model(part) for part in images.split(task.batch)]).numpy()

    def judge(self, work: Path) -> dict[str, Any]:
        """Everything about the file that a quantizer left in `work`; a part that fails carries its error."""
        path, result = work / "int8.onnx", {}
        parts = {"structure": lambda: structure.report(path), "onnxruntime": lambda: self._onnxruntime(path)}
        if self.settings.engine:
            parts["engine"] = lambda: self._engine(path, work / "builder.log")
        if importlib.util.find_spec("fxq") is not None:
            parts["rules"] = lambda: rule_findings(path)
        if (work / "torch.npy").exists():
            parts["pytorch"] = lambda: self.compare(np.load(work / "torch.npy"))
        for name, part in parts.items():
            try:
                result[name] = part()
            except Exception as error:  # noqa: BLE001 - readers of a broken file raise what they like; the table shows it
                result[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        return result

    def compare(self, got: np.ndarray) -> dict[str, Any]:
        """SQNR against float, predictions that changed, and top-1 in percent where there are labels."""
        before, after = self.reference.argmax(1), got.argmax(1)
        result: dict[str, Any] = {
            "ok": bool(np.isfinite(got).all()),
            "sqnr_db": sqnr_db(self.reference, got),
            "sqnr_median_db": statistics.median(map(sqnr_db, self.reference, got)),
            "changed": int((before != after).sum()),
            "images": len(got),
        }
        if self.labels is not None:
            labels = self.labels.numpy()
            result["top1"] = 100 * float((after == labels).mean())
            result["top1_float"] = 100 * float((before == labels).mean())
        return result

    def _onnxruntime(self, path: Path) -> dict[str, Any]:
        threads, batch = self.settings.threads, self.task.batch
        int8 = session(path, threads)
        result = self.compare(run(int8, self.images, batch))
        simulated = run(session(path, threads, simulate=True), self.images, batch)
        result["simulated"] = self.compare(simulated)
        plain_ms, int8_ms = latency(session(self.base / "fp32.onnx", threads), int8, self.images[:1])
        result.update(float_ms=plain_ms, int8_ms=int8_ms, latency_ratio=int8_ms / plain_ms)
        return result

    def _engine(self, path: Path, log: Path) -> dict[str, Any]:
        return build_engine(path, log, self.settings.tensorrt, self.settings.engine_batch)


def build_engine(
    path: Path, log: Path, tensorrt: Path | None, batch: int, limit: float = 900, kernels: bool = False
) -> dict[str, Any]:
    """What engine.py says of `path` at a fixed batch; its failure is a result too.

    Args:
        path: The ONNX file.
        log: Where the builder's log goes.
        tensorrt: As in :class:`Settings`.
        batch: The engine's batch.
        limit: Seconds that it may take.
        kernels: Whether to list them.
    """
    command = [sys.executable, str(HERE / "engine.py"), str(path), "--log", str(log), "--batch", str(batch)]
    command += ["--kernels"] if kernels else []
    environment = dict(os.environ)
    if tensorrt is not None:
        for variable in ("LD_LIBRARY_PATH", "PYTHONPATH"):
            rest = [os.environ[variable]] if os.environ.get(variable) else []
            environment[variable] = os.pathsep.join([str(tensorrt), *rest])
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "errors": [f"over {limit:.0f} s"]}
    if done.returncode:
        return {"ok": False, "errors": [f"exit {done.returncode}: {(done.stderr or done.stdout)[-600:]}"]}
    return dict(json.loads(done.stdout))
