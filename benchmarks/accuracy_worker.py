"""Every calibration method of one tool on one task, in that tool's environment; accuracy.py starts it.

Each calibrated network's outputs for the judging images go to `<method>-<images>-<subset>.npy` in the work folder,
and what there is to say about them to `<tool>-<images>-<subset>.json`. Heavy imports stay inside the functions,
because the tools do not live in one environment.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import numpy as np
import torch
from tasks import TASKS, CifarTask, MnistTask
from torch import Tensor, nn

if TYPE_CHECKING:
    import fxq

SPACING = 512  # images between the beginnings of two subsets, which makes them disjoint up to that size
LESS = 816  # elements counted of a sample: of ResNet-20's tensors as large a part as by default of ResNet-50's

Solved = Iterator[tuple[str, Callable[[], nn.Module]]]


@dataclasses.dataclass(frozen=True)
class Subset:
    """Calibration images, and what was said about them.

    Attributes:
        model: The float network; not changed.
        batches: (N, C, H, W) each.
        residual: Whether it has residual additions.
        notes: What the tool has to say beside its outputs; filled as it goes.
    """

    model: nn.Module
    batches: list[Tensor]
    residual: bool
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def fxq_methods(subset: Subset) -> Solved:
    """All methods without bias correction, and the default, which corrects biases.

    Where there are residual additions, again with their inputs left float, as modelopt leaves them. Where tensors are
    large enough, again with histograms that count less.
    """
    from fxq.observing import histogram
    from fxq.recipe import EdgeSpecs, Recipe, Rule

    methods = ("max", "percentile", "entropy", "mse", "auto")
    yield from _fxq_solved(subset, "", methods, Recipe())
    yield "moving-average", lambda: _fxq_moving_average(subset)
    yield "default", lambda: _fxq_default(subset, Recipe())
    if not subset.residual:
        return
    recipe = Recipe([Rule("op:add", EdgeSpecs(input=None), "modelopt leaves them float")])
    yield from _fxq_solved(subset, " adds", methods, recipe)
    yield "default adds", lambda: _fxq_default(subset, recipe)
    with mock.patch.object(histogram, "SAMPLE", LESS):
        yield from _fxq_solved(subset, " less", methods[1:], Recipe())


def _fxq_solved(subset: Subset, suffix: str, methods: tuple[str, ...], recipe: fxq.Recipe) -> Solved:
    """Collect once and solve by each method, without bias correction."""
    import fxq
    from fxq.observing import Histogram
    from fxq.quantizer import quantizers

    prepared = fxq.prepare(subset.model, subset.batches[0], recipe=recipe)
    fxq.calibrate(prepared, subset.batches, progress=False, bias_correction=False)
    found = [q.observer for q in quantizers(prepared).values() if isinstance(q.observer, Histogram)]
    counted = sum(int(o.counts.sum()) for o in found) / sum(int(o.elements) for o in found)
    subset.notes[f"counted{suffix}"] = round(counted, 4)

    def solved(method: str) -> nn.Module:
        report = fxq.solve(prepared, method)
        if method == "auto":
            chosen = [row.method for row in report.rows]
            subset.notes[f"auto{suffix}"] = {name: chosen.count(name) for name in sorted(set(chosen))}
        return fxq.convert(prepared)

    for method in methods:
        yield f"{method}{suffix}", partial(solved, method)


def _fxq_moving_average(subset: Subset) -> nn.Module:
    import fxq
    from fxq.recipe import Method
    from fxq.target import Target

    target = Target.load("tensorrt")
    activation = dataclasses.replace(target.activation, method=Method("moving-average"))
    prepared = fxq.prepare(subset.model, subset.batches[0], target=dataclasses.replace(target, activation=activation))
    fxq.calibrate(prepared, subset.batches, progress=False, bias_correction=False)
    return fxq.convert(prepared)


def _fxq_default(subset: Subset, recipe: fxq.Recipe) -> nn.Module:
    import fxq

    prepared = fxq.prepare(subset.model, subset.batches[0], recipe=recipe)
    fxq.calibrate(prepared, subset.batches, progress=False)
    return fxq.convert(prepared)


def modelopt_methods(subset: Subset) -> Solved:
    """NVIDIA Model Optimizer, INT8_DEFAULT_CFG: by its two algorithms, and by its histogram calibrator."""
    for algorithm, name in (("max", "max"), ("mse", "mse of weights")):
        yield name, partial(_modelopt_algorithm, subset, algorithm)
    collected = _modelopt_histograms(subset)
    for method in ("percentile", "entropy", "mse"):
        yield method, partial(_modelopt_solved, collected, method)


def _forward_all(subset: Subset) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in subset.batches:
                model(batch)

    return run


def _modelopt_algorithm(subset: Subset, algorithm: str) -> nn.Module:
    import modelopt.torch.quantization as mtq

    model = copy.deepcopy(subset.model)
    mtq.quantize(model, {**mtq.INT8_DEFAULT_CFG, "algorithm": None})
    mtq.calibrate(model, algorithm, _forward_all(subset))
    return model


def _modelopt_histograms(subset: Subset) -> nn.Module:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.model_calib import enable_stats_collection

    model, config = copy.deepcopy(subset.model), copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for rule in config["quant_cfg"]:
        if rule["quantizer_name"] == "*input_quantizer":
            rule["cfg"]["calibrator"] = "histogram"
    mtq.quantize(model, {**config, "algorithm": None})
    enable_stats_collection(model)
    _forward_all(subset)(model)
    return model


def _modelopt_solved(collected: nn.Module, method: str) -> nn.Module:
    """Load the activations' ranges by one method; the weights keep their maxima."""
    from modelopt.torch.quantization.calib import histogram
    from modelopt.torch.quantization.nn import TensorQuantizer

    model = copy.deepcopy(collected)
    call = histogram.fake_tensor_quant

    # In 0.47.0 its "mse" still calls with the arguments of an earlier version, and stops at that.
    def mended(inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool) -> Tensor:
        return cast("Tensor", call(inputs, amax, None, num_bits, unsigned))

    with mock.patch.object(histogram, "fake_tensor_quant", mended):
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer) and module.is_enabled:
                arguments = (method,) if "input" in name else ()
                module.load_calib_amax(*arguments)
                module.enable_quant()
                module.disable_calib()
    return model


