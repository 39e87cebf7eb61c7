"""``fxq run``: an ONNX file in ONNX Runtime on the CPU."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import OnnxFile

__all__ = ["run"]


def run(
    path: OnnxFile,
    inputs: Annotated[
        Path | None, typer.Option(help="A .npz file with each input by name, or a .npy file for one.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of random inputs, where it is dynamic.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs, after a tenth as many to warm up.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads inside one operation.")] = None,
) -> None:
    """Run an ONNX file in ONNX Runtime on the CPU, on given or random inputs, and time it.

    Example: fxq run net.onnx --batch 8 --repeat 100
    """
    import torch

    from .backends.onnxrt import Session
    from .entry_points import read_tensors

    session = Session(path, threads=threads)
    if inputs is None:
        torch.manual_seed(0)
        feeds = session.random_inputs(batch)
    else:
        feeds = read_tensors(inputs)
        feeds = {session.input_names[0]: feeds[""]} if set(feeds) == {""} else feeds
    results = session.run(feeds)
    for _ in range(repeat // 10):
        session.run(feeds)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        session.run(feeds)
        times.append(1000 * (time.perf_counter() - start))
    for name, tensor in results.items():
        typer.echo(f"{name}: {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}")
    times.sort()
    tail = times[min(len(times) - 1, int(0.95 * len(times)))]
    typer.echo(f"latency: median {statistics.median(times):.2f} ms, 95% {tail:.2f} ms, {repeat} runs")
    if output is not None:
        _save(output, results)


def _save(path: Path, results: dict[str, Any]) -> None:
    from io import BytesIO

    import numpy as np

    from .backends.files import write_whole

    data = BytesIO()
    np.savez(data, **{name: tensor.numpy() for name, tensor in results.items()})
    write_whole(path, data.getvalue())
    typer.echo(f"wrote {path}")