TOOLS: dict[str, Callable[[Subset], Solved]] = {"fxq": fxq_methods, "modelopt": modelopt_methods}


def outputs(model: nn.Module, images: Tensor, batch: int) -> np.ndarray:
    """The network's outputs for all images, (N, classes) float32."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(batch)]).numpy()


def run(tool: str, task: CifarTask | MnistTask, base: Path, work: Path, size: int, index: int) -> None:
    """Every method on one subset; a method that fails is a note with its error."""
    wider = dataclasses.replace(task, calibration_images=(index + 1) * SPACING)
    images = wider.calibration()[index * SPACING :][:size]
    if len(images) < size:
        raise SystemExit(f"subset {index} of {task.name} has {len(images)} images, not {size}")
    subset = Subset(task.model(base), list(images.split(task.batch)), isinstance(task, CifarTask))
    judged, errors = task.evaluation()[0], {}
    for method, make in TOOLS[tool](subset):
        torch.manual_seed(0)
        try:
            np.save(work / f"{tool}-{method}-{size}-{index}.npy", outputs(make(), judged, task.batch))
        except Exception as error:  # noqa: BLE001 - tools raise what they like, also bare Exception; the table shows it
            traceback.print_exc()
            errors[method] = f"{type(error).__name__}: {error}"[:300]
    notes = {"errors": errors, **subset.notes}
    (work / f"{tool}-{size}-{index}.json").write_text(json.dumps(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True, choices=sorted(TOOLS))
    parser.add_argument("--task", required=True)
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--size", required=True, type=int)
    parser.add_argument("--subset", required=True, type=int)
    parser.add_argument("--threads", required=True, type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = TASKS[args.task]
    assert isinstance(task, CifarTask | MnistTask)
    run(args.tool, task, args.base, args.work, args.size, args.subset)


if __name__ == "__main__":
    main()
